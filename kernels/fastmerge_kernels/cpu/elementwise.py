"""Numba loops of `elementwise.py`: fetch a block of every vector, apply the formula, store the block."""

from __future__ import annotations

import numpy as np
import torch

from .cache import loop
from .memory import arrays, fetch, scalar, store
from .sums import add_sums
from .threads import CHUNK, reduce, run

BLOCK = 1024  # entries computed before they are stored: 4 KB, stays in the first-level cache
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@loop
def lerp(start, stop, a, b, out, alpha):
    scratch, block, bad = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    rest = _ONE - alpha
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        x, y = fetch(a, first, count, scratch[0]), fetch(b, first, count, scratch[1])
        for j in range(count):
            block[j] = rest * x[j] + alpha * y[j]
        bad += store(out, first, count, block)
    return bad


@loop
def axpy(start, stop, theta, delta, out, c):
    scratch, block, bad = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        x, d = fetch(theta, first, count, scratch[0]), fetch(delta, first, count, scratch[1])
        for j in range(count):
            block[j] = x[j] + c * d[j]
        bad += store(out, first, count, block)
    return bad


@loop
def fisher_merge_(start, stop, theta_t, fisher_t, theta, fisher, lam):
    scratch, merged, mixed, bad = (
        np.empty((4, BLOCK), np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        0,
    )
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        x, f = fetch(theta, first, count, scratch[0]), fetch(fisher, first, count, scratch[1])
        y, g = fetch(theta_t, first, count, scratch[2]), fetch(fisher_t, first, count, scratch[3])
        for j in range(count):
            new = lam * g[j]
            both = new + (_ONE - lam) * f[j]
            known = both != _ZERO
            w = (new if known else lam) / (both if known else _ONE)
            mixed[j] = both
            merged[j] = (_ONE - w) * x[j] + w * y[j]
        bad += store(theta, first, count, merged)
        bad += store(fisher, first, count, mixed)
    return bad


@loop
def pam_accumulate_(start, stop, fisher, theta, initial, total, moment):
    scratch, s, m, bad = np.empty((5, BLOCK), np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        f, x, i = (
            fetch(fisher, first, count, scratch[0]),
            fetch(theta, first, count, scratch[1]),
            fetch(initial, first, count, scratch[2]),
        )
        old_s, old_m = fetch(total, first, count, scratch[3]), fetch(moment, first, count, scratch[4])
        for j in range(count):
            s[j] = old_s[j] + f[j]
            m[j] = old_m[j] + f[j] * (x[j] - i[j])
        bad += store(total, first, count, s)
        bad += store(moment, first, count, m)
    return bad


@loop
def magmax_update_(start, stop, theta, initial, kept):
    scratch, block, bad = np.empty((3, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        x, i, k = (
            fetch(theta, first, count, scratch[0]),
            fetch(initial, first, count, scratch[1]),
            fetch(kept, first, count, scratch[2]),
        )
        for j in range(count):
            d, old = x[j] - i[j], k[j]
            block[j] = old if (abs(d) < abs(old)) | (old != old) else d
        bad += store(kept, first, count, block)
    return bad


@loop
def magmax_delta_(start, stop, delta, kept):
    scratch, block, bad = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        d, k = fetch(delta, first, count, scratch[0]), fetch(kept, first, count, scratch[1])
        for j in range(count):
            new, old = d[j], k[j]
            block[j] = old if (abs(new) < abs(old)) | (old != old) else new
        bad += store(kept, first, count, block)
    return bad


@loop
def fisher_accumulate_(start, stop, gradient, fisher, scale):
    scratch, block, bad = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        g, f = fetch(gradient, first, count, scratch[0]), fetch(fisher, first, count, scratch[1])
        for j in range(count):
            block[j] = f[j] + scale * (g[j] * g[j])
        bad += store(fisher, first, count, block)
    return bad


@loop
def ewc_gradient_(start, stop, fisher, theta, anchor, gradient, lam):
    scratch, block, bad = np.empty((4, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        f, x = fetch(fisher, first, count, scratch[0]), fetch(theta, first, count, scratch[1])
        a, g = fetch(anchor, first, count, scratch[2]), fetch(gradient, first, count, scratch[3])
        for j in range(count):
            block[j] = g[j] + lam * (f[j] * (x[j] - a[j]))
        bad += store(gradient, first, count, block)
    return bad


LOOPS = {
    "lerp": lerp,
    "axpy": axpy,
    "fisher_merge_": fisher_merge_,
    "pam_accumulate_": pam_accumulate_,
    "magmax_update_": magmax_update_,
    "magmax_delta_": magmax_delta_,
    "fisher_accumulate_": fisher_accumulate_,
    "ewc_gradient_": ewc_gradient_,
}


def launch(name, vectors, numbers, nonfinite):
    bad = run(LOOPS[name], vectors[0].numel(), *arrays(*vectors), *(scalar(*x) for x in numbers))
    if nonfinite is not None:
        nonfinite.fill_(bad)


@loop
def _pam_sums(start, stop, rows, total, moment, merged, theta, initial):
    scratch, terms = np.empty((5, BLOCK), np.float32), np.empty((2, BLOCK), np.float32)
    for chunk in range(start, stop, CHUNK):
        end = min(chunk + CHUNK, stop)
        for first in range(chunk, end, BLOCK):
            count = min(BLOCK, end - first)
            s, m, x = (
                fetch(total, first, count, scratch[0]),
                fetch(moment, first, count, scratch[1]),
                fetch(merged, first, count, scratch[2]),
            )
            y, i, p, q = (
                fetch(theta, first, count, scratch[3]),
                fetch(initial, first, count, scratch[4]),
                terms[0],
                terms[1],
            )
            for j in range(count):
                d = y[j] - x[j]
                p[j] = (s[j] * (x[j] - i[j]) - m[j]) * d
                q[j] = s[j] * d * d
            add_sums(rows[chunk // CHUNK], terms, count)


def pam_coefficient(*vectors):
    return torch.from_numpy(reduce(_pam_sums, vectors[0].numel(), 2, *arrays(*vectors)))
