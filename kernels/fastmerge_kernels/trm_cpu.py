"""Numba loops of `trm.py`, a tile of 512 entries at a time."""

from __future__ import annotations

import numpy as np
import torch

from .cpu import CHUNK, array, load, loop, number, reduce, run, store
from .philox import TILE, threshold
from .philox_cpu import MASK, key, normals, tile_span, words
from .reference import perpendicular

_ZERO = np.float32(0.0)
_LANES = 128  # independent fp32 sums, so that the loop vectorises in a fixed order
_FLUSH = 8  # tiles between flushes of the fp32 sums into float64


@loop
def _sums(start, stop, rows, previous, current, gradient, gradient2, scale2, key, last, offset):
    """One row per chunk: (<r,d>, <d,d>, <r,r>), or with a gradient (<G,d>, <G,r>, <G,G>). No mask: `last` is None."""
    u, z = np.empty(TILE, np.uint32), np.empty(TILE, np.float32)
    x, y, w = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    single, double = np.zeros((3, _LANES), np.float32), np.zeros((3, _LANES), np.float64)
    for chunk in range(start, stop, CHUNK):
        end = min(chunk + CHUNK, stop)
        double[:] = 0.0
        tiles = 0
        for tile in range((offset + chunk) // TILE, (offset + end - 1) // TILE + 1):
            first, q, count = tile_span(tile, chunk, end, offset)
            normals(z, u, tile, key)
            if last is not None:
                words(u, tile, key, MASK)
            uq, zq = u[q:], z[q:]
            for j in range(count):
                a, b = load(previous, first + j), load(current, first + j)
                keep = (a != _ZERO) | (b != _ZERO)
                if last is not None:
                    keep = keep & (uq[j] > last)
                r, d = zq[j] if keep else _ZERO, b - a if keep else _ZERO
                if gradient is None:
                    x[j], y[j], w[j] = r * d, d * d, r * r
                else:
                    g = load(gradient, first + j)
                    if gradient2 is not None:
                        g = g + scale2 * load(gradient2, first + j)
                    x[j], y[j], w[j] = g * d, g * r, g * g
            for base in range(0, count, _LANES):
                xb, yb, wb = x[base:], y[base:], w[base:]
                for j in range(min(_LANES, count - base)):
                    single[0, j] += xb[j]
                    single[1, j] += yb[j]
                    single[2, j] += wb[j]
            tiles += 1
            if tiles % _FLUSH == 0 or first + count == end:
                double += single
                single[:] = _ZERO
        for k in range(3):
            rows[chunk // CHUNK, k] = double[k].sum()


def _masked(replace: str, ratio: float) -> np.uint32 | None:
    """u <= last means replaced; None where nothing is."""
    return None if replace == "none" or threshold(ratio) == 0 else np.uint32(threshold(ratio) - 1)


def direction(previous, current, seed, stream, replace, ratio, offset):
    last = _masked("none" if replace == "literal" else replace, ratio)
    args = (array(previous), array(current), None, None, _ZERO, key(seed, stream), last, offset)
    return torch.from_numpy(reduce(_sums, previous.numel(), 3, *args))


def gradient(gradient, gradient2, scale2, previous, current, direction, seed, stream, replace, ratio, offset):
    last = _masked("none" if replace == "literal" else replace, ratio)
    args = (array(previous), array(current), array(gradient), array(gradient2), np.float32(scale2))
    gd, gr, gg = reduce(_sums, previous.numel(), 3, *args, key(seed, stream), last, offset)
    c, scale = perpendicular(direction)
    return torch.tensor([gd, scale * (gr - c * gd), gg], dtype=torch.float64)


@loop
def _merge(start, stop, previous, current, initial, out, alpha, beta, c, scale, key, last, half, offset):
    u, z, block, bad = np.empty(TILE, np.uint32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), 0
    rest, scale = np.float32(1.0) - alpha, beta * scale
    for tile in range((offset + start) // TILE, (offset + stop - 1) // TILE + 1):
        first, q, count = tile_span(tile, start, stop, offset)
        normals(z, u, tile, key)
        if last is not None:
            words(u, tile, key, MASK)
        uq, zq = u[q:], z[q:]
        for j in range(count):
            a, b = load(previous, first + j), load(current, first + j)
            d = b - a
            step = scale * (zq[j] - c * d)
            if initial is None:
                value = a + alpha * d + step
                if last is not None:
                    value = (a if uq[j] < half else b) if uq[j] <= last else value
            else:
                i = load(initial, first + j)
                value = i
                if last is not None:
                    value = (a if uq[j] < half else b) if uq[j] <= last else i
                value = value + alpha * (b - i) + rest * (a - i) + step
            block[j] = value if (a != _ZERO) | (b != _ZERO) else _ZERO
        bad += store(out, first, block, count)
    return bad


def merge(previous, current, initial, alpha, beta, direction, seed, stream, replace, ratio, offset, out, nonfinite):
    c, scale = (np.float32(x) for x in perpendicular(direction))
    args = (number(*alpha), number(*beta), c, scale, key(seed, stream), _masked(replace, ratio))
    arrays = (array(x) for x in (previous, current, initial, out))
    bad = run(_merge, previous.numel(), *arrays, *args, np.uint32(threshold(ratio / 2)), offset)
    if nonfinite is not None:
        nonfinite.fill_(bad)
