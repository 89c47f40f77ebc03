"""Numba loops of `sampling.py`, a tile of 512 entries at a time."""

from __future__ import annotations

import numpy as np

from .cpu import arrays, fetch, fetch_at, loop, run, store, table
from .philox import TILE, threshold
from .philox_cpu import DROP, MIX, key, tile_span, words

_ZERO = np.float32(0.0)


@loop
def _random_mix(start, stop, models, out, key, offset):
    u, scratch, block, bad = np.empty(TILE, np.uint32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), 0
    count_models = np.uint64(models.addresses.size)
    for tile in range((offset + start) // TILE, (offset + stop - 1) // TILE + 1):
        first, q, count = tile_span(tile, start, stop, offset)
        words(u, tile, key, MIX)
        for j in range(TILE):
            u[j] = np.uint32((np.uint64(u[j]) * count_models) >> np.uint64(32))
        chosen = u[q:]
        for t in range(models.addresses.size):
            x, this = fetch_at(models, t, first, count, scratch), np.uint32(t)
            for j in range(count):
                new, old = x[j], block[j]  # loaded on both ways, or the loop does not vectorise
                block[j] = new if chosen[j] == this else old
        bad += store(out, first, count, block)
    return bad


def random_mix(models, seed, stream, offset, out, nonfinite):
    bad = run(_random_mix, out.numel(), table(models), *arrays(out), key(seed, stream), offset)
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


def dare_delta(theta, initial, p, seed, stream, offset, out, nonfinite):
    numbers = (np.float32(1 / (1 - p)), np.uint32(threshold(p)), key(seed, stream), offset)
    bad = run(_dare, out.numel(), *arrays(theta, initial, out), *numbers)
    if nonfinite is not None:
        nonfinite.fill_(bad)
