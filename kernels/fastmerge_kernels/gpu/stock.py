"""Triton kernels of `stock.py`: one program per chunk of a segment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..segments import chunk_rows_on, first_rows, inverse_roots
from .launch import BLOCK, OPTIONS, cleared, load, on, store
from .lists import listed, model, row_of

_SIZE = 2 * BLOCK
_SPAN = 8 * _SIZE  # entries of a chunk that ends in one row of sums


@triton.jit
def span_of(chunks, ALIGNED: tl.constexpr):
    """(start, stop, segment) of this program's chunk."""
    row = chunks + tl.program_id(0).to(tl.int64) * 3
    start, stop = tl.load(row), tl.load(row + 1)
    if ALIGNED:
        start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
    return start, stop, tl.load(row + 2)


@triton.jit
def stock_norms_kernel(chunks, x, initial, rows, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    start, stop, _ = span_of(chunks, ALIGNED)
    total = tl.zeros([SIZE], tl.float32)
    for first in range(start, stop, SIZE):
        i = first + tl.arange(0, SIZE)
        inside = i < stop
        d = load(x, i, inside)
        if initial is not None:
            d -= load(initial, i, inside)
        total += d * d
    tl.store(rows + tl.program_id(0), tl.sum(total.to(tl.float64), 0))


@triton.jit
def stock_sums_kernel(rows, first, out, BLOCK: tl.constexpr):
    """out[s] = sum of rows first[s] .. first[s + 1] - 1, one program per segment."""
    segment = tl.program_id(0)
    start, stop = tl.load(first + segment), tl.load(first + segment + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for base in range(start, stop, BLOCK):
        row = base + tl.arange(0, BLOCK)
        total += tl.load(rows + row, mask=row < stop, other=0.0)
    tl.store(out + segment, tl.sum(total, 0))


def norms(x, initial, bounds):
    out = torch.zeros(len(bounds) - 1, dtype=torch.float64, device=x.device)
    chunks, aligned = chunk_rows_on(bounds, _SPAN, x.device)
    if len(chunks):
        rows = torch.empty(len(chunks), dtype=torch.float64, device=x.device)
        with on(x):
            stock_norms_kernel[(len(chunks),)](chunks, x, initial, rows, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS)
            stock_sums_kernel[(len(out),)](rows, first_rows(bounds, _SPAN, x.device), out, BLOCK=1024, **OPTIONS)
    return out


@triton.jit(do_not_specialize=["count"])
def stock_units_kernel(
    chunks, models, like, count, initial, scales, segments, rows,
    SAME: tl.constexpr, MODELS_ALIGNED: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """rows[chunk] = ||sum_t scales[t, segment] (theta_t - initial)||^2."""
    start, stop, segment = span_of(chunks, ALIGNED)
    square = tl.zeros([SIZE], tl.float32)
    for first in range(start, stop, SIZE):
        i = first + tl.arange(0, SIZE)
        inside = i < stop
        base, total = load(initial, i, inside), tl.zeros([SIZE], tl.float32)
        for t in range(count):
            d = model(models, like, count, t, i, inside, SAME, MODELS_ALIGNED) - base
            total += tl.load(scales + t * segments + segment) * d
        square += total * total
    tl.store(rows + tl.program_id(0), tl.sum(square.to(tl.float64), 0))


def squares(models, initial, bounds):
    every = torch.stack([norms(x, initial, bounds) for x in models])
    (chunks, aligned), out = chunk_rows_on(bounds, _SPAN, initial.device), torch.zeros_like(every[0])
    if len(chunks):
        addresses, like, count, same, models_aligned = listed(models)
        rows = torch.empty(len(chunks), dtype=torch.float64, device=initial.device)
        with on(initial):
            stock_units_kernel[(len(chunks),)](
                chunks, addresses, like, count, initial, inverse_roots(every), len(out), rows,
                SAME=same, MODELS_ALIGNED=models_aligned, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS,
            )  # fmt: skip
            stock_sums_kernel[(len(out),)](rows, first_rows(bounds, _SPAN, initial.device), out, BLOCK=1024, **OPTIONS)
    return torch.stack([out, (every != 0).double().sum(0)])


@triton.jit
def stock_update_kernel(chunks, scales, theta, initial, total, units, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    i, inside, segment = row_of(chunks, ALIGNED, SIZE)
    d = load(theta, i, inside)
    if initial is not None:
        d -= load(initial, i, inside)
    store(total, i, load(total, i, inside) + d, inside, None)
    store(units, i, load(units, i, inside) + tl.load(scales + segment) * d, inside, None)


def update(theta, initial, norms, bounds, total, units):
    chunks, aligned = chunk_rows_on(bounds, _SIZE, theta.device)
    scales = inverse_roots(norms)
    if len(chunks):
        with on(theta):
            stock_update_kernel[(len(chunks),)](
                chunks, scales, theta, initial, total, units, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS
            )


@triton.jit
def stock_finalize_kernel(chunks, factors, total, initial, out, nonfinite, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    i, inside, segment = row_of(chunks, ALIGNED, SIZE)
    store(out, i, load(initial, i, inside) + tl.load(factors + segment) * load(total, i, inside), inside, nonfinite)


def finalize(total, initial, factors, bounds, out, nonfinite):
    chunks, aligned = chunk_rows_on(bounds, _SIZE, out.device)
    nonfinite = cleared(nonfinite)
    if len(chunks):
        with on(out):
            stock_finalize_kernel[(len(chunks),)](
                chunks, factors.float(), total, initial, out, nonfinite, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS
            )
