"""Numba loops of `stock.py`, a chunk of one segment at a time."""

from __future__ import annotations

import numpy as np
import torch

from ..segments import chunk_rows, inverse_roots, sum_rows
from .cache import loop
from .memory import address_table, arrays, fetch, fetch_at, store
from .sums import add_sums
from .threads import run

BLOCK = 1024
CHUNK = 1 << 16


@loop
def _norms(start, stop, chunks, rows, x, initial):
    scratch, terms = np.empty((2, BLOCK), np.float32), np.empty((1, BLOCK), np.float32)
    for row in range(start, stop):
        for first in range(chunks[row, 0], chunks[row, 1], BLOCK):
            count = min(BLOCK, chunks[row, 1] - first)
            v, term = fetch(x, first, count, scratch[0]), terms[0]
            if initial is None:
                for j in range(count):
                    term[j] = v[j] * v[j]
            else:
                i = fetch(initial, first, count, scratch[1])
                for j in range(count):
                    term[j] = (v[j] - i[j]) * (v[j] - i[j])
            add_sums(rows[row], terms, count)


def norms(x, initial, bounds):
    chunks = chunk_rows(bounds, CHUNK)
    rows = np.zeros((len(chunks), 1))
    run(_norms, len(chunks), chunks, rows, *arrays(x, initial), grain=1)
    return torch.from_numpy(sum_rows(rows, bounds, CHUNK)[:, 0].copy())


WIDE = 4096  # entries of a block that all models pass, as in `lists.py`


@loop
def _model_norms(start, stop, chunks, rows, models, initial):
    """rows[row, t] = ||theta_t - initial||^2 of the row's chunk."""
    scratch, terms = np.empty((2, WIDE), np.float32), np.empty((1, WIDE), np.float32)
    term = terms[0]
    for row in range(start, stop):
        for first in range(chunks[row, 0], chunks[row, 1], WIDE):
            count = min(WIDE, chunks[row, 1] - first)
            i = fetch(initial, first, count, scratch[0])
            for t in range(models.codes.size):
                x = fetch_at(models, t, first, count, scratch[1])
                for j in range(count):
                    d = x[j] - i[j]
                    term[j] = d * d
                add_sums(rows[row, t : t + 1], terms, count)


@loop
def _unit_norms(start, stop, chunks, rows, models, initial, scales):
    """rows[row, 0] = ||sum_t scales[t, segment] (theta_t - initial)||^2 of the row's chunk."""
    scratch, terms = np.empty((2, WIDE), np.float32), np.empty((1, WIDE), np.float32)
    total = terms[0]
    for row in range(start, stop):
        for first in range(chunks[row, 0], chunks[row, 1], WIDE):
            count = min(WIDE, chunks[row, 1] - first)
            i = fetch(initial, first, count, scratch[0])
            total[:] = np.float32(0.0)
            for t in range(models.codes.size):
                x, scale = fetch_at(models, t, first, count, scratch[1]), scales[t, chunks[row, 2]]
                for j in range(count):
                    total[j] += scale * (x[j] - i[j])
            for j in range(count):
                total[j] = total[j] * total[j]
            add_sums(rows[row], terms, count)


def squares(models, initial, bounds):
    chunks, (start,) = chunk_rows(bounds, CHUNK), arrays(initial)
    rows = np.zeros((len(chunks), len(models)))
    run(_model_norms, len(chunks), chunks, rows, address_table(models), start, grain=1)
    norms = torch.from_numpy(sum_rows(rows, bounds, CHUNK))
    rows = np.zeros((len(chunks), 1))
    scales = inverse_roots(norms).T.contiguous().numpy()
    run(_unit_norms, len(chunks), chunks, rows, address_table(models), start, scales, grain=1)
    return torch.stack([torch.from_numpy(sum_rows(rows, bounds, CHUNK)[:, 0].copy()), (norms != 0).double().sum(1)])


@loop
def _update(start, stop, chunks, scales, theta, initial, total, units):
    scratch, d, u = np.empty((4, BLOCK), np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for row in range(start, stop):
        scale = scales[chunks[row, 2]]
        for first in range(chunks[row, 0], chunks[row, 1], BLOCK):
            count = min(BLOCK, chunks[row, 1] - first)
            x, s, v = (
                fetch(theta, first, count, scratch[0]),
                fetch(total, first, count, scratch[1]),
                fetch(units, first, count, scratch[2]),
            )
            if initial is None:
                for j in range(count):
                    d[j], u[j] = s[j] + x[j], v[j] + scale * x[j]
            else:
                i = fetch(initial, first, count, scratch[3])
                for j in range(count):
                    d[j], u[j] = s[j] + (x[j] - i[j]), v[j] + scale * (x[j] - i[j])
            store(total, first, count, d)
            store(units, first, count, u)


def update(theta, initial, norms, bounds, total, units):
    chunks = chunk_rows(bounds, CHUNK)
    scales = inverse_roots(norms).numpy()
    run(_update, len(chunks), chunks, scales, *arrays(theta, initial, total, units), grain=1)


@loop
def _finalize(start, stop, chunks, factors, total, initial, out):
    scratch, block, bad = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for row in range(start, stop):
        factor = factors[chunks[row, 2]]
        for first in range(chunks[row, 0], chunks[row, 1], BLOCK):
            count = min(BLOCK, chunks[row, 1] - first)
            d, i = fetch(total, first, count, scratch[0]), fetch(initial, first, count, scratch[1])
            for j in range(count):
                block[j] = i[j] + factor * d[j]
            bad += store(out, first, count, block)
    return bad


def finalize(total, initial, factors, bounds, out, nonfinite):
    chunks = chunk_rows(bounds, CHUNK)
    bad = run(_finalize, len(chunks), chunks, factors.float().numpy(), *arrays(total, initial, out), grain=1)
    if nonfinite is not None:
        nonfinite.fill_(bad)
