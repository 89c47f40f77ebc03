"""How the Triton kernels run: launch helpers, the second stage of every reduction, and what kernels share.

Reductions are two-stage trees of fixed shape without float atomics: every program writes one float64 row of partial sums, one
program adds the rows. Offsets of programs are 64-bit, offsets inside a program 32-bit. Floats that arrive as launch arguments
are pinned to fp32 inside the kernels: some launchers hand them over as fp64, which would silently double the arithmetic.
"""

from __future__ import annotations

import contextlib

import numpy as np
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
    # a wide program: 10,000 rows are three turns
    add_rows[(1,)](rows, rows.shape[0], out, COLUMNS=rows.shape[1], BLOCK=4096, num_warps=16, **OPTIONS)
    return out


@triton.jit(do_not_specialize=[f"w{k}" for k in range(16)])
def table_kernel(out, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15):
    tl.store(out, w0)
    tl.store(out + 1, w1)
    tl.store(out + 2, w2)
    tl.store(out + 3, w3)
    tl.store(out + 4, w4)
    tl.store(out + 5, w5)
    tl.store(out + 6, w6)
    tl.store(out + 7, w7)
    tl.store(out + 8, w8)
    tl.store(out + 9, w9)
    tl.store(out + 10, w10)
    tl.store(out + 11, w11)
    tl.store(out + 12, w12)
    tl.store(out + 13, w13)
    tl.store(out + 14, w14)
    tl.store(out + 15, w15)


def table(values: np.ndarray, device: torch.device) -> Tensor:
    """A small host array (int32, int64 or fp32) on the device. A kernel writes its own arguments: a copy would make the host
    wait, and a CUDA graph would repeat it from memory that holds something else by then."""
    words = values.ravel().view(np.int32).tolist()
    out = torch.empty(16 * triton.cdiv(len(words), 16), dtype=torch.int32, device=device)
    with on(out):
        for start in range(0, len(words), 16):
            block = [*words[start : start + 16], *[0] * (start + 16 - len(words))]
            table_kernel[(1,)](out[start:], *block, num_warps=1, **OPTIONS)
    dtype = torch.from_numpy(values).dtype
    return out[: len(words)].view(dtype).view(values.shape)


def pieces(*tensors: Tensor | None, offset: int | None = None) -> list[tuple[int, int, list[Tensor | None]]]:
    """[(start, stop, the tensors' entries start .. stop - 1)], to launch one after the other.

    Loads are 128 bits wide only where addresses and lengths are multiples of 16, so a vector that begins or ends elsewhere
    is cut into a few entries, a wide middle, and a few entries. offset: position of the first entry, for kernels with random
    numbers: their middle must begin at a multiple of 16 of the whole vector.
    """
    given = [x for x in tensors if x is not None]
    n, first = given[0].numel(), given[0]
    head = (-first.data_ptr() % 16) // first.element_size() if offset is None else -offset % 16
    whole = n < BLOCK or any((x.data_ptr() + head * x.element_size()) % 16 for x in given)
    if whole or head == n % 16 == 0:
        return [(0, n, list(tensors))]
    stop = n - (n - head) % 16
    cuts = [(a, b) for a, b in ((0, head), (head, stop), (stop, n)) if a < b]
    return [(a, b, [x if x is None else x[a:b] for x in tensors]) for a, b in cuts]


def int32(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: launch arguments above 2^31 would change their type, and the kernel's."""
    return word - (1 << 32) if word >= 1 << 31 else word
