"""Triton kernels of `threshold.py`: a histogram of 8 bits a pass, kept on the chip, added to global memory per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..segments import chunk_rows_on, first_rows
from ..threshold import NOTHING, magnitude_digit
from .launch import OPTIONS, load, on
from .lists import row_of

SIZE = 4096  # entries of a program: its 256 atomics are few against its loads
DIGITS = (8, 8, 8, 7)


@triton.jit
def magnitudes(x, initial, i, inside):
    """(x - initial, the 31 bits of its magnitude)."""
    value = load(x, i, inside)
    if initial is not None:
        value -= load(initial, i, inside)
    return value, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["upper", "lower"])
def histogram_kernel(
    chunks, x, initial, prefix, counts, upper, lower,
    BINS: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i, inside, segment = row_of(chunks, ALIGNED, SIZE)
    _, b = magnitudes(x, initial, i, inside)
    if prefix is not None:
        inside = inside & ((b >> upper) == tl.load(prefix + segment))
    found = tl.histogram((b >> lower) & (BINS - 1), BINS, mask=inside)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + segment * BINS + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")


def histogram(x, initial, prefix, known, bits, bounds):
    counts = torch.zeros(len(bounds) - 1, 1 << bits, dtype=torch.int64, device=x.device)
    chunks, aligned = chunk_rows_on(bounds, SIZE, x.device)
    if len(chunks):
        with on(x):
            histogram_kernel[(len(chunks),)](
                chunks, x, initial, prefix, counts, 31 - known, 31 - known - bits,
                BINS=1 << bits, ALIGNED=aligned, SIZE=SIZE, **OPTIONS,
            )  # fmt: skip
    return counts


@triton.jit
def tie_count_kernel(chunks, x, initial, thresholds, counts, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    i, inside, segment = row_of(chunks, ALIGNED, SIZE)
    _, b = magnitudes(x, initial, i, inside)
    tl.store(counts + tl.program_id(0), tl.sum((inside & (b == tl.load(thresholds + segment))).to(tl.int64), 0))


@triton.jit
def tie_place_kernel(chunks, x, initial, thresholds, chunk, rank, out, SIZE: tl.constexpr):
    """out[s] = index of the rank[s]-th tie of chunk[s]; one program per segment."""
    s = tl.program_id(0)
    row = chunks + tl.load(chunk + s) * 3
    i = tl.load(row) + tl.arange(0, SIZE)
    inside = i < tl.load(row + 1)
    _, b = magnitudes(x, initial, i, inside)
    tie = (inside & (b == tl.load(thresholds + s))).to(tl.int32)
    place = tie * (tl.cumsum(tie, 0) == tl.load(rank + s).to(tl.int32)).to(tl.int32)
    tl.store(out + s, tl.sum(place.to(tl.int64) * i, 0))


def tie_positions(x, initial, thresholds, rank, bounds):
    """int64 [segments]: index of the rank-th entry of each segment whose magnitude has the threshold's bits."""
    (chunks, aligned), out = chunk_rows_on(bounds, SIZE, x.device), torch.zeros_like(rank)
    counts = torch.empty(len(chunks), dtype=torch.int64, device=x.device)
    tie_count_kernel[(len(chunks),)](chunks, x, initial, thresholds, counts, ALIGNED=aligned, SIZE=SIZE, **OPTIONS)
    through = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    target = through[first_rows(bounds, SIZE, x.device)[:-1]] + rank
    chunk = torch.searchsorted(through, target).clamp(1, len(chunks)) - 1
    tie_place_kernel[(len(out),)](
        chunks, x, initial, thresholds, chunk, target - through[chunk], out, SIZE=SIZE, **OPTIONS
    )
    return out


def threshold(x, initial, counts, bounds, exact):
    wanted = torch.tensor(counts, dtype=torch.int64).to(x.device)
    cuts = torch.full_like(wanted, x.numel())
    thresholds, known, rank = torch.zeros_like(wanted, dtype=torch.int32), 0, wanted.clone()
    if x.numel():
        with on(x):
            for bits in DIGITS:
                found = histogram(x, initial, thresholds if known else None, known, bits, bounds)
                digit, rank = magnitude_digit(found, rank)
                thresholds, known = thresholds << bits | digit, known + bits
            if exact:
                cuts = tie_positions(x, initial, thresholds, rank, bounds)
    return thresholds.masked_fill_(wanted == 0, NOTHING), cuts.masked_fill_(wanted == 0, -1)
