"""Numba loops of `elementwise.py`."""

from __future__ import annotations

import numpy as np

from .cpu import array, load, loop, number, run, store

BLOCK = 1024  # entries computed before they are stored: 4 KB, stays in the first-level cache


@loop
def _lerp(start, stop, a, b, alpha, out):
    block, bad = np.empty(BLOCK, np.float32), 0
    rest = np.float32(1.0) - alpha
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        for j in range(count):
            block[j] = rest * load(a, first + j) + alpha * load(b, first + j)
        bad += store(out, first, block, count)
    return bad


def lerp(a, b, alpha, out, nonfinite):
    bad = run(_lerp, a.numel(), array(a), array(b), number(*alpha), array(out))
    if nonfinite is not None:
        nonfinite.fill_(bad)
