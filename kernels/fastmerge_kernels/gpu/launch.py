"""How the Triton kernels run: launch helpers, the second stage of every reduction, and what kernels share.

Reductions are two-stage trees of fixed shape without float atomics: every program writes one float64 row of partial sums, one
program adds the rows. Offsets of programs are 64-bit, offsets inside a program 32-bit. Floats that arrive as launch arguments
are pinned to fp32 inside the kernels: some launchers hand them over as fp64, which would silently double the arithmetic.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # entries of a program without random numbers
OPTIONS = {"enable_fp_fusion": True}  # fused multiply-add; said aloud, because Triton's default is changing


@triton.jit
def scalar(value, pointer):
    """An op's scalar as fp32: from `pointer` if there is one, else the launch argument."""
    if pointer is not None:
        value = tl.load(pointer)
    return tl.cast(value, tl.float32)


@triton.jit
def load(pointer, index, inside):
    """Entries as fp32, 0 outside the vector."""
    return tl.load(pointer + index, mask=inside, other=0).to(tl.float32)


@triton.jit
def store(pointer, index, value, inside, nonfinite):
    """Store fp32 `value` in the pointer's dtype; add the number of written NaN and inf to `nonfinite` if there is one."""
    written = value.to(pointer.dtype.element_ty)
    tl.store(pointer + index, written, mask=inside)
    if nonfinite is not None:
        bad = tl.sum((inside & ~(tl.abs(written.to(tl.float32)) < float("inf"))).to(tl.int32), 0)
        if bad > 0:  # integers: the order of atomics does not matter
            tl.atomic_add(nonfinite, bad.to(tl.int64))


@triton.jit
def add_rows(rows, count, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """out[c] = sum of rows[:, c], float64, one program."""
    lane = tl.arange(0, BLOCK)
    for column in tl.static_range(COLUMNS):
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, count, BLOCK):
            row = start + lane
            total += tl.load(rows + row.to(tl.int64) * COLUMNS + column, mask=row < count, other=0.0)
        tl.store(out + column, tl.sum(total, 0))


def on(tensor: Tensor):
    """Context: launches go to the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def scalar_arguments(pair: tuple[float, Tensor | None], like: Tensor) -> tuple[float, Tensor | None]:
    """(value, pointer) for `scalar` in a kernel. A tensor on the kernel's device is read there, without waiting for it."""
    value, tensor = pair
    if tensor is not None and tensor.device != like.device:
        return tensor.item(), None  # a CPU scalar beside CUDA tensors
    return value, tensor


def cleared(nonfinite: Tensor | None) -> Tensor | None:
    return None if nonfinite is None else nonfinite.zero_()


def total(rows: Tensor) -> Tensor:
    """Second stage: float64 [columns] sums of rows [programs, columns]."""
    out = torch.empty(rows.shape[1], dtype=torch.float64, device=rows.device)
    add_rows[(1,)](rows, rows.shape[0], out, COLUMNS=rows.shape[1], BLOCK=1024, **OPTIONS)
    return out


def int32(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: launch arguments above 2^31 would change their type, and the kernel's."""
    return word - (1 << 32) if word >= 1 << 31 else word
