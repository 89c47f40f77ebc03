"""The header of a safetensors file, read strictly: what is wrong is told before a byte of data is read.

The format: eight bytes with the length of the header, the header (JSON), the data. We ask what the reference implementation
asks (at most 100 MB of header, no holes, no overlaps) and name the tensor that breaks it.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.stamp import Stamp, check_stamp, stamp_of

LARGEST = 100_000_000  # bytes of header, the limit of the reference implementation
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of an input. part(start, stop): its entries start..stop as a 1-D tensor on the CPU, without a copy where the
    file allows it; not to be written to; UserError if the file changed since it was opened. tie: entries of one input with
    the same `tie` share their memory. release(start, stop): give back the memory behind these entries; they can be read
    again."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    part: Callable[[int, int], Tensor]
    tie: Any = None
    release: Callable[[int, int], None] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def whole(self) -> Tensor:
        return self.part(0, self.numel)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], Stamp]:
    """The tensors of a file, in the order of its header, its metadata, and its stamp; the data is mapped, not read.

    Raises:
        UserError: the file cannot be read or breaks the format.
    """
    try:
        with open(path, "rb") as file:
            stamp = stamp_of(file.fileno())
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(
                    f"{path}: not a whole safetensors file: it has {size} bytes and announces a header of {length}; "
                    "download or copy it again"
                )
            if length > LARGEST:
                raise UserError(f"{path}: its header has {length} bytes; safetensors allows {LARGEST}")
            text = file.read(length)
            try:
                header = json.loads(text, object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: its header is not valid JSON ({error}); it is no safetensors file") from None
            data = mmap.mmap(
                file.fileno(), 0, access=mmap.ACCESS_COPY
            )  # private: the file cannot be changed through it
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror or error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not an object; it is no safetensors file")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: its __metadata__ is not an object of strings; it is no safetensors file")
    entries = {name: _entry(path, stamp, name, about, data, 8 + length) for name, about in header.items()}
    end = 0
    for name, (begin, stop) in sorted(((n, header[n]["data_offsets"]) for n in header), key=lambda x: x[1]):
        if begin != end:
            what = "overlaps the one before it" if begin < end else f"leaves {begin - end} bytes unused before it"
            raise UserError(f"{path}: tensor {name} {what}; the file is damaged")
        end = stop
    if end != size - 8 - length:
        raise UserError(
            f"{path}: its tensors take {end} bytes, but {size - 8 - length} follow the header; the file is cut off or damaged"
        )
    return entries, metadata, stamp


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)} occurs twice")
    return dict(pairs)


def _entry(path: Path, stamp: Stamp, name: str, about: Any, data: mmap.mmap, start: int) -> Entry:
    if not (isinstance(about, dict) and about.keys() >= {"dtype", "shape", "data_offsets"}):
        raise UserError(f"{path}: tensor {name} has no dtype, shape and data_offsets; it is no safetensors file")
    kind, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if kind not in DTYPES:
        raise UserError(f"{path}: tensor {name} is {kind}; convert it to one of {', '.join(DTYPES)} first")
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        raise UserError(f"{path}: tensor {name} has shape {shape} and data_offsets {offsets}; the file is damaged")
    dtype, (begin, stop) = DTYPES[kind], offsets
    if stop - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: tensor {name} of shape {shape} and {kind} takes {math.prod(shape) * dtype.itemsize} bytes, but its "
            f"data_offsets {offsets} give {stop - begin}; the file is damaged"
        )
    if start + stop > len(data):
        raise UserError(f"{path}: tensor {name} ends after the file does; the file is cut off, copy it again")
    first, width = start + begin, dtype.itemsize

    def part(low: int, high: int) -> Tensor:
        if high == low:
            return torch.empty(0, dtype=dtype)
        check_stamp(path, stamp)
        x = torch.frombuffer(data, dtype=torch.uint8, count=(high - low) * width, offset=first + low * width)
        return (x if x.data_ptr() % width == 0 else x.clone()).view(dtype)

    def release(low: int, high: int) -> None:
        drop_pages(data, first + low * width, first + high * width)

    return Entry(name, dtype, tuple(shape), part, release=release)


def drop_pages(data: mmap.mmap, start: int, stop: int) -> None:
    """Take the pages of these bytes out of the process's memory; they stay in the cache of the system."""
    if stop > start and hasattr(mmap, "MADV_DONTNEED"):
        low = start // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(mmap.MADV_DONTNEED, low, min(stop, len(data)) - low)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
