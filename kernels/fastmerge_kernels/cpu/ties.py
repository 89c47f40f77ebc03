"""Numba loops of `ties.py`."""

from __future__ import annotations

import numpy as np
import torch

from ..segments import chunk_rows
from ..threshold import NOTHING
from .cache import inline, loop, part
from .memory import address_table, arrays, bits, fetch, fetch_at, put_back, scalar, store
from .threads import run

BLOCK = 1024
CHUNK = 1 << 16
_ZERO, _ONE, _SIGN, _NOTHING = np.float32(0.0), np.float32(1.0), np.uint32(0x7FFFFFFF), np.int32(NOTHING)


@inline
def _kept(value, limit):
    """value where the bits of its magnitude are above `limit`, else 0."""
    return value if np.int32(bits(value) & _SIGN) > limit else _ZERO


@inline
def _up(value):
    return (value > _ZERO) | (value != value)  # a NaN is not lost


@loop
def _update(start, stop, chunks, theta, initial, thresholds, cuts, weight, unit, positive, negative, more, less, mass):
    scratch, zero = np.empty((7, BLOCK), np.float32), np.zeros(BLOCK, np.float32)
    for row in range(start, stop):
        first, hi, threshold, cut = chunks[row, 0], chunks[row, 1], thresholds[chunks[row, 2]], cuts[chunks[row, 2]]
        while first < hi:  # up to the cut equal magnitudes are kept: a block ends there
            end = min(first + BLOCK, hi)
            end = cut + 1 if first <= cut < end else end
            count, limit = end - first, np.int32(np.int32(threshold) - np.int32(first <= cut))
            x = fetch(theta, first, count, scratch[0])
            i = zero if initial is None else fetch(initial, first, count, scratch[1])
            p, q = fetch(positive, first, count, scratch[2]), fetch(negative, first, count, scratch[3])
            m, n = fetch(more, first, count, scratch[4]), fetch(less, first, count, scratch[5])
            # two at a time: LLVM gives up on more than eight pairs of vectors that might overlap
            for j in range(count):
                d = _kept(x[j] - i[j], limit)
                up = _up(d)
                p[j] = p[j] + (weight * d if up else _ZERO)
                m[j] = m[j] + (unit if up else _ZERO)
            for j in range(count):
                d = _kept(x[j] - i[j], limit)
                down = d < _ZERO
                q[j] = q[j] + (weight * d if down else _ZERO)
                n[j] = n[j] + (unit if down else _ZERO)
            put_back(positive, first, count, p)
            put_back(negative, first, count, q)
            put_back(more, first, count, m)
            put_back(less, first, count, n)
            if mass is not None:
                s = fetch(mass, first, count, scratch[6])
                for j in range(count):
                    s[j] = s[j] + _kept(x[j] - i[j], limit)
                put_back(mass, first, count, s)
            first = end


def update(theta, initial, threshold, cut, bounds, weight, unit, *state):
    chunks = chunk_rows(bounds, CHUNK)
    theta, initial, *state = arrays(theta, initial, *state)
    numbers = (threshold.numpy(), cut.numpy(), np.float32(weight), np.float32(unit))
    run(_update, len(chunks), chunks, theta, initial, *numbers, *state, grain=1)


@loop
def _signs(start, stop, positive, negative, mass):
    scratch, total = np.empty((2, BLOCK), np.float32), 0
    for first in range(start, stop, BLOCK):
        count, signs = min(BLOCK, stop - first), np.int32(0)
        if mass is None:
            p, q = fetch(positive, first, count, scratch[0]), fetch(negative, first, count, scratch[1])
            for j in range(count):
                signs = np.int32(signs + np.int32(p[j] + q[j] > _ZERO) - np.int32(p[j] + q[j] < _ZERO))
        else:
            s = fetch(mass, first, count, scratch[0])
            for j in range(count):
                signs = np.int32(signs + np.int32(s[j] > _ZERO) - np.int32(s[j] < _ZERO))
        total += signs
    return total


def signs(positive, negative, mass):
    return torch.tensor([run(_signs, positive.numel(), *arrays(positive, negative, mass))])


@loop
def _finalize(start, stop, positive, negative, more, less, mass, initial, out, zero, scale):
    scratch, block, bad = np.empty((6, BLOCK), np.float32), np.empty(BLOCK, np.float32), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        p, q = fetch(positive, first, count, scratch[0]), fetch(negative, first, count, scratch[1])
        m, n = fetch(more, first, count, scratch[2]), fetch(less, first, count, scratch[3])
        if mass is None:
            sums = scratch[4]
            for j in range(count):
                sums[j] = p[j] + q[j]
        else:
            sums = fetch(mass, first, count, scratch[4])
        for j in range(count):
            total, above, below, many, few = sums[j], p[j], q[j], m[j], n[j]
            up = (total > _ZERO) | ((total == _ZERO) & (zero >= _ZERO))
            value, divisor = above if up else below, many if up else few
            value = value / (divisor if divisor != _ZERO else _ONE)
            block[j] = scale * (value if total == total else total)
        if initial is not None:
            i = fetch(initial, first, count, scratch[5])
            for j in range(count):
                block[j] = i[j] + block[j]
        bad += store(out, first, count, block)
    return bad


def finalize(positive, negative, more, less, mass, initial, zero, scale, out, nonfinite):
    vectors = arrays(positive, negative, more, less, mass, initial, out)
    bad = run(_finalize, out.numel(), *vectors, scalar(*zero), scalar(*scale))
    if nonfinite is not None:
        nonfinite.fill_(bad)


WIDE = 4096  # entries of a block in `merge`: as few pages as leave the sums in the cache


@inline
def _add(total, a, use_a, b, use_b, c, use_c, d, use_d):
    total += a if use_a else _ZERO
    total += b if use_b else _ZERO
    total += c if use_c else _ZERO
    return total + (d if use_d else _ZERO)


@part
def _vote(sums, at, x, y, z, v, base, limits, weights, units):
    """Add four models to `sums` [5, n] from `at` on: positive, negative, their counts, unweighted mass.

    One after the other for every entry, so that the sums are read and written once for all four.
    """
    # slices of rows: those of the matrix are not known to be contiguous, and the loop would not be vectorised
    p, q, m, n, mass = sums[0][at:], sums[1][at:], sums[2][at:], sums[3][at:], sums[4][at:]
    l0, l1, l2, l3 = limits[0], limits[1], limits[2], limits[3]
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    u0, u1, u2, u3 = units[0], units[1], units[2], units[3]
    for j in range(base.size):
        i = base[j]
        a, b, c, d = _kept(x[j] - i, l0), _kept(y[j] - i, l1), _kept(z[j] - i, l2), _kept(v[j] - i, l3)
        e, f, g, h = _up(a), _up(b), _up(c), _up(d)
        p[j] = _add(p[j], w0 * a, e, w1 * b, f, w2 * c, g, w3 * d, h)
        m[j] = _add(m[j], u0, e, u1, f, u2, g, u3, h)
        e, f, g, h = a < _ZERO, b < _ZERO, c < _ZERO, d < _ZERO
        q[j] = _add(q[j], w0 * a, e, w1 * b, f, w2 * c, g, w3 * d, h)
        n[j] = _add(n[j], u0, e, u1, f, u2, g, u3, h)
        mass[j] = (((mass[j] + a) + b) + c) + d


@loop
def _merge(
    start, stop, chunks, models, initial, thresholds, cuts, weights, units, unweighted, out, zero, scale, write, verdict
):
    """verdict [chunks, 2]: sum of the elected signs, and how many entries `zero` decides."""
    scratch, d, bad = np.empty((5, WIDE), np.float32), np.empty(WIDE, np.float32), 0
    sums, T = np.empty((5, WIDE), np.float32), models.codes.size
    p, q, m, n, mass = sums[0], sums[1], sums[2], sums[3], sums[4]
    limits, w, u = np.empty(4, np.int32), np.zeros(4, np.float32), np.zeros(4, np.float32)
    for row in range(start, stop):
        segment = chunks[row, 2]
        for first in range(chunks[row, 0], chunks[row, 1], WIDE):
            count = min(WIDE, chunks[row, 1] - first)
            i = fetch(initial, first, count, scratch[4])
            sums[:] = _ZERO
            for t in range(0, T, 4):  # missing ones of the last four keep nothing
                x = fetch_at(models, t, first, count, scratch[0])
                y = fetch_at(models, t + 1, first, count, scratch[1]) if t + 1 < T else x
                z = fetch_at(models, t + 2, first, count, scratch[2]) if t + 2 < T else x
                v = fetch_at(models, t + 3, first, count, scratch[3]) if t + 3 < T else x
                for k in range(4):
                    limits[k] = _NOTHING
                    if t + k < T:
                        w[k], u[k] = weights[t + k], units[t + k]
                at = np.int64(0)  # a literal would have `_vote` compiled twice
                while at < count:  # pieces in which every model has one limit: up to its cut equal magnitudes are kept
                    end = count
                    for k in range(t, min(t + 4, T)):
                        cut = cuts[k, segment] + 1 - first
                        end = cut if at < cut < end else end
                    for k in range(t, min(t + 4, T)):
                        equal = cuts[k, segment] + 1 - first >= end
                        limits[k - t] = np.int32(thresholds[k, segment]) - np.int32(equal)
                    _vote(sums, at, x[at:end], y[at:end], z[at:end], v[at:end], i[at:end], limits, w, u)
                    at = end
            if not unweighted:
                for j in range(count):
                    mass[j] = p[j] + q[j]
            signs, open_ = np.int32(0), np.int32(0)
            for j in range(count):
                signs = np.int32(signs + np.int32(mass[j] > _ZERO) - np.int32(mass[j] < _ZERO))
                open_ = np.int32(open_ + np.int32((mass[j] == _ZERO) & ((p[j] != _ZERO) | (q[j] != _ZERO))))
            verdict[row, 0], verdict[row, 1] = verdict[row, 0] + signs, verdict[row, 1] + open_
            if write:
                for j in range(count):
                    total, above, below, many, few = mass[j], p[j], q[j], m[j], n[j]
                    up = (total > _ZERO) | ((total == _ZERO) & (zero >= _ZERO))
                    value, divisor = above if up else below, many if up else few
                    value = value / (divisor if divisor != _ZERO else _ONE)
                    d[j] = i[j] + scale * (value if total == total else total)
                bad += store(out, first, count, d)
    return bad


def merge(models, initial, threshold, cut, bounds, weights, units, unweighted, zero, scale, out, nonfinite):
    chunks, scale = chunk_rows(bounds, CHUNK), scalar(*scale)
    trim = (threshold.numpy(), cut.numpy(), weights.numpy(), units.numpy(), unweighted)
    start, target = arrays(initial, out)

    def merge_rows(chunks, sign, write):
        verdict = np.zeros((len(chunks), 2), np.int64)
        last = (np.float32(sign), scale, write, verdict)
        return run(_merge, len(chunks), chunks, address_table(models), start, *trim, target, *last, grain=1), verdict

    def majority(verdict):
        return -1.0 if zero == "majority" and verdict[:, 0].sum() < 0 else 1.0

    inputs = {x.data_ptr() for x in (*models, initial)}
    in_place = zero == "majority" and out.data_ptr() in inputs
    sign = majority(merge_rows(chunks, 1.0, write=False)[1]) if in_place else 1.0
    bad, verdict = merge_rows(chunks, sign, write=True)
    if majority(verdict) < sign:  # chunks with entries whose kept values cancel exactly, done with the wrong sign
        merge_rows(chunks[verdict[:, 1] > 0], -1.0, write=True)
    if nonfinite is not None:
        nonfinite.fill_(bad)
