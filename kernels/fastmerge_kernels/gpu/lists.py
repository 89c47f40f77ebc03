"""Triton kernels of `lists.py`: a program takes a block of the output and loops over the models."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from ..philox import threshold
from ..segments import chunk_rows_on
from .launch import BLOCK, OPTIONS, cleared, int32, load, on, pieces, scalar, scalar_arguments, store, table
from .philox import counters, key, lanes, positions, tiles, words

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def listed(models):
    """For `model`: (addresses int64 [T] on the device, with the dtypes' codes [2 T] unless all are the same; first model; T;
    whether all have one dtype; whether all are aligned)."""
    same = all(x.dtype == models[0].dtype for x in models)
    words = [x.data_ptr() for x in models] + ([] if same else [_CODES[x.dtype] for x in models])
    addresses = table(np.array(words, np.int64), models[0].device)
    return addresses, models[0], len(models), same, all(x.data_ptr() % 16 == 0 for x in models)


def numbers(values, like):
    return table(np.array(values, np.float32), like.device)


@triton.jit
def model(addresses, like, count, t, i, inside, SAME: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries of the t-th model as fp32; SAME: all have the dtype of `like`."""
    address = tl.load(addresses + t)
    if SAME:
        typed = address.to(like.dtype)
        if ALIGNED:
            typed = tl.multiple_of(typed, 16)
        value = load(typed, i, inside)
    else:
        code = tl.load(addresses + count + t)
        value = tl.zeros(i.shape, tl.float32)
        if code == 0:
            value = load(address.to(tl.pointer_type(tl.float32)), i, inside)
        elif code == 1:
            value = load(address.to(tl.pointer_type(tl.bfloat16)), i, inside)
        else:
            value = load(address.to(tl.pointer_type(tl.float16)), i, inside)
    return value


@triton.jit
def row_of(chunks, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    """(indices of this program's chunk, which of them exist, its segment)."""
    row = chunks + tl.program_id(0).to(tl.int64) * 3
    start, stop = tl.load(row), tl.load(row + 1)
    if ALIGNED:
        start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
    i = start + tl.arange(0, SIZE)
    return i, i < stop, tl.load(row + 2)


@triton.jit(do_not_specialize=["count"])
def weighted_sum_kernel(
    chunks, addresses, like, count, weights, segments, initial, out, nonfinite,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, CHUNKS_ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i, inside, segment = row_of(chunks, CHUNKS_ALIGNED, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    if initial is not None:
        base = load(initial, i, inside)
    for t in range(count):
        x = model(addresses, like, count, t, i, inside, SAME, ALIGNED)
        if initial is not None:
            x -= base
        total += tl.load(weights + t * segments + segment) * x
    if initial is not None:
        total += base
    store(out, i, total, inside, nonfinite)


def weighted_sum(models, weights, initial, bounds, out, nonfinite):
    chunks, chunks_aligned = chunk_rows_on(bounds, BLOCK, out.device)
    addresses, like, count, same, aligned = listed(models)
    nonfinite = cleared(nonfinite)
    if len(chunks):
        with on(out):
            weighted_sum_kernel[(len(chunks),)](
                chunks, addresses, like, count, weights, len(bounds) - 1, initial, out, nonfinite,
                SAME=same, ALIGNED=aligned, CHUNKS_ALIGNED=chunks_aligned, SIZE=BLOCK, **OPTIONS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def magmax_merge_kernel(
    addresses, like, count, initial, out, n, scale, scale_pointer, nonfinite,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    base, kept = load(initial, i, inside), tl.zeros([BLOCK], tl.float32)
    for t in range(count):
        d = model(addresses, like, count, t, i, inside, SAME, ALIGNED) - base
        kept = tl.where((tl.abs(d) < tl.abs(kept)) | (kept != kept), kept, d)
    store(out, i, base + scalar(scale, scale_pointer) * kept, inside, nonfinite)


def magmax(models, initial, scale, out, nonfinite):
    nonfinite = cleared(nonfinite)
    if out.numel():
        number = scalar_arguments(scale, out)
        with on(out):
            for start, stop, (target, base, *parts) in pieces(out, initial, *models):
                addresses, like, count, same, aligned = listed(parts)
                magmax_merge_kernel[(triton.cdiv(stop - start, BLOCK),)](
                    addresses, like, count, base, target, stop - start, *number, nonfinite,
                    SAME=same, ALIGNED=aligned, BLOCK=BLOCK, **OPTIONS,
                )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def fisher_average_kernel(
    addresses, like, fishers, like_fisher, count, weights, out, n, nonfinite,
    SAME: tl.constexpr, SAME_FISHERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    above, below, plain = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for t in range(count):
        w = tl.load(weights + t)
        x = model(addresses, like, count, t, i, inside, SAME, ALIGNED)
        v = w * model(fishers, like_fisher, count, t, i, inside, SAME_FISHERS, ALIGNED)
        above += v * x
        below += v
        plain += w * x
    known = below != 0.0
    store(out, i, tl.where(known, above / tl.where(known, below, 1.0), plain), inside, nonfinite)


def fisher(models, fishers, weights, out, nonfinite):
    nonfinite = cleared(nonfinite)
    if out.numel():
        with on(out):
            for start, stop, (target, *parts) in pieces(out, *models, *fishers):
                addresses, like, count, same, aligned = listed(parts[: len(models)])
                others, like_fisher, _, same_fishers, aligned_fishers = listed(parts[len(models) :])
                fisher_average_kernel[(triton.cdiv(stop - start, BLOCK),)](
                    addresses, like, others, like_fisher, count, weights, target, stop - start, nonfinite,
                    SAME=same, SAME_FISHERS=same_fishers, ALIGNED=aligned and aligned_fishers, BLOCK=BLOCK, **OPTIONS,
                )  # fmt: skip


@triton.jit
def kept(addresses, like, count, t, i, n, base, w, u, drop, SAME: tl.constexpr, ALIGNED: tl.constexpr):
    """w (theta_t - initial) where the word u keeps the entry, else 0."""
    x = model(addresses, like, count, t, i, (i >= 0) & (i < n), SAME, ALIGNED)
    return tl.where(u >= drop, w * (x - base), 0.0)


@triton.jit(do_not_specialize=["count", "first_tile", "drop"])
def dare_merge_kernel(
    addresses, like, count, weights, keys, initial, out, n, drop, first_tile, shift, nonfinite,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A counter's four words serve four runs of 128 entries, so a program sums four blocks beside each other."""
    span = tl.program_id(0).to(tl.int64)
    i0 = span * (LANES * 4) - shift + positions(LANES)
    i1, i2, i3 = i0 + 128, i0 + 256, i0 + 384
    in0, in1, in2, in3 = (i0 >= 0) & (i0 < n), (i1 >= 0) & (i1 < n), (i2 >= 0) & (i2 < n), (i3 >= 0) & (i3 < n)
    b0, b1, b2, b3 = load(initial, i0, in0), load(initial, i1, in1), load(initial, i2, in2), load(initial, i3, in3)
    counter = counters(first_tile + span * (LANES // 128), b0, LANES)
    s0, s1, s2, s3 = tl.zeros_like(b0), tl.zeros_like(b0), tl.zeros_like(b0), tl.zeros_like(b0)
    drop = drop.to(tl.uint32, bitcast=True)
    for t in range(count):
        k, w = keys + t * 4, tl.load(weights + t)
        u0, u1, u2, u3 = words(counter, tl.load(k), tl.load(k + 1), tl.load(k + 2), tl.load(k + 3), 3)
        s0 += kept(addresses, like, count, t, i0, n, b0, w, u0, drop, SAME, ALIGNED)
        s1 += kept(addresses, like, count, t, i1, n, b1, w, u1, drop, SAME, ALIGNED)
        s2 += kept(addresses, like, count, t, i2, n, b2, w, u2, drop, SAME, ALIGNED)
        s3 += kept(addresses, like, count, t, i3, n, b3, w, u3, drop, SAME, ALIGNED)
    store(out, i0, b0 + s0, in0, nonfinite)
    store(out, i1, b1 + s1, in1, nonfinite)
    store(out, i2, b2 + s2, in2, nonfinite)
    store(out, i3, b3 + s3, in3, nonfinite)


def dare(models, weights, p, initial, seed, subsequence, offset, out, nonfinite):
    size, nonfinite = lanes(*models, initial, out), cleared(nonfinite)
    if out.numel() == 0:
        return
    keys = table(np.array([key(seed, subsequence + t) for t in range(len(models))], np.int32), out.device)
    shares, drop = weights * (1 / (1 - p)), int32(threshold(p))
    with on(out):
        for start, stop, (target, base, *parts) in pieces(out, initial, *models, offset=offset):
            first, shift, tile_count = tiles(offset + start, stop - start)
            addresses, like, count, same, aligned = listed(parts)
            dare_merge_kernel[(triton.cdiv(tile_count * 128, size),)](
                addresses, like, count, shares, keys, base, target, stop - start, drop, first, shift, nonfinite,
                SAME=same, ALIGNED=aligned, LANES=size, **OPTIONS,
            )  # fmt: skip
