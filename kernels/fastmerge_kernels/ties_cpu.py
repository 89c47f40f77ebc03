"""Numba loops of `ties.py`."""

from __future__ import annotations

import numpy as np

from .cpu import arrays, bits, fetch, fetch_at, inline, loop, number, run, store, table
from .segments import chunks

BLOCK = 1024
CHUNK = 1 << 16
_ZERO, _ONE, _SIGN = np.float32(0.0), np.float32(1.0), np.uint32(0x7FFFFFFF)


@inline
def _trim(d, x, i, count, threshold, before):
    """d = x - i where its magnitude is above the threshold, or equal to it and its index < before; else 0."""
    before = min(max(before, 0), count)
    for j in range(before):
        value = x[j] - i[j]
        d[j] = value if (bits(value) & _SIGN) >= threshold else _ZERO
    d, x, i = (
        d[before:count],
        x[before:count],
        i[before:count],
    )  # an index that begins elsewhere than 0 is not vectorised
    for j in range(d.size):
        value = x[j] - i[j]
        d[j] = value if (bits(value) & _SIGN) > threshold else _ZERO


@loop
def _update(start, stop, table, theta, initial, thresholds, cuts, weight, unit, positive, negative, more, less, mass):
    scratch, d = np.empty((7, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    new, zero = np.empty((5, BLOCK), np.float32), np.zeros(BLOCK, np.float32)
    for row in range(start, stop):
        lo, hi, threshold, cut = table[row, 0], table[row, 1], np.uint32(thresholds[table[row, 2]]), cuts[table[row, 2]]
        for first in range(lo, hi, BLOCK):
            count = min(BLOCK, hi - first)
            x = fetch(theta, first, count, scratch[0])
            i = zero if initial is None else fetch(initial, first, count, scratch[1])
            _trim(d, x, i, count, threshold, cut + 1 - first)
            p, q = fetch(positive, first, count, scratch[2]), fetch(negative, first, count, scratch[3])
            m, n = fetch(more, first, count, scratch[4]), fetch(less, first, count, scratch[5])
            for j in range(count):
                step = weight * d[j]
                up, down = (d[j] > _ZERO) | (d[j] != d[j]), d[j] < _ZERO
                new[0, j] = p[j] + (step if up else _ZERO)
                new[1, j] = q[j] + (step if down else _ZERO)
                new[2, j] = m[j] + (unit if up else _ZERO)
                new[3, j] = n[j] + (unit if down else _ZERO)
            store(positive, first, count, new[0])
            store(negative, first, count, new[1])
            store(more, first, count, new[2])
            store(less, first, count, new[3])
            if mass is not None:
                s = fetch(mass, first, count, scratch[6])
                for j in range(count):
                    new[4, j] = s[j] + d[j]
                store(mass, first, count, new[4])


def update(theta, initial, threshold, cut, bounds, weight, unit, *state):
    table = chunks(bounds, CHUNK)
    theta, initial, *state = arrays(theta, initial, *state)
    numbers = (threshold.numpy(), cut.numpy(), np.float32(weight), np.float32(unit))
    run(_update, len(table), table, theta, initial, *numbers, *state, grain=1)


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
    bad = run(_finalize, out.numel(), *vectors, number(*zero), number(*scale))
    if nonfinite is not None:
        nonfinite.fill_(bad)


WIDE = 4096  # entries of a block in `merge`: as few pages as leave the sums in the cache


@loop
def _merge(
    start, stop, rows, models, initial, thresholds, cuts, weights, units, unweighted, out, zero, scale, write, verdict
):
    """verdict [rows, 2]: sum of the elected signs, and how many entries `zero` decides."""
    scratch, d, bad = np.empty((2, WIDE), np.float32), np.empty(WIDE, np.float32), 0
    sums = np.empty((5, WIDE), np.float32)
    p, q, m, n, mass = sums[0], sums[1], sums[2], sums[3], sums[4]
    for row in range(start, stop):
        segment = rows[row, 2]
        for first in range(rows[row, 0], rows[row, 1], WIDE):
            count = min(WIDE, rows[row, 1] - first)
            i = fetch(initial, first, count, scratch[1])
            sums[:] = _ZERO
            for t in range(models.codes.size):
                x, w, unit = fetch_at(models, t, first, count, scratch[0]), weights[t], units[t]
                _trim(d, x, i, count, np.uint32(thresholds[t, segment]), cuts[t, segment] + 1 - first)
                for j in range(count):
                    step = w * d[j]
                    up, down = (d[j] > _ZERO) | (d[j] != d[j]), d[j] < _ZERO
                    p[j] += step if up else _ZERO
                    q[j] += step if down else _ZERO
                    m[j] += unit if up else _ZERO
                    n[j] += unit if down else _ZERO
                if unweighted:
                    for j in range(count):
                        mass[j] += d[j]
            if not unweighted:
                for j in range(count):
                    mass[j] = p[j] + q[j]
            signs, open_ = np.int32(0), np.int32(0)
            for j in range(count):
                signs += np.int32(mass[j] > _ZERO) - np.int32(mass[j] < _ZERO)
                open_ += np.int32((mass[j] == _ZERO) & ((p[j] != _ZERO) | (q[j] != _ZERO)))
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
    rows, scale = chunks(bounds, CHUNK), number(*scale)
    trim = (threshold.numpy(), cut.numpy(), weights.numpy(), units.numpy(), unweighted)
    start, target = arrays(initial, out)

    def merge_rows(rows, sign, write):
        verdict = np.zeros((len(rows), 2), np.int64)
        last = (np.float32(sign), scale, write, verdict)
        return run(_merge, len(rows), rows, table(models), start, *trim, target, *last, grain=1), verdict

    def majority(verdict):
        return -1.0 if zero == "majority" and verdict[:, 0].sum() < 0 else 1.0

    inputs = {x.data_ptr() for x in (*models, initial)}
    in_place = zero == "majority" and out.data_ptr() in inputs
    sign = majority(merge_rows(rows, 1.0, write=False)[1]) if in_place else 1.0
    bad, verdict = merge_rows(rows, sign, write=True)
    if majority(verdict) < sign:  # chunks with entries whose kept values cancel exactly, done with the wrong sign
        merge_rows(rows[verdict[:, 1] > 0], -1.0, write=True)
    if nonfinite is not None:
        nonfinite.fill_(bad)
