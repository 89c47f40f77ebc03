"""Numba loops of `sampling.py`."""

from __future__ import annotations

import numpy as np

from ..philox import TILE, threshold
from .cache import loop
from .memory import address_table, arrays, entry_at, fetch, store
from .philox import DROP, MIX, block_span, block_words, key, tile_span, words
from .threads import run

BLOCK = 8192  # as in `lists.py`
_ZERO = np.float32(0.0)


@loop
def _random_mix(start, stop, models, out, key, offset):
    u, chosen, bad = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.float32), 0
    count_models = np.uint64(models.codes.size)
    for block in range((offset + start) // BLOCK, (offset + stop - 1) // BLOCK + 1):
        first, q, count = block_span(block, BLOCK, start, stop, offset)
        block_words(u, block, key, MIX)
        for j in range(count):  # the chosen entries alone: many models need not be read whole
            chosen[j] = entry_at(models, (np.uint64(u[q + j]) * count_models) >> np.uint64(32), first + j)
        bad += store(out, first, count, chosen)
    return bad


def random_mix(models, seed, subsequence, offset, out, nonfinite):
    bad = run(_random_mix, out.numel(), address_table(models), *arrays(out), key(seed, subsequence), offset)
    if nonfinite is not None:
        nonfinite.fill_(bad)


@loop
def _dare(start, stop, theta, initial, out, scale, drop, key, offset):
    u, scratch, block, bad = np.empty(TILE, np.uint32), np.empty((2, TILE), np.float32), np.empty(TILE, np.float32), 0
    for tile in range((offset + start) // TILE, (offset + stop - 1) // TILE + 1):
        first, q, count = tile_span(tile, start, stop, offset)
        words(u, tile, key, DROP)
        w, x = u[q:], fetch(theta, first, count, scratch[0])
        if initial is None:
            for j in range(count):
                value = scale * x[j]
                block[j] = value if w[j] >= drop else _ZERO
        else:
            i = fetch(initial, first, count, scratch[1])
            for j in range(count):
                value = scale * (x[j] - i[j])
                block[j] = value if w[j] >= drop else _ZERO
        bad += store(out, first, count, block)
    return bad


def dare_delta(theta, initial, p, seed, subsequence, offset, out, nonfinite):
    numbers = (np.float32(1 / (1 - p)), np.uint32(threshold(p)), key(seed, subsequence), offset)
    bad = run(_dare, out.numel(), *arrays(theta, initial, out), *numbers)
    if nonfinite is not None:
        nonfinite.fill_(bad)


@loop
def _replace(start, stop, theta, kept, limit, key, offset):
    u, scratch, block, bad = np.empty(TILE, np.uint32), np.empty((2, TILE), np.float32), np.empty(TILE, np.float32), 0
    for tile in range((offset + start) // TILE, (offset + stop - 1) // TILE + 1):
        first, q, count = tile_span(tile, start, stop, offset)
        words(u, tile, key, MIX)
        w, x, k = u[q:], fetch(theta, first, count, scratch[0]), fetch(kept, first, count, scratch[1])
        for j in range(count):
            new, old = x[j], k[j]
            block[j] = new if np.uint64(w[j]) < limit else old
        bad += store(kept, first, count, block)
    return bad


def random_replace(theta, p, seed, subsequence, offset, kept, nonfinite):
    bad = run(_replace, kept.numel(), *arrays(theta, kept), np.uint64(threshold(p)), key(seed, subsequence), offset)
    if nonfinite is not None:
        nonfinite.fill_(bad)
