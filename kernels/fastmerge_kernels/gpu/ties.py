"""Triton kernels of `ties.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..segments import chunk_rows_on
from .launch import BLOCK, OPTIONS, cleared, load, on, scalar, scalar_arguments, store
from .lists import listed, model, row_of
from .threshold import magnitudes

_SIZE = 2 * BLOCK  # entries of a chunk in `update`


@triton.jit
def ties_update_kernel(
    chunks, theta, initial, thresholds, cuts, weight, unit, positive, negative, more, less, mass,
    ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = chunks + tl.program_id(0).to(tl.int64) * 3
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
    chunks, aligned = chunk_rows_on(bounds, _SIZE, theta.device)
    if len(chunks):
        with on(theta):
            ties_update_kernel[(len(chunks),)](
                chunks, theta, initial, threshold, cut, weight, unit, *state, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS
            )


@triton.jit
def ties_signs_kernel(positive, negative, mass, signs, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        i = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        if mass is None:
            sums = load(positive, i, inside) + load(negative, i, inside)
        else:
            sums = load(mass, i, inside)
        total += (sums > 0.0).to(tl.int32) - (sums < 0.0).to(tl.int32)
    tl.atomic_add(signs, tl.sum(total, 0).to(tl.int64), sem="relaxed")  # integers: the order does not matter


def signs(positive, negative, mass):
    n, steps, out = positive.numel(), 8, torch.zeros(1, dtype=torch.int64, device=positive.device)
    if n:
        with on(positive):
            ties_signs_kernel[(triton.cdiv(n, BLOCK * steps),)](
                positive, negative, mass, out, n, BLOCK=BLOCK, STEPS=steps, **OPTIONS
            )
    return out


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
                positive, negative, more, less, mass, initial, out, n, *scalar_arguments(zero, out),
                *scalar_arguments(scale, out), nonfinite,
                BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def ties_merge_kernel(
    chunks, addresses, like, count, initial, thresholds, cuts, weights, units, segments, out, zero, scale, scale_pointer,
    signs, open, nonfinite, UNWEIGHTED: tl.constexpr, DECIDED: tl.constexpr, AGAIN: tl.constexpr,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, CHUNKS_ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`signs` [1] receives the sum of the elected signs, `open` [programs] how many entries `zero` decides. DECIDED: they
    come from an earlier launch, whose signs decide now. AGAIN: only where that changes what the earlier launch wrote."""
    sign, needed = tl.cast(zero, tl.float32), True
    if DECIDED:
        sign = tl.where(tl.load(signs) < 0, -1.0, 1.0)
    if AGAIN:
        needed = (sign < 0.0) & (tl.load(open + tl.program_id(0)) > 0)
    if needed:
        i, inside, segment = row_of(chunks, CHUNKS_ALIGNED, SIZE)
        base = load(initial, i, inside)
        p, q, mass = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
        m, n = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
        for t in range(count):
            d = model(addresses, like, count, t, i, inside, SAME, ALIGNED) - base
            b, limit = d.to(tl.int32, bitcast=True) & 0x7FFFFFFF, tl.load(thresholds + t * segments + segment)
            kept = (b > limit) | ((b == limit) & (i <= tl.load(cuts + t * segments + segment)))
            d = tl.where(kept, d, 0.0)
            w, unit = tl.load(weights + t), tl.load(units + t)
            up, down = (d > 0.0) | (d != d), d < 0.0
            p += tl.where(up, w * d, 0.0)
            q += tl.where(down, w * d, 0.0)
            m += tl.where(up, unit, 0.0)
            n += tl.where(down, unit, 0.0)
            if UNWEIGHTED:
                mass += d
        if not UNWEIGHTED:
            mass = p + q
        if signs is not None and not DECIDED:
            elected = (mass > 0.0).to(tl.int32) - (mass < 0.0).to(tl.int32)
            tl.atomic_add(signs, tl.sum(elected, 0).to(tl.int64), sem="relaxed")
            tl.store(open + tl.program_id(0), tl.sum(((mass == 0.0) & ((p != 0.0) | (q != 0.0))).to(tl.int32), 0))
        if out is not None:
            up = tl.where(mass == 0.0, sign, mass) >= 0.0
            value, divisor = tl.where(up, p, q), tl.where(up, m, n)
            value = tl.where(mass == mass, value / tl.where(divisor != 0.0, divisor, 1.0), mass)
            store(out, i, base + scalar(scale, scale_pointer) * value, inside, nonfinite)


def merge(models, initial, threshold, cut, bounds, weights, units, unweighted, zero, scale, out, nonfinite):
    chunks, chunks_aligned = chunk_rows_on(bounds, BLOCK, out.device)
    addresses, like, count, same, aligned = listed(models)
    scale, nonfinite = scalar_arguments(scale, out), cleared(nonfinite)
    if not len(chunks):
        return

    def launch(target, signs, open, bad, decided, again):
        ties_merge_kernel[(len(chunks),)](
            chunks, addresses, like, count, initial, threshold, cut, weights, units, len(bounds) - 1, target, 1.0, *scale,
            signs, open, bad, UNWEIGHTED=unweighted, DECIDED=decided, AGAIN=again,
            SAME=same, ALIGNED=aligned, CHUNKS_ALIGNED=chunks_aligned, SIZE=BLOCK, **OPTIONS,
        )  # fmt: skip

    with on(out):
        if zero != "majority":
            launch(out, None, None, nonfinite, False, False)
            return
        signs = torch.zeros(1, dtype=torch.int64, device=out.device)
        open = torch.empty(len(chunks), dtype=torch.int32, device=out.device)
        if out.data_ptr() in {
            x.data_ptr() for x in (*models, initial)
        }:  # the signs first: a second launch reads the inputs
            launch(None, signs, open, None, False, False)
            launch(out, signs, open, nonfinite, True, False)
        else:
            launch(out, signs, open, nonfinite, False, False)
            launch(out, signs, open, None, True, True)
