"""Thresholds of TIES over any number of tensors, from histograms of their parts: exact, and the same for any parts.

The 31 bits of a magnitude are found from the top: three passes over the tensors count 11, 10 and 10 of them
(`fastmerge_kernels.magnitude_histogram`). Of the entries equal to the threshold the earlier ones are kept, in the order
of the sorted tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import fastmerge_kernels as fk
import torch
from torch import Tensor

Parts = Iterator[tuple[int, Tensor, Tensor | None]]  # start, x [n], initial [n]; the magnitudes are |x - initial|


@dataclass
class Trim:
    """Kept are entries with magnitude above `limit`, and those equal to it up to index `cut` of the tensor."""

    limit: Tensor  # fp32 [1]
    cut: int

    def at(self, start: int) -> tuple[Tensor, Tensor]:
        """limit, and cut int64 [1] for the part of the tensor that begins at `start`."""
        cut = max(self.cut - start, -1)
        return self.limit, torch.full((1,), cut, device=self.limit.device)  # no copy from the host, which would wait


def trims(tensors: Iterable[Callable[[], Parts]], sizes: list[int], density: float, exactly: bool) -> list[Trim]:
    """One Trim per tensor, for the `density` largest magnitudes of all of them together (at least one entry).

    tensors: for every tensor a function that goes through its parts again. sizes: entries of each tensor.
    exactly: leave out later ones of the entries that equal the threshold.
    """
    tensors = list(tensors)
    rank = torch.tensor([min(sum(sizes), max(1, int(density * sum(sizes))))])
    prefix, known = None, 0
    for bits in (11, 10, 10):
        total, last = torch.zeros(1, 1 << bits, dtype=torch.int64), []
        for parts in tensors:
            counts = torch.zeros_like(total)
            for _, x, initial in parts():
                found = fk.magnitude_histogram(x, initial=initial, prefix=prefix, known=known, bits=bits)
                counts = counts.to(found.device) + found
            total = total.to(counts.device) + counts
            if known + bits == 31:
                last.append(counts[0])
        digit, rank = fk.magnitude_digit(total, rank.to(total.device))
        prefix, known = digit if prefix is None else prefix << bits | digit, known + bits
    assert prefix is not None
    limit, left, cuts = prefix.view(torch.float32), int(rank), []
    for parts, size, counts in zip(tensors, sizes, last, strict=True):
        equal = int(counts[int(digit)])
        if not exactly or left >= equal:
            cut = size
        else:
            cut = _index(parts(), prefix, left) if left > 0 else -1
        left -= equal
        cuts.append(Trim(limit, cut))
    return cuts


def _index(parts: Parts, bits: Tensor, number: int) -> int:
    """The index of the `number`-th entry whose magnitude has these bits."""
    for start, x, initial in parts:
        delta = x.float() if initial is None else x.float() - initial.float()
        places = (delta.abs().view(torch.int32) == bits).nonzero()[:, 0]
        if len(places) >= number:
            return start + int(places[number - 1])
        number -= len(places)
    raise AssertionError("fewer entries equal the threshold than were counted")
