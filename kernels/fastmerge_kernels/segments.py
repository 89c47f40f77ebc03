"""Rules that work per tensor: a flat vector cut into segments, the segments into chunks that a program takes whole."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def boundaries(segments: Sequence[int] | None, length: int) -> tuple[int, ...]:
    """(0, ..., length) as a tuple; None is one segment. Raises ValueError unless the boundaries ascend from 0 to length."""
    bounds = (0, length) if segments is None else tuple(int(x) for x in segments)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or list(bounds) != sorted(bounds):
        raise ValueError(f"segments: expected ascending boundaries 0, ..., {length}, got {_short(bounds)}")
    return bounds


def _short(bounds: tuple[int, ...]) -> str:
    return str(list(bounds)) if len(bounds) < 8 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"


@functools.lru_cache(64)
def chunk_rows(bounds: tuple[int, ...], size: int) -> np.ndarray:
    """int64 [rows, 3]: start, stop, segment of chunks of at most `size` entries, in order; no chunk crosses a boundary."""
    rows = [
        (a, min(a + size, stop), s)
        for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
        for a in range(start, stop, size)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


@functools.lru_cache(64)
def chunk_rows_on(bounds: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, bool]:
    """`chunk_rows` on the device, and whether every chunk but a segment's last starts and ends at a multiple of 16."""
    rows = chunk_rows(bounds, size)
    return torch.from_numpy(rows).to(device), bool((rows[:, :2] % 16 == 0).all())


def sum_rows(rows: np.ndarray, bounds: tuple[int, ...], size: int) -> np.ndarray:
    """float64 [segments, columns]: the sums over each segment of one row per chunk, in order."""
    out = np.zeros((len(bounds) - 1, rows.shape[1]))
    np.add.at(out, chunk_rows(bounds, size)[:, 2], rows)
    return out


@functools.lru_cache(64)
def first_rows(bounds: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int64 [segments + 1] on the device: segment s has the rows first[s] .. first[s + 1] - 1 of `chunk_rows`."""
    return torch.from_numpy(np.searchsorted(chunk_rows(bounds, size)[:, 2], np.arange(len(bounds)))).to(device)


def inverse_roots(norms: Tensor) -> Tensor:
    """fp32 1 / sqrt of squared norms, 0 where the vector is zero."""
    return torch.where(norms == 0, 0.0, norms.rsqrt()).float()
