"""Numba loops of `trm.py`, a tile of 512 entries at a time."""

from __future__ import annotations

import numpy as np
import torch

from ..philox import TILE, threshold
from ..trm import perpendicular
from .cache import loop
from .memory import arrays, fetch, scalar, store
from .philox import MASK, key, normals, tile_span, words
from .sums import add_sums
from .threads import CHUNK, reduce, run

_ZERO = np.float32(0.0)
_NEVER = np.uint32(0xFFFFFFFF)  # the mask word where nothing is replaced: above every `last` below 2^32 - 1


@loop
def _sums(start, stop, rows, previous, current, gradient, gradient2, scale2, key, masked, last, offset):
    """One row per chunk: (<r,d>, <d,d>, <r,r>), or with a gradient (<G,d>, <G,r>, <G,G>)."""
    u, z, mask = np.empty(TILE, np.uint32), np.empty(TILE, np.float32), np.full(TILE, _NEVER, np.uint32)
    terms, scratch = np.zeros((3, TILE), np.float32), np.empty((4, TILE), np.float32)
    for chunk in range(start, stop, CHUNK):
        end = min(chunk + CHUNK, stop)
        for tile in range((offset + chunk) // TILE, (offset + end - 1) // TILE + 1):
            first, q, count = tile_span(tile, chunk, end, offset)
            normals(z, u, tile, key)
            if masked:
                words(mask, tile, key, MASK)
            a, b = fetch(previous, first, count, scratch[0]), fetch(current, first, count, scratch[1])
            w, r, x, y, v = mask[q:], z[q:], terms[0], terms[1], terms[2]
            if gradient is None:
                for j in range(count):
                    keep = ((a[j] != _ZERO) | (b[j] != _ZERO)) & (w[j] > last)
                    rj, d = r[j], b[j] - a[j]
                    rj, d = rj if keep else _ZERO, d if keep else _ZERO
                    x[j], y[j], v[j] = rj * d, d * d, rj * rj
            else:
                g = fetch(gradient, first, count, scratch[2])
                if gradient2 is not None:
                    g2 = fetch(gradient2, first, count, scratch[3])
                    total = v
                    for j in range(count):
                        total[j] = g[j] + scale2 * g2[j]
                    g = total
                for j in range(count):
                    keep = ((a[j] != _ZERO) | (b[j] != _ZERO)) & (w[j] > last)
                    rj, d, gj = r[j], b[j] - a[j], g[j]
                    rj, d = rj if keep else _ZERO, d if keep else _ZERO
                    x[j], y[j], v[j] = gj * d, gj * rj, gj * gj
            add_sums(rows[chunk // CHUNK], terms, count)


def _mask(replace: str, ratio: float) -> tuple[bool, np.uint32]:
    """(there is a mask, the last word u that means replaced)."""
    masked = replace != "none" and threshold(ratio) > 0
    return masked, np.uint32(threshold(ratio) - 1 if masked else 0)


def _reduce(previous, current, gradient, gradient2, scale2, seed, subsequence, replace, ratio, offset):
    mask = _mask("none" if replace == "literal" else replace, ratio)
    args = (*arrays(previous, current, gradient, gradient2), np.float32(scale2), key(seed, subsequence), *mask, offset)
    return reduce(_sums, previous.numel(), 3, *args)


def direction(previous, current, *position):
    return torch.from_numpy(_reduce(previous, current, None, None, 0.0, *position))


def gradient(gradient, gradient2, scale2, previous, current, direction, *position):
    gd, gr, gg = _reduce(previous, current, gradient, gradient2, scale2, *position)
    c, scale = perpendicular(direction)
    return torch.tensor([gd, scale * (gr - c * gd), gg], dtype=torch.float64)


@loop
def _merge(start, stop, previous, current, initial, out, alpha, beta, c, scale, key, masked, last, half, offset):
    u, z, mask = np.empty(TILE, np.uint32), np.empty(TILE, np.float32), np.full(TILE, _NEVER, np.uint32)
    scratch, block, bad = np.empty((3, TILE), np.float32), np.empty(TILE, np.float32), 0
    rest, scale = np.float32(1.0) - alpha, beta * scale
    for tile in range((offset + start) // TILE, (offset + stop - 1) // TILE + 1):
        first, q, count = tile_span(tile, start, stop, offset)
        normals(z, u, tile, key)
        if masked:
            words(mask, tile, key, MASK)
        a, b = fetch(previous, first, count, scratch[0]), fetch(current, first, count, scratch[1])
        w, r = mask[q:], z[q:]
        if initial is None:
            for j in range(count):
                x, y, word = a[j], b[j], w[j]
                d = y - x
                moved = x + alpha * d + scale * (r[j] - c * d)
                chosen = x if word < half else y
                value = chosen if word <= last else moved
                block[j] = value if (x != _ZERO) | (y != _ZERO) else _ZERO
        else:
            i = fetch(initial, first, count, scratch[2])
            for j in range(count):
                x, y, origin, word = a[j], b[j], i[j], w[j]
                chosen = x if word < half else y
                base = chosen if word <= last else origin
                step = scale * (r[j] - c * (y - x))
                value = base + alpha * (y - origin) + rest * (x - origin) + step
                block[j] = value if (x != _ZERO) | (y != _ZERO) else _ZERO
        bad += store(out, first, count, block)
    return bad


def merge(
    previous, current, initial, alpha, beta, direction, seed, subsequence, replace, ratio, offset, out, nonfinite
):
    c, scale = (np.float32(x) for x in perpendicular(direction))
    mask = (*_mask(replace, ratio), np.uint32(threshold(ratio / 2)))
    args = (scalar(*alpha), scalar(*beta), c, scale, key(seed, subsequence), *mask, offset)
    bad = run(_merge, previous.numel(), *arrays(previous, current, initial, out), *args)
    if nonfinite is not None:
        nonfinite.fill_(bad)
