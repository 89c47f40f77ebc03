"""Triton kernels of `ties.py`. Histograms use integer atomics, whose order does not matter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import BLOCK, OPTIONS, cleared, load, on, pointer, scalar, store
from .segments import chunks_on
from .ties import HIGH, LOW

_SIZE = 2 * BLOCK  # entries of a chunk in `update`


@triton.jit
def magnitudes(x, initial, i, inside):
    """(x - initial, the 31 bits of its magnitude)."""
    value = load(x, i, inside)
    if initial is not None:
        value -= load(initial, i, inside)
    return value, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def histogram_kernel(x, initial, high, counts, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    _, b = magnitudes(x, initial, i, inside)
    if high is None:
        tl.atomic_add(counts + (b >> 15), tl.full([BLOCK], 1, tl.int64), mask=inside, sem="relaxed")
    else:
        here = inside & ((b >> 15) == tl.load(high).to(tl.int32))
        tl.atomic_add(counts + (b & 0x7FFF), tl.full([BLOCK], 1, tl.int64), mask=here, sem="relaxed")


def histogram(x, initial, high):
    counts, n = torch.zeros(HIGH if high is None else LOW, dtype=torch.int64, device=x.device), x.numel()
    if n:
        with on(x):
            histogram_kernel[(triton.cdiv(n, BLOCK),)](x, initial, high, counts, n, BLOCK=BLOCK, **OPTIONS)
    return counts


@triton.jit
def tie_count_kernel(x, initial, threshold, counts, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    _, b = magnitudes(x, initial, i, inside)
    tl.store(counts + tl.program_id(0), tl.sum((inside & (b == tl.load(threshold))).to(tl.int64), 0))


@triton.jit
def tie_place_kernel(x, initial, threshold, block, rank, out, n, BLOCK: tl.constexpr):
    """out = index of the rank-th tie of the block."""
    i = tl.load(block) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    _, b = magnitudes(x, initial, i, inside)
    tie = (inside & (b == tl.load(threshold))).to(tl.int32)
    place = tie * (tl.cumsum(tie, 0) == tl.load(rank).to(tl.int32)).to(tl.int32)
    tl.store(out, tl.sum(place.to(tl.int64) * i, 0))


def tie_position(x, initial, threshold, rank):
    n, out = x.numel(), torch.empty(1, dtype=torch.int64, device=x.device)
    counts = torch.empty(triton.cdiv(n, BLOCK), dtype=torch.int64, device=x.device)
    with on(x):
        tie_count_kernel[(counts.numel(),)](x, initial, threshold, counts, n, BLOCK=BLOCK, **OPTIONS)
        through = counts.cumsum(0)
        block = torch.searchsorted(through, rank).clamp(max=counts.numel() - 1)
        inner = rank - (through[block] - counts[block])
        tie_place_kernel[(1,)](x, initial, threshold, block, inner, out, n, BLOCK=BLOCK, **OPTIONS)
    return out


@triton.jit
def ties_update_kernel(
    table, theta, initial, thresholds, cuts, weight, unit, positive, negative, more, less, mass,
    ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = table + tl.program_id(0).to(tl.int64) * 3
    start, stop, segment = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if ALIGNED:
        start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
    weight, unit = tl.cast(weight, tl.float32), tl.cast(unit, tl.float32)
    i = start + tl.arange(0, SIZE)
    inside = i < stop
    d, b = magnitudes(theta, initial, i, inside)
    threshold = tl.load(thresholds + segment)
    kept = (b > threshold) | ((b == threshold) & (i <= tl.load(cuts + segment)))
    d = tl.where(kept, d, 0.0)
    up, down = (d > 0.0) | (d != d), d < 0.0
    store(positive, i, load(positive, i, inside) + tl.where(up, weight * d, 0.0), inside, None)
    store(negative, i, load(negative, i, inside) + tl.where(down, weight * d, 0.0), inside, None)
    store(more, i, load(more, i, inside) + tl.where(up, unit, 0.0), inside, None)
    store(less, i, load(less, i, inside) + tl.where(down, unit, 0.0), inside, None)
    if mass is not None:
        store(mass, i, load(mass, i, inside) + d, inside, None)


def update(theta, initial, threshold, cut, bounds, weight, unit, *state):
    table, aligned = chunks_on(bounds, _SIZE, theta.device)
    if len(table):
        with on(theta):
            ties_update_kernel[(len(table),)](
                table, theta, initial, threshold, cut, weight, unit, *state, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS
            )


@triton.jit
def ties_finalize_kernel(
    positive, negative, more, less, mass, initial, out, n, zero, zero_pointer, scale, scale_pointer, nonfinite,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    p, q = load(positive, i, inside), load(negative, i, inside)
    sums = p + q
    if mass is not None:
        sums = load(mass, i, inside)
    up = tl.where(sums == 0.0, scalar(zero, zero_pointer) + tl.zeros_like(sums), sums) >= 0.0
    value, divisor = tl.where(up, p, q), tl.where(up, load(more, i, inside), load(less, i, inside))
    value = scalar(scale, scale_pointer) * tl.where(sums == sums, value / tl.where(divisor != 0.0, divisor, 1.0), sums)
    if initial is not None:
        value += load(initial, i, inside)
    store(out, i, value, inside, nonfinite)


def finalize(positive, negative, more, less, mass, initial, zero, scale, out, nonfinite):
    n, nonfinite = out.numel(), cleared(nonfinite)
    if n:
        with on(out):
            ties_finalize_kernel[(triton.cdiv(n, BLOCK),)](
                positive, negative, more, less, mass, initial, out, n, *pointer(zero, out), *pointer(scale, out), nonfinite,
                BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
