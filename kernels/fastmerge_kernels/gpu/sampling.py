"""Triton kernels of `sampling.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..philox import threshold
from .launch import OPTIONS, cleared, int32, load, on, pieces, store
from .lists import listed, model
from .philox import counters, key, lanes, positions, tiles, words

_FREE = ["first_tile", "k0", "k1", "s0", "s1", "drop", "count"]  # values for which no new kernel shall be compiled


@triton.jit(do_not_specialize=_FREE)
def random_mix_kernel(
    addresses, like, out, n, count, first_tile, shift, k0, k1, s0, s1, nonfinite,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0).to(tl.int64)
    base = span * (LANES * 4) - shift
    for run in tl.static_range(4):
        i = base + positions(LANES) + run * 128
        inside = (i >= 0) & (i < n)
        value = model(addresses, like, count, 0, i, inside, SAME, ALIGNED)
        if run == 0:
            u = words(counters(first_tile + span * (LANES // 128), value, LANES), k0, k1, s0, s1, 2)
        chosen = ((u[run].to(tl.uint64) * count.to(tl.uint64)) >> 32).to(tl.int32)
        for t in range(1, count):
            value = tl.where(chosen == t, model(addresses, like, count, t, i, inside, SAME, ALIGNED), value)
        store(out, i, value, inside, nonfinite)


@triton.jit(do_not_specialize=_FREE)
def dare_kernel(theta, initial, out, n, scale, drop, first_tile, shift, k0, k1, s0, s1, nonfinite, LANES: tl.constexpr):
    span = tl.program_id(0).to(tl.int64)
    base = span * (LANES * 4) - shift
    scale = tl.cast(scale, tl.float32)
    for run in tl.static_range(4):
        i = base + positions(LANES) + run * 128
        inside = (i >= 0) & (i < n)
        value = load(theta, i, inside)
        if run == 0:
            u = words(counters(first_tile + span * (LANES // 128), value, LANES), k0, k1, s0, s1, 3)
        if initial is not None:
            value -= load(initial, i, inside)
        store(out, i, tl.where(u[run] >= drop.to(tl.uint32, bitcast=True), scale * value, 0.0), inside, nonfinite)


def random_mix(models, seed, subsequence, offset, out, nonfinite):
    size, nonfinite = lanes(*models, out), cleared(nonfinite)
    if out.numel() == 0:
        return
    with on(out):
        for start, stop, (target, *parts) in pieces(out, *models, offset=offset):
            first, shift, tile_count = tiles(offset + start, stop - start)
            addresses, like, count, same, aligned = listed(parts)
            random_mix_kernel[(triton.cdiv(tile_count * 128, size),)](
                addresses, like, target, stop - start, count, first, shift, *key(seed, subsequence), nonfinite,
                SAME=same, ALIGNED=aligned, LANES=size, **OPTIONS,
            )  # fmt: skip


def dare_delta(theta, initial, p, seed, subsequence, offset, out, nonfinite):
    size, nonfinite = lanes(theta, initial, out), cleared(nonfinite)
    if out.numel() == 0:
        return
    numbers, words = (1 / (1 - p), int32(threshold(p))), key(seed, subsequence)
    with on(out):
        for start, stop, vectors in pieces(theta, initial, out, offset=offset):
            first, shift, count = tiles(offset + start, stop - start)
            dare_kernel[(triton.cdiv(count * 128, size),)](
                *vectors, stop - start, *numbers, first, shift, *words, nonfinite, LANES=size, **OPTIONS
            )


@triton.jit(do_not_specialize=["first_tile", "k0", "k1", "s0", "s1", "limit"])
def random_replace_kernel(theta, kept, n, limit, first_tile, shift, k0, k1, s0, s1, nonfinite, LANES: tl.constexpr):
    """`limit`: int64, an entry is replaced where its word is below."""
    span = tl.program_id(0).to(tl.int64)
    base = span * (LANES * 4) - shift
    for run in tl.static_range(4):
        i = base + positions(LANES) + run * 128
        inside = (i >= 0) & (i < n)
        new, old = load(theta, i, inside), load(kept, i, inside)
        if run == 0:
            u = words(counters(first_tile + span * (LANES // 128), new, LANES), k0, k1, s0, s1, 2)
        value = tl.where(u[run].to(tl.int64) < limit, new, old)
        store(kept, i, value, inside, nonfinite)


def random_replace(theta, p, seed, subsequence, offset, kept, nonfinite):
    size, nonfinite = lanes(theta, kept), cleared(nonfinite)
    if kept.numel() == 0:
        return
    with on(kept):
        for start, stop, vectors in pieces(theta, kept, offset=offset):
            first, shift, count = tiles(offset + start, stop - start)
            numbers = (stop - start, threshold(p), first, shift, *key(seed, subsequence))
            random_replace_kernel[(triton.cdiv(count * 128, size),)](
                *vectors, *numbers, nonfinite, LANES=size, **OPTIONS
            )
