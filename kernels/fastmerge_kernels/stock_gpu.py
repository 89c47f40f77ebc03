"""Triton kernels of `stock.py`: one program per chunk of a segment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import BLOCK, OPTIONS, cleared, load, on, store
from .segments import chunks_on, first_rows

_SIZE = 2 * BLOCK


@triton.jit
def chunk(table, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    """(indices of this program's chunk, which of them exist, its segment)."""
    row = table + tl.program_id(0).to(tl.int64) * 3
    start, stop = tl.load(row), tl.load(row + 1)
    if ALIGNED:
        start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
    i = start + tl.arange(0, SIZE)
    return i, i < stop, tl.load(row + 2)


@triton.jit
def stock_norms_kernel(table, x, initial, rows, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    i, inside, _ = chunk(table, ALIGNED, SIZE)
    d = load(x, i, inside)
    if initial is not None:
        d -= load(initial, i, inside)
    tl.store(rows + tl.program_id(0), tl.sum((d * d).to(tl.float64), 0))


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
    table, aligned = chunks_on(bounds, _SIZE, x.device)
    if len(table):
        rows = torch.empty(len(table), dtype=torch.float64, device=x.device)
        with on(x):
            stock_norms_kernel[(len(table),)](table, x, initial, rows, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS)
            stock_sums_kernel[(len(out),)](rows, first_rows(bounds, _SIZE, x.device), out, BLOCK=256, **OPTIONS)
    return out


@triton.jit
def stock_update_kernel(table, scales, theta, initial, total, units, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    i, inside, segment = chunk(table, ALIGNED, SIZE)
    d = load(theta, i, inside)
    if initial is not None:
        d -= load(initial, i, inside)
    store(total, i, load(total, i, inside) + d, inside, None)
    store(units, i, load(units, i, inside) + tl.load(scales + segment) * d, inside, None)


def update(theta, initial, norms, bounds, total, units):
    table, aligned = chunks_on(bounds, _SIZE, theta.device)
    scales = torch.where(norms == 0, 0.0, norms.rsqrt()).float()
    if len(table):
        with on(theta):
            stock_update_kernel[(len(table),)](
                table, scales, theta, initial, total, units, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS
            )


@triton.jit
def stock_merge_kernel(table, factors, total, initial, out, nonfinite, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    i, inside, segment = chunk(table, ALIGNED, SIZE)
    store(out, i, load(initial, i, inside) + tl.load(factors + segment) * load(total, i, inside), inside, nonfinite)


def merge(total, initial, factors, bounds, out, nonfinite):
    table, aligned = chunks_on(bounds, _SIZE, out.device)
    nonfinite = cleared(nonfinite)
    if len(table):
        with on(out):
            stock_merge_kernel[(len(table),)](
                table, factors.float(), total, initial, out, nonfinite, ALIGNED=aligned, SIZE=_SIZE, **OPTIONS
            )
