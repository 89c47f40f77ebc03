"""Numba loops of `lists.py`: one block of the output at a time, all models inside.

Blocks are 32 KB, eight pages: with one page per model and turn the processor's prefetchers start anew each time, at up to
1.6 times the cost. A choice between an old and a new value is written to another block, never in place: LLVM would make it a
masked store, which costs four times as much on some processors.
"""

from __future__ import annotations

import numpy as np
import torch

from ..philox import threshold
from ..segments import chunk_rows
from .cache import loop
from .memory import address_table, arrays, fetch, fetch_at, scalar, store
from .philox import DROP, block_span, block_words, key
from .threads import CHUNK, run

BLOCK = 8192  # entries
_ZERO = np.float32(0.0)


def finish(bad, nonfinite):
    if nonfinite is not None:
        nonfinite.fill_(bad)


def numbers(values, like):
    return torch.tensor(values, dtype=torch.float32)


@loop
def _weighted_sum(start, stop, chunks, models, weights, initial, out):
    scratch, total, bad = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for row in range(start, stop):
        segment = chunks[row, 2]
        for first in range(chunks[row, 0], chunks[row, 1], BLOCK):
            count = min(BLOCK, chunks[row, 1] - first)
            total[:] = _ZERO
            if initial is None:
                for t in range(models.codes.size):
                    x, w = fetch_at(models, t, first, count, scratch[0]), weights[t, segment]
                    for j in range(count):
                        total[j] += w * x[j]
            else:
                base = fetch(initial, first, count, scratch[1])
                for t in range(models.codes.size):
                    x, w = fetch_at(models, t, first, count, scratch[0]), weights[t, segment]
                    for j in range(count):
                        total[j] += w * (x[j] - base[j])
                for j in range(count):
                    total[j] += base[j]
            bad += store(out, first, count, total)
    return bad


def weighted_sum(models, weights, initial, bounds, out, nonfinite):
    chunks = chunk_rows(bounds, CHUNK)
    finish(
        run(_weighted_sum, len(chunks), chunks, address_table(models), weights.numpy(), *arrays(initial, out), grain=1),
        nonfinite,
    )


@loop
def _magmax(start, stop, models, initial, out, scale):
    scratch, bad = np.empty((2, BLOCK), np.float32), 0
    kept, new = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        base = fetch(initial, first, count, scratch[1])
        kept[:] = _ZERO
        for t in range(models.codes.size):
            x = fetch_at(models, t, first, count, scratch[0])
            for j in range(count):
                d, old = x[j] - base[j], kept[j]
                new[j] = old if (abs(d) < abs(old)) | (old != old) else d
            kept, new = new, kept
        for j in range(count):
            kept[j] = base[j] + scale * kept[j]
        bad += store(out, first, count, kept)
    return bad


def magmax(models, initial, scale, out, nonfinite):
    finish(run(_magmax, out.numel(), address_table(models), *arrays(initial, out), scalar(*scale)), nonfinite)


@loop
def _fisher(start, stop, models, fishers, weights, out):
    scratch, sums, bad = np.empty((2, BLOCK), np.float32), np.empty((3, BLOCK), np.float32), 0
    above, below, plain = sums[0], sums[1], sums[2]
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        sums[:] = _ZERO
        for t in range(models.codes.size):
            x, f = fetch_at(models, t, first, count, scratch[0]), fetch_at(fishers, t, first, count, scratch[1])
            w = weights[t, 0]
            for j in range(count):
                v = w * f[j]
                above[j] += v * x[j]
                below[j] += v
                plain[j] += w * x[j]
        for j in range(count):
            divisor, mean = below[j], plain[j]
            quotient = above[j] / (divisor if divisor != _ZERO else np.float32(1.0))
            plain[j] = quotient if divisor != _ZERO else mean
        bad += store(out, first, count, plain)
    return bad


def fisher(models, fishers, weights, out, nonfinite):
    bad = run(_fisher, out.numel(), address_table(models), address_table(fishers), weights.numpy(), *arrays(out))
    finish(bad, nonfinite)


@loop
def _dare(start, stop, models, weights, initial, out, drop, keys, offset):
    u, total, bad = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.float32), 0
    scratch = np.empty((2, BLOCK), np.float32)
    for block in range((offset + start) // BLOCK, (offset + stop - 1) // BLOCK + 1):
        first, q, count = block_span(block, BLOCK, start, stop, offset)
        base, chosen = fetch(initial, first, count, scratch[1]), u[q:]
        total[:] = _ZERO
        for t in range(models.codes.size):
            block_words(u, block, (keys[t, 0], keys[t, 1], keys[t, 2], keys[t, 3]), DROP)
            x, w = fetch_at(models, t, first, count, scratch[0]), weights[t, 0]
            for j in range(count):
                value = w * (x[j] - base[j])
                total[j] += value if chosen[j] >= drop else _ZERO
        for j in range(count):
            total[j] += base[j]
        bad += store(out, first, count, total)
    return bad


def dare(models, weights, p, initial, seed, subsequence, offset, out, nonfinite):
    keys = np.array([key(seed, subsequence + t) for t in range(len(models))], np.uint32)
    scaled, drop = weights.numpy() * np.float32(1 / (1 - p)), np.uint32(threshold(p))
    finish(run(_dare, out.numel(), address_table(models), scaled, *arrays(initial, out), drop, keys, offset), nonfinite)
