"""The k-th largest magnitude of a vector, per segment: exact, no sort, no copy, sums of shards.

    magnitude_threshold   (threshold, cut) per segment: which entries are the k largest     8 bytes/parameter, on a GPU 16
    magnitude_histogram   counts of some bits of |x - initial|, given the bits above them   8
    magnitude_digit       the bin of a histogram that holds the k-th largest, and its rank in there

A non-negative float's 31 bits order like its value, so histograms of them, from the upper bits down, find the k-th largest
exactly, and histograms of shards add up:

    prefix, known, rank = None, 0, torch.tensor([k])
    for bits in (11, 10, 10):
        counts = magnitude_histogram(shard, prefix=prefix, known=known, bits=bits)      # all_reduce(counts) here
        digit, rank = magnitude_digit(counts, rank)
        prefix, known = digit if prefix is None else prefix << bits | digit, known + bits
    threshold = prefix.view(torch.float32)

On a GPU `magnitude_threshold` reads the vector twice: once for the upper 11 bits, once to collect the entries that have those
of the k-th largest, a few percent, into n / 8 slots of 4 bytes; where they do not fit, as among many equal values, it reads
that part again. On a CPU one pass counts what lies above a bracket around the k-th largest and
collects what lies in it; the bracket comes from a sample, and where it fails, as among many equal values, two histograms
decide. The result is the same.

An entry is kept if its magnitude is above the threshold, or equal to it and at an index <= `cut`. NaN counts as larger than
infinity.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .checks import check_choice, check_vectors
from .registry import backend, register
from .segments import boundaries

KEEP = ("at least", "exactly")
NOTHING = 0x7FFFFFFF  # bits above every NaN: the threshold that keeps nothing


@register(
    "magnitude_histogram(Tensor x, Tensor? initial, Tensor? prefix, SymInt known, SymInt bits, "
    "SymInt[] segments) -> Tensor",
    fake=lambda x, i, p, known, bits, segments: x.new_empty(len(segments) - 1, 1 << bits, dtype=torch.int64),
    capturable=False,
)
def _histogram(
    x: Tensor, initial: Tensor | None, prefix: Tensor | None, known: int, bits: int, segments: Sequence[int]
) -> Tensor:
    return backend("threshold", x).histogram(x, initial, prefix, known, bits, tuple(segments))


def _fake_threshold(x, initial, counts, segments, exact):
    return x.new_empty(len(counts), dtype=torch.int32), x.new_empty(len(counts), dtype=torch.int64)


@register(
    "magnitude_threshold(Tensor x, Tensor? initial, SymInt[] counts, SymInt[] segments, "
    "bool exact) -> (Tensor, Tensor)",
    fake=_fake_threshold,
    capturable=False,
)
def _threshold(
    x: Tensor, initial: Tensor | None, counts: Sequence[int], segments: Sequence[int], exact: bool
) -> tuple[Tensor, Tensor]:
    return backend("threshold", x).threshold(x, initial, tuple(counts), tuple(segments), exact)


@torch.no_grad()
def magnitude_histogram(
    x: Tensor,
    *,
    initial: Tensor | None = None,
    segments: Sequence[int] | None = None,
    prefix: Tensor | None = None,
    known: int = 0,
    bits: int = 8,
) -> Tensor:
    """int64 [segments, 2^bits]: how often each value of some `bits` of the 31 bits of |x - initial| (as fp32) occurs.

    x: [n]. known: how many upper bits are already known; only entries whose upper bits equal `prefix` (int32 [segments]) are
    counted. bits: 1 to 11, those that follow. segments: boundaries 0, ..., n. Raises TypeError / ValueError.
    """
    check_vectors("x", x=x, initial=initial)
    bounds = boundaries(segments, x.numel())
    if not (known >= 0 and 1 <= bits <= 11 and known + bits <= 31):
        raise ValueError(f"bits: expected 1 to 11 of the 31 - known remaining, got bits = {bits}, known = {known}")
    if (prefix is None) != (known == 0):
        raise ValueError(f"prefix: needed for known > 0 and only there, got known = {known}")
    if prefix is not None and (prefix.dtype, prefix.shape, prefix.device) != (
        torch.int32,
        (len(bounds) - 1,),
        x.device,
    ):
        raise ValueError(
            f"prefix: expected int32 [{len(bounds) - 1}] on {x.device}, got {prefix.dtype} {list(prefix.shape)} "
            f"on {prefix.device}"
        )
    return _histogram(x, initial, prefix, known, bits, list(bounds))


def magnitude_digit(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """(bin int32 [segments] that holds the rank-th largest, its rank int64 [segments] among the entries of that bin).

    counts: int64 [segments, bins] of `magnitude_histogram`; rank: int64 [segments], from 1 to the sum of the counts.
    """
    above = counts.flip(1).cumsum(1)
    place = (above < rank[:, None]).sum(1, keepdim=True).clamp(max=counts.shape[1] - 1)
    digit = counts.shape[1] - 1 - place
    inside = rank - (above.gather(1, place) - counts.gather(1, digit))[:, 0]
    return digit[:, 0].to(torch.int32), inside


def whole_numbers(k: int | Sequence[int], segments: int) -> list[int]:
    """k as a list; one number, of any type of whole numbers, holds for all segments."""
    try:
        if isinstance(k, Sequence) or getattr(k, "ndim", None):
            return [operator.index(count) for count in cast("Sequence[int]", k)]
        return [operator.index(k)] * segments
    except TypeError:
        raise TypeError(f"k: expected a whole number, or one per segment, got {k!r}") from None


@torch.no_grad()
def magnitude_threshold(
    x: Tensor,
    k: int | Sequence[int],
    *,
    initial: Tensor | None = None,
    segments: Sequence[int] | None = None,
    keep: str = "at least",
) -> tuple[Tensor, Tensor]:
    """(threshold fp32 [segments], cut int64 [segments]): what to keep so that k entries of each segment remain.

    x: [n]; the magnitudes are |x - initial|. k: entries to keep, one number or one per segment, 0 <= k <= length. segments:
    boundaries 0, ..., n (default: the whole vector). keep: 'at least' k with all ties (cut = n), or 'exactly' k, the earlier
    of equal entries first (cut: index of the last; n where no tie is left out). k = 0 gives the threshold NaN, which keeps
    nothing. On a GPU the host does not wait for the result. Raises TypeError / ValueError.
    """
    check_vectors("x", x=x, initial=initial)
    check_choice("keep", keep, KEEP)
    bounds = boundaries(segments, x.numel())
    counts = whole_numbers(k, len(bounds) - 1)
    if len(counts) != len(bounds) - 1:
        raise ValueError(f"k: expected one number or {len(bounds) - 1}, one per segment, got {len(counts)}")
    for count, start, stop in zip(counts, bounds[:-1], bounds[1:], strict=True):
        if not 0 <= count <= stop - start:
            raise ValueError(f"k: expected 0 <= k <= {stop - start}, the length of its segment, got {count}")
    bits, cut = _threshold(x, initial, counts, list(bounds), keep == "exactly")
    return bits.view(torch.float32), cut
