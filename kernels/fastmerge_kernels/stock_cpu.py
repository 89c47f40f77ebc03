"""Numba loops of `stock.py`, a chunk of one segment at a time."""

from __future__ import annotations

import numpy as np
import torch

from .cpu import add_lanes, arrays, fetch, loop, run, store
from .segments import chunks, sum_rows

BLOCK = 1024
CHUNK = 1 << 16


@loop
def _norms(start, stop, table, rows, x, initial):
    scratch, terms = np.empty((2, BLOCK), np.float32), np.empty((1, BLOCK), np.float32)
    for row in range(start, stop):
        for first in range(table[row, 0], table[row, 1], BLOCK):
            count = min(BLOCK, table[row, 1] - first)
            v, term = fetch(x, first, count, scratch[0]), terms[0]
            if initial is None:
                for j in range(count):
                    term[j] = v[j] * v[j]
            else:
                i = fetch(initial, first, count, scratch[1])
                for j in range(count):
                    term[j] = (v[j] - i[j]) * (v[j] - i[j])
            add_lanes(rows[row], terms, count)


def norms(x, initial, bounds):
    table = chunks(bounds, CHUNK)
    rows = np.zeros((len(table), 1))
    run(_norms, len(table), table, rows, *arrays(x, initial), grain=1)
    return torch.from_numpy(sum_rows(rows, bounds, CHUNK)[:, 0].copy())


@loop
def _update(start, stop, table, scales, theta, initial, total, units):
    scratch, d, u = np.empty((4, BLOCK), np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for row in range(start, stop):
        scale = scales[table[row, 2]]
        for first in range(table[row, 0], table[row, 1], BLOCK):
            count = min(BLOCK, table[row, 1] - first)
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
    table = chunks(bounds, CHUNK)
    scales = torch.where(norms == 0, 0.0, norms.rsqrt()).float().numpy()
    run(_update, len(table), table, scales, *arrays(theta, initial, total, units), grain=1)


@loop
def _merge(start, stop, table, factors, total, initial, out):
    scratch, block, bad = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for row in range(start, stop):
        factor = factors[table[row, 2]]
        for first in range(table[row, 0], table[row, 1], BLOCK):
            count = min(BLOCK, table[row, 1] - first)
            d, i = fetch(total, first, count, scratch[0]), fetch(initial, first, count, scratch[1])
            for j in range(count):
                block[j] = i[j] + factor * d[j]
            bad += store(out, first, count, block)
    return bad


def merge(total, initial, factors, bounds, out, nonfinite):
    table = chunks(bounds, CHUNK)
    bad = run(_merge, len(table), table, factors.float().numpy(), *arrays(total, initial, out), grain=1)
    if nonfinite is not None:
        nonfinite.fill_(bad)
