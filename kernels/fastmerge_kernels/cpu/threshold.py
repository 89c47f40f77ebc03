"""Numba loops of `threshold.py`: a sample gives a bracket, one pass collects what lies in it, the rest is in the cache."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..threshold import NOTHING
from .cache import inline, loop, part
from .memory import arrays, bits, fetch
from .threads import run

BLOCK = 1024
WHOLE = 4096  # a segment of this length is collected whole
LARGE = 1 << 21  # a segment of this length is shared by the threads
_SAMPLE = 1 << 17  # entries of the largest sample
_RUN = 16  # of them lie side by side
_COARSE = 10  # bits of a magnitude that a bracket need not know
_MAX, _SIGN = np.int32(NOTHING), np.uint32(0x7FFFFFFF)


@intrinsic
def _above(typingctx, x, initial, low, high):
    """Of the 32 fp32 entries at two addresses: bit j of the lower word where |x - initial| has bits >= low, upper: > high."""

    def codegen(context, builder, signature, args):
        lanes, floats, wide = ir.VectorType(ir.IntType(32), 32), ir.VectorType(ir.FloatType(), 32), ir.IntType(64)
        x, initial = (builder.load(builder.inttoptr(p, floats.as_pointer()), align=4) for p in args[:2])
        magnitude = builder.and_(
            builder.bitcast(builder.fsub(x, initial), lanes), ir.Constant(lanes, [0x7FFFFFFF] * 32)
        )

        def mask(relation, limit):
            one = builder.insert_element(ir.Constant(lanes, ir.Undefined), limit, ir.Constant(ir.IntType(32), 0))
            every = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), ir.Constant(lanes, [0] * 32))
            return builder.zext(builder.bitcast(builder.icmp_signed(relation, magnitude, every), ir.IntType(32)), wide)

        return builder.or_(mask(">=", args[2]), builder.shl(mask(">", args[3]), ir.Constant(wide, 32)))

    return types.uint64(types.uint64, types.uint64, types.int32, types.int32), codegen


@intrinsic
def _ones(typingctx, word):
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def _lowest(typingctx, word):
    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@inline  # called, a sample's cache misses would follow one another
def _magnitudes(x, initial, first, count, scratch, out):
    """out[:count] = the 31 bits of |x - initial|."""
    values = fetch(x, first, count, scratch[0])
    if initial is None:
        for j in range(count):
            out[j] = np.int32(bits(values[j]) & _SIGN)
    else:
        base = fetch(initial, first, count, scratch[1])
        for j in range(count):
            out[j] = np.int32(bits(values[j] - base[j]) & _SIGN)


@part
def _larger(values, limit):
    """How many of int32 values are above the limit."""
    count = np.int32(0)  # a bracket holds an eighth of a segment at most; int64 would halve the speed
    for j in range(values.size):
        count = np.int32(count + np.int32(values[j] > limit))  # numba's sum of two int32 is int64
    return np.int64(count)


@part
def _kth(values, k, low, high):
    """The k-th largest of int32 values, known to lie in low..high: bit by bit, in passes over the cache."""
    open_bits = 0
    while (low ^ high) >> open_bits:
        open_bits += 1
    found = np.int32(low >> open_bits << open_bits)
    for bit in range(open_bits - 1, -1, -1):
        candidate = np.int32(found | np.int32(1 << bit))
        if _larger(values, np.int32(candidate - 1)) >= k:
            found = candidate
    return found


@loop
def _bracket(x, initial, start, stop, k, sample):
    """(low, high) so that the k-th largest magnitude very likely has low <= bits <= high."""
    n = stop - start
    if n <= WHOLE:
        return np.int32(0), _MAX
    runs = min(max(n // (48 * _RUN), 128), sample.size // _RUN)
    step, size, scratch = n // runs, runs * _RUN, np.empty((2, _RUN), np.float32)
    for r in range(runs):  # unevenly spaced: a matrix's rows must not line up with the steps
        first = start + r * step + (r * 2654435761) % (step - _RUN + 1)
        _magnitudes(x, initial, first, np.int64(_RUN), scratch, sample[r * _RUN :])
    sample, share, low, high = sample[:size], k / n, np.int32(0), np.int32(_MAX >> _COARSE)
    for j in range(size):
        sample[j] = np.int32(sample[j] >> _COARSE)
    middle, slack = share * size, 3.5 * math.sqrt(size * share * (1.0 - share)) + 4.0
    if middle - slack >= 1.0:
        high = _kth(sample, np.int64(middle - slack), low, high)
    if middle + slack < size:
        low = _kth(sample, np.int64(middle + slack) + 1, low, high)
    return np.int32(low << _COARSE), np.int32(high << _COARSE | (1 << _COARSE) - 1)


@loop
def _collect(x, initial, start, stop, low, high, found):
    """(how many magnitudes have bits > high, how many have low <= bits <= high; those are in `found`); -1: no room."""
    scratch, zero = np.empty((2, BLOCK), np.float32), np.zeros(BLOCK, np.float32)
    above, size = np.uint64(0), 0
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        if size + count > found.size:
            return np.int64(above), -1
        v = fetch(x, first, count, scratch[0])
        b = zero[:count] if initial is None else fetch(initial, first, count, scratch[1])
        p, q, whole = np.uint64(v.ctypes.data), np.uint64(b.ctypes.data), count // 32 * 32
        for group in range(0, whole, 32):
            masks = _above(p + np.uint64(4 * group), q + np.uint64(4 * group), low, high)
            higher = masks >> np.uint64(32)
            above += _ones(higher)
            inside = (masks & np.uint64(0xFFFFFFFF)) ^ higher
            while inside:
                j = group + np.int64(_lowest(inside))
                found[size] = np.int32(bits(v[j] - b[j]) & _SIGN)
                size += 1
                inside &= inside - np.uint64(1)
        for j in range(whole, count):
            m = np.int32(bits(v[j] - b[j]) & _SIGN)
            above += np.uint64(m > high)
            if (m >= low) & (m <= high):
                found[size] = m
                size += 1
    return np.int64(above), size


@loop
def _finish(found, low, high, above, k):
    """(bits of the k-th largest, its rank among its equals, how many equals there are); bits -1: not in the bracket."""
    rank = k - above
    if rank < 1 or rank > found.size:
        return np.int32(-1), 0, 0
    threshold = _kth(found, rank, low, high)
    above = _larger(found, threshold)
    return threshold, rank - above, _larger(found, np.int32(threshold - 1)) - above


@loop
def _find(x, initial, start, stop, threshold, rank):
    """Index of the rank-th entry whose magnitude has these bits."""
    scratch, b = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.int32)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        _magnitudes(x, initial, first, count, scratch, b)
        here = np.int32(0)
        for j in range(count):
            here = np.int32(here + np.int32(b[j] == threshold))
        if here < rank:
            rank -= here
            continue
        for j in range(count):
            rank -= np.int64(b[j] == threshold)
            if rank == 0:
                return first + j
    return stop


@loop
def _select(start, stop, chosen, bounds, counts, exact, x, initial, thresholds, cuts):
    """The thresholds of the chosen segments start..stop-1, each by one thread; -1 where the bracket failed."""
    longest = 0
    for c in range(start, stop):
        longest = max(longest, bounds[chosen[c] + 1] - bounds[chosen[c]])
    found, sample = np.empty(max(WHOLE, longest // 8) + BLOCK, np.int32), np.empty(_SAMPLE, np.int32)
    for c in range(start, stop):
        s = chosen[c]
        first, last = bounds[s], bounds[s + 1]
        low, high = _bracket(x, initial, first, last, counts[s], sample)
        above, size = _collect(x, initial, first, last, low, high, found)
        thresholds[s], rank, equal = _finish(found[: max(size, 0)], low, high, above, counts[s])
        cuts[s] = bounds[-1]
        if exact and rank < equal:
            cuts[s] = _find(x, initial, first, last, thresholds[s], rank)


def _shared(vectors, start, stop, k):
    """`_finish` of one large segment, collected by all threads."""
    low, high = _bracket(*vectors, start, stop, k, np.empty(_SAMPLE, np.int32))
    parts, lock = [], threading.Lock()

    def collect(first, last):
        found = np.empty((last - first) // 8 + 2 * BLOCK, np.int32)
        above, size = _collect(*vectors, start + first, start + last, low, high, found)
        with lock:
            parts.append((above, size, found[: max(size, 0)].copy()))

    run(collect, stop - start)
    if any(size < 0 for _, size, _ in parts):
        return -1, 0, 0
    return _finish(np.concatenate([found for _, _, found in parts]), low, high, sum(above for above, _, _ in parts), k)


@loop
def _count(start, stop, x, initial, prefix, known, width, counts):
    """counts[b] += 1 for the `width` bits b that follow `known` upper ones equal to `prefix`."""
    scratch, b = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.int32)
    upper, lower, mask = np.uint32(31 - known), np.uint32(31 - known - width), np.uint32((1 << width) - 1)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        _magnitudes(x, initial, first, count, scratch, b)
        for j in range(count):
            m = np.uint32(b[j])
            if known == 0 or m >> upper == prefix:
                counts[(m >> lower) & mask] += 1


def _histogram(vectors, start, stop, prefix, known, width):
    counts, lock = np.zeros(1 << width, np.int64), threading.Lock()

    def add(first, last):
        mine = np.zeros_like(counts)
        _count(start + first, start + last, *vectors, np.uint32(prefix), known, width, mine)
        with lock:
            np.add(counts, mine, out=counts)

    run(add, stop - start)
    return counts


def _by_histograms(vectors, start, stop, k):
    """As `_finish`, whatever the values: 16 bits, then 15."""
    prefix = 0
    for known, width in ((0, 16), (16, 15)):
        counts = _histogram(vectors, start, stop, prefix, known, width)
        above = counts[::-1].cumsum()
        place = int(np.searchsorted(above, k))
        digit = len(counts) - 1 - place
        k -= int(above[place] - counts[digit])
        prefix = prefix << width | digit
    return prefix, k, int(counts[digit])


def histogram(x, initial, prefix, known, width, bounds):
    vectors, prefixes = arrays(x, initial), [0] * len(bounds) if prefix is None else prefix.tolist()
    rows = [_histogram(vectors, a, b, p, known, width) for a, b, p in zip(bounds, bounds[1:], prefixes, strict=False)]
    return torch.from_numpy(np.stack(rows))


def threshold(x, initial, counts, bounds, exact):
    vectors, ends, wanted = arrays(x, initial), np.array(bounds), np.array(counts)
    lengths, cuts = np.diff(ends), np.full(len(counts), bounds[-1])
    thresholds = np.where(wanted == 0, _MAX, -1).astype(np.int32)
    cuts[wanted == 0] = -1
    shared = (lengths >= LARGE) & (torch.get_num_threads() > 1) & (wanted > 0)
    alone = np.flatnonzero((wanted > 0) & ~shared)
    run(_select, len(alone), alone, ends, wanted, exact, *vectors, thresholds, cuts, grain=1)
    for s in np.flatnonzero(thresholds < 0):
        start, stop, k = bounds[s], bounds[s + 1], counts[s]
        thresholds[s], rank, equal = _shared(vectors, start, stop, k) if shared[s] else (-1, 0, 0)
        if thresholds[s] < 0:
            thresholds[s], rank, equal = _by_histograms(vectors, start, stop, k)
        if exact and rank < equal:
            cuts[s] = _find(*vectors, start, stop, thresholds[s], rank)
    return torch.from_numpy(thresholds), torch.from_numpy(cuts)
