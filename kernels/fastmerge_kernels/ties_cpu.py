"""Numba loops of `ties.py`."""

from __future__ import annotations

import threading

import numpy as np
import torch

from .cpu import arrays, bits, fetch, loop, number, run, store
from .segments import chunks
from .ties import HIGH, LOW

BLOCK = 1024
CHUNK = 1 << 16
_ZERO, _ONE, _SIGN = np.float32(0.0), np.float32(1.0), np.uint32(0x7FFFFFFF)


@loop
def _magnitudes(x, initial, first, count, scratch, out):
    """out[:count] = the 31 bits of |x - initial|."""
    values = fetch(x, first, count, scratch[0])
    if initial is None:
        for j in range(count):
            out[j] = bits(values[j]) & _SIGN
    else:
        base = fetch(initial, first, count, scratch[1])
        for j in range(count):
            out[j] = bits(values[j] - base[j]) & _SIGN


@loop
def _histogram(start, stop, x, initial, high, counts):
    scratch, b = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.uint32)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        _magnitudes(x, initial, first, count, scratch, b)
        if high < 0:
            for j in range(count):
                counts[b[j] >> np.uint32(15)] += 1
        else:
            for j in range(count):
                if b[j] >> np.uint32(15) == np.uint32(high):
                    counts[b[j] & np.uint32(0x7FFF)] += 1


def histogram(x, initial, high):
    counts, lock = np.zeros(HIGH if high is None else LOW, np.int64), threading.Lock()
    bin_, vectors = -1 if high is None else int(high), arrays(x, initial)

    def part(start, stop):
        mine = np.zeros_like(counts)
        _histogram(start, stop, *vectors, bin_, mine)
        with lock:
            np.add(counts, mine, out=counts)

    run(part, x.numel())
    return torch.from_numpy(counts)


@loop
def _find(start, stop, x, initial, threshold, rank):
    scratch, b = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.uint32)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        _magnitudes(x, initial, first, count, scratch, b)
        for j in range(count):
            if b[j] == threshold:
                rank -= 1
                if rank == 0:
                    return first + j
    return stop


def tie_position(x, initial, threshold, rank):
    return torch.tensor([_find(0, x.numel(), *arrays(x, initial), np.uint32(threshold.item()), rank.item())])


@loop
def _update(start, stop, table, theta, initial, thresholds, cuts, weight, unit, positive, negative, more, less, mass):
    scratch, d = np.empty((7, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    new = np.empty((5, BLOCK), np.float32)
    for row in range(start, stop):
        lo, hi, threshold, cut = table[row, 0], table[row, 1], np.uint32(thresholds[table[row, 2]]), cuts[table[row, 2]]
        for first in range(lo, hi, BLOCK):
            count = min(BLOCK, hi - first)
            x = fetch(theta, first, count, scratch[0])
            if initial is None:
                for j in range(count):
                    d[j] = x[j]
            else:
                i = fetch(initial, first, count, scratch[1])
                for j in range(count):
                    d[j] = x[j] - i[j]
            before = min(max(cut + 1 - first, 0), count)  # ties up to here are kept
            for j in range(before):
                d[j] = d[j] if (bits(d[j]) & _SIGN) >= threshold else _ZERO
            rest = d[before:count]
            for j in range(rest.size):
                rest[j] = rest[j] if (bits(rest[j]) & _SIGN) > threshold else _ZERO
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
