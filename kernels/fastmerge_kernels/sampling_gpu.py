"""Triton kernels of `sampling.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import OPTIONS, cleared, int32, load, on, store
from .philox import threshold
from .philox_gpu import counters, key, lanes, positions, tiles, words

_FREE = ["first_tile", "k0", "k1", "s0", "s1", "drop", "count"]  # values for which no new kernel shall be compiled


@triton.jit(do_not_specialize=_FREE)
def random_mix_kernel(
    addresses,
    like,
    out,
    n,
    count,
    first_tile,
    shift,
    k0,
    k1,
    s0,
    s1,
    nonfinite,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`addresses` [count] int64: where the models lie; `like` is the first of them and gives their type."""
    span = tl.program_id(0).to(tl.int64)
    base = span * (LANES * 4) - shift
    u = words(counters(first_tile + span * (LANES // 128), LANES), k0, k1, s0, s1, 2)
    for run in tl.static_range(4):
        i = base + positions(LANES) + run * 128
        inside = (i >= 0) & (i < n)
        chosen = tl.umulhi(u[run], tl.zeros_like(u[run]) + count.to(tl.uint32))
        value = tl.zeros([LANES], tl.float32)
        for t in range(count):
            model = tl.load(addresses + t).to(like.dtype)
            if ALIGNED:
                model = tl.multiple_of(model, 16)
            value = tl.where(chosen == t, load(model, i, inside), value)
        store(out, i, value, inside, nonfinite)


@triton.jit(do_not_specialize=_FREE)
def dare_kernel(theta, initial, out, n, scale, drop, first_tile, shift, k0, k1, s0, s1, nonfinite, LANES: tl.constexpr):
    span = tl.program_id(0).to(tl.int64)
    base = span * (LANES * 4) - shift
    scale = tl.cast(scale, tl.float32)
    u = words(counters(first_tile + span * (LANES // 128), LANES), k0, k1, s0, s1, 3)
    for run in tl.static_range(4):
        i = base + positions(LANES) + run * 128
        inside = (i >= 0) & (i < n)
        value = load(theta, i, inside)
        if initial is not None:
            value -= load(initial, i, inside)
        store(out, i, tl.where(u[run] >= drop.to(tl.uint32, bitcast=True), scale * value, 0.0), inside, nonfinite)


def random_mix(models, seed, stream, offset, out, nonfinite):
    n, size, nonfinite = out.numel(), lanes(models[0], out), cleared(nonfinite)
    if n == 0:
        return
    first, shift, count = tiles(offset, n)
    addresses = torch.tensor([model.data_ptr() for model in models], dtype=torch.int64).to(out.device)
    aligned = all(model.data_ptr() % 16 == 0 for model in models)
    position = (first, shift, *key(seed, stream))
    with on(out):
        random_mix_kernel[(triton.cdiv(count * 128, size),)](
            addresses, models[0], out, n, len(models), *position, nonfinite, LANES=size, ALIGNED=aligned, **OPTIONS
        )


def dare_delta(theta, initial, p, seed, stream, offset, out, nonfinite):
    n, size, nonfinite = out.numel(), lanes(theta, initial, out), cleared(nonfinite)
    if n == 0:
        return
    first, shift, count = tiles(offset, n)
    numbers = (1 / (1 - p), int32(threshold(p)), first, shift, *key(seed, stream))
    with on(out):
        dare_kernel[(triton.cdiv(count * 128, size),)](
            theta, initial, out, n, *numbers, nonfinite, LANES=size, **OPTIONS
        )
