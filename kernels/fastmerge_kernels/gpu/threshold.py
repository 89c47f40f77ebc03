"""Triton kernels of `threshold.py`.

Two passes over the vector. The first counts the upper 11 of the 31 bits of every magnitude, in a histogram on the chip that a
program adds to global memory. The second counts the next 10 bits of the candidates, the entries whose upper bits are those
of the k-th largest, and writes the candidates' lower bits to slots, CAPACITY per chunk. The last 10 bits and the number of
ties come from the slots. A chunk with more candidates than slots is read again instead, as among many equal values.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..segments import chunk_rows_on, first_rows
from ..threshold import NOTHING
from .launch import OPTIONS, load, on
from .lists import row_of

SIZE = 4096  # entries of a program: its atomics are few against its loads
CAPACITY = 512  # candidates of a chunk that have a slot
WARPS = 8


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
                BINS=1 << bits, ALIGNED=aligned, SIZE=SIZE, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return counts


@triton.jit
def digit_kernel(counts, ranks, bits, width, BINS: tl.constexpr):
    """`magnitude_digit` of one segment per program: appends the digit to `bits`, replaces the rank. Both in place."""
    segment, lane = tl.program_id(0), tl.arange(0, BINS)
    found = tl.load(counts + segment * BINS + BINS - 1 - lane)  # largest magnitudes first
    rank = tl.load(ranks + segment)
    place = tl.minimum(tl.sum((tl.cumsum(found, 0) < rank).to(tl.int32), 0), BINS - 1)
    tl.store(ranks + segment, rank - tl.sum(tl.where(lane < place, found, 0), 0))
    tl.store(bits + segment, (tl.load(bits + segment) << width) | (BINS - 1 - place))


def digit(counts, ranks, bits):
    bins = counts.shape[1]
    digit_kernel[(len(counts),)](counts, ranks, bits, bins.bit_length() - 1, BINS=bins, num_warps=WARPS, **OPTIONS)


@triton.jit
def collect_kernel(
    chunks, x, initial, prefix, counts, slots, filled,
    ALIGNED: tl.constexpr, SIZE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """counts [segments, 1024] += the candidates' bits 10 to 19; slots [chunks, CAPACITY] their lower 20 bits, in order;
    filled [chunks] how many there are."""
    i, inside, segment = row_of(chunks, ALIGNED, SIZE)
    _, b = magnitudes(x, initial, i, inside)
    inside = inside & ((b >> 20) == tl.load(prefix + segment))
    found = tl.histogram((b >> 10) & 1023, 1024, mask=inside)
    bins = tl.arange(0, 1024)
    tl.atomic_add(counts + segment * 1024 + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")
    chunk, candidate = tl.program_id(0).to(tl.int64), inside.to(tl.int32)
    place = tl.cumsum(candidate, 0) - 1
    tl.store(slots + chunk * CAPACITY + place, b & 0xFFFFF, mask=inside & (place < CAPACITY))
    tl.store(filled + chunk, tl.sum(candidate, 0))


@triton.jit
def candidates(part, count, start, stop, x, initial, upper, slots, CAPACITY: tl.constexpr):
    """(lower 20 bits of CAPACITY candidates of this chunk, which of them exist): from the slots, or from part `part`."""
    lane = tl.arange(0, CAPACITY)
    if count <= CAPACITY:
        inside = lane < count
        low = tl.load(slots + tl.program_id(0).to(tl.int64) * CAPACITY + lane, mask=inside, other=0)
    else:
        i = start + part * CAPACITY + lane
        inside = i < stop
        _, b = magnitudes(x, initial, i, inside)
        inside = inside & ((b >> 20) == upper)
        low = b & 0xFFFFF
    return low, inside


@triton.jit
def lowest_kernel(
    chunks, x, initial, bits, slots, filled, counts, SIZE: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """counts [segments, 1024] += the lowest 10 bits of the entries whose upper 21 bits are `bits`."""
    row, count = chunks + tl.program_id(0).to(tl.int64) * 3, tl.load(filled + tl.program_id(0))
    start, stop, segment = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    known, bins = tl.load(bits + segment), tl.arange(0, 1024)
    parts = tl.where(count <= CAPACITY, 1, SIZE // CAPACITY)
    for part in range(parts):
        low, inside = candidates(part, count, start, stop, x, initial, known >> 10, slots, CAPACITY)
        inside = inside & ((low >> 10) == (known & 1023))
        found = tl.histogram(low & 1023, 1024, mask=inside)
        tl.atomic_add(counts + segment * 1024 + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")


@triton.jit
def tie_count_kernel(
    chunks, x, initial, bits, slots, filled, ties, SIZE: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """ties [chunks]: how many entries have exactly the 31 `bits` of their segment."""
    row, count = chunks + tl.program_id(0).to(tl.int64) * 3, tl.load(filled + tl.program_id(0))
    start, stop, known = tl.load(row), tl.load(row + 1), tl.load(bits + tl.load(row + 2))
    total = tl.zeros([CAPACITY], tl.int32)
    parts = tl.where(count <= CAPACITY, 1, SIZE // CAPACITY)
    for part in range(parts):
        low, inside = candidates(part, count, start, stop, x, initial, known >> 20, slots, CAPACITY)
        total += (inside & (low == (known & 0xFFFFF))).to(tl.int32)
    tl.store(ties + tl.program_id(0), tl.sum(total, 0).to(tl.int64))


@triton.jit
def tie_place_kernel(chunks, x, initial, bits, chunk, rank, out, SIZE: tl.constexpr):
    """out[s] = index of the rank[s]-th tie of chunk[s]; one program per segment."""
    s = tl.program_id(0)
    row = chunks + tl.load(chunk + s) * 3
    i = tl.load(row) + tl.arange(0, SIZE)
    inside = i < tl.load(row + 1)
    _, b = magnitudes(x, initial, i, inside)
    tie = (inside & (b == tl.load(bits + s))).to(tl.int32)
    place = tie * (tl.cumsum(tie, 0) == tl.load(rank + s).to(tl.int32)).to(tl.int32)
    tl.store(out + s, tl.sum(place.to(tl.int64) * i, 0))


@functools.lru_cache(64)
def numbers_on(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [segments] on the device: copied there once, for the host waits for a copy."""
    return torch.tensor(counts, dtype=torch.int64).to(device)


def threshold(x, initial, counts, bounds, exact):
    wanted = numbers_on(counts, x.device)
    segments = len(wanted)
    bits, cuts = torch.zeros(segments, dtype=torch.int32, device=x.device), torch.full_like(wanted, x.numel())
    if x.numel():
        (chunks, aligned), ranks = chunk_rows_on(bounds, SIZE, x.device), wanted.clone()
        slots = torch.empty(len(chunks) * CAPACITY, dtype=torch.int32, device=x.device)
        filled = torch.empty(len(chunks), dtype=torch.int32, device=x.device)
        middle, lowest = torch.zeros(2, segments, 1024, dtype=torch.int64, device=x.device)
        grid, sizes = (len(chunks),), {"SIZE": SIZE, "CAPACITY": CAPACITY}
        with on(x):
            digit(histogram(x, initial, None, 0, 11, bounds), ranks, bits)
            collect_kernel[grid](
                chunks, x, initial, bits, middle, slots, filled, ALIGNED=aligned, **sizes, num_warps=WARPS, **OPTIONS
            )
            digit(middle, ranks, bits)
            lowest_kernel[grid](chunks, x, initial, bits, slots, filled, lowest, **sizes, **OPTIONS)
            digit(lowest, ranks, bits)
            if exact:
                ties = torch.empty(len(chunks), dtype=torch.int64, device=x.device)
                tie_count_kernel[grid](chunks, x, initial, bits, slots, filled, ties, **sizes, num_warps=1, **OPTIONS)
                through = torch.cat([ties.new_zeros(1), ties.cumsum(0)])
                rows = first_rows(bounds, SIZE, x.device)
                target = through[rows[:-1]] + ranks
                chunk = torch.searchsorted(through, target).clamp(1, len(chunks)) - 1
                tie_place_kernel[(segments,)](
                    chunks, x, initial, bits, chunk, target - through[chunk], cuts,
                    SIZE=SIZE, num_warps=WARPS, **OPTIONS,
                )  # fmt: skip
                cuts.masked_fill_(ranks == through[rows[1:]] - through[rows[:-1]], x.numel())  # all ties are kept
    return bits.masked_fill_(wanted == 0, NOTHING), cuts.masked_fill_(wanted == 0, -1)
