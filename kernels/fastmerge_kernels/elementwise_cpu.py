"""Numba loops of `elementwise.py`."""

from __future__ import annotations

import numpy as np

from .cpu import arrays, fetch, loop, number, run, store

BLOCK = 1024  # entries computed before they are stored: 4 KB, stays in the first-level cache


@loop
def _lerp(start, stop, a, b, out, alpha):
    block, sa, sb, bad = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), 0
    rest = np.float32(1.0) - alpha
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        x, y = fetch(a, first, count, sa), fetch(b, first, count, sb)
        for j in range(count):
            block[j] = rest * x[j] + alpha * y[j]
        bad += store(out, first, count, block)
    return bad


def lerp(a, b, alpha, out, nonfinite):
    bad = run(_lerp, a.numel(), *arrays(a, b, out), number(*alpha))
    if nonfinite is not None:
        nonfinite.fill_(bad)
