"""How the numba loops run: compiled at first call, cached on disk, over fixed chunks, on as many threads as torch uses.

Every loop has the signature `f(start, stop, ...)` over entries start..stop-1 and releases the GIL. Threads take spans of
whole chunks from one queue; a reduction writes one float64 row per chunk, and rows are added in order, so results do not
depend on the number of threads. bf16 comes as uint16 and fp16 as int16 arrays (numba has neither): `load` and `store`
convert, arithmetic is fp32 throughout. No fast-math flag is set, so NaN and inf propagate and vector and scalar code give
the same bits.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, overload
from torch import Tensor

CHUNK = 1 << 16  # entries per partial sum
_SPANS = 8  # spans per thread, so that a thread that lost its core does not hold up the others

_FILES = [Path(__file__), *sorted(Path(__file__).parent.glob("*_cpu.py"))]
_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()


class _Cache(FunctionCache):
    """numba's cache, but valid for the text of all our loops (numba looks at one file) and never an error."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._source_stamp = _SOURCES

    def load_overload(self, signature, context):
        try:
            return super().load_overload(signature, context)
        except OSError:
            return None

    def save_overload(self, signature, data):
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_once(str(error))


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"fastmerge_kernels compiles its CPU loops anew in every process: {reason}", stacklevel=3)


def loop(function: Callable) -> Callable:
    """numba.njit without the GIL, cached on disk where a folder can be written."""
    dispatcher = numba.njit(nogil=True)(function)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError as error:  # numba found no folder that it may write
        _warn_once(str(error))
    return dispatcher


inline = numba.njit(forceinline=True)  # for parts of a loop: LLVM vectorises only what it inlined

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, "fastmerge"), count
        return _pool


def _forget_pool() -> None:  # threads do not survive a fork
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(function: Callable, length: int, *args) -> int:
    """Call `function(start, stop, *args)` over 0..length in spans of whole chunks; returns the sum of the results."""
    chunks = -(-length // CHUNK)
    threads = min(torch.get_num_threads(), chunks)
    if threads <= 1:
        return (function(0, length, *args) or 0) if length else 0
    span = -(-chunks // (threads * _SPANS)) * CHUNK
    starts = iter(range(0, length, span))
    total = [0] * threads

    def work(slot: int) -> None:
        for start in starts:  # next() of a range iterator is atomic under the GIL
            total[slot] += function(start, min(start + span, length), *args) or 0

    others = [_workers(threads - 1).submit(work, slot) for slot in range(1, threads)]
    try:
        work(0)
    finally:
        for other in others:
            other.result()
    return sum(total)


def reduce(function: Callable, length: int, columns: int, *args) -> np.ndarray:
    """`run` for a reduction `function(start, stop, rows, *args)`: float64 [columns], the sum of one row per chunk."""
    rows = np.zeros((-(-length // CHUNK), columns))
    run(function, length, rows, *args)
    return rows.sum(0)


_VIEWS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def array(x: Tensor | None) -> np.ndarray | None:
    """The tensor's memory as float32, uint16 (bf16) or int16 (fp16) array."""
    return None if x is None else x.detach().view(_VIEWS.get(x.dtype, x.dtype)).numpy()


def number(value: float, tensor: Tensor | None) -> np.float32:
    """The op's scalar as fp32, from `dispatch.scalar`'s pair."""
    return np.float32(value if tensor is None else tensor.item())


def _reinterpret(source, target):
    """An intrinsic that reads the bits of one numba scalar type as another of the same width."""

    @intrinsic
    def cast(typingctx, x):
        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), codegen

    return cast


bits = _reinterpret(types.float32, types.uint32)
floating = _reinterpret(types.uint32, types.float32)


@intrinsic
def _from_half(typingctx, x):
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), codegen


@intrinsic
def _to_half(typingctx, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), codegen


def load(x, i):
    """x[i] as fp32 (loops only). The unsigned index tells LLVM that none counts from the end, else no loop vectorises."""


@overload(load, jit_options={"forceinline": True})
def _load(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: floating(np.uint32(np.uint32(x[np.uint64(i)]) << np.uint32(16)))
    if x.dtype == types.int16:
        return lambda x, i: _from_half(x[np.uint64(i)])
    return lambda x, i: x[np.uint64(i)]


def store(out, start, values, count):
    """out[start : start + count] = values[:count], rounded to nearest even; returns how many are not finite (loops only).

    Loops compute into a small block and store it here: a loop whose output may alias an input does not vectorise.
    """


@overload(store, jit_options={"forceinline": True})
def _store(out, start, values, count):
    if out.dtype == types.uint16:

        def bf16(out, start, values, count):
            bad = 0
            for j in range(count):
                b = bits(values[j])
                rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))
                if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # NaN: keep it one
                    rounded = b | np.uint32(0x400000)
                h = np.uint16(rounded >> np.uint32(16))
                bad += (h & np.uint16(0x7F80)) == np.uint16(0x7F80)
                out[np.uint64(start + j)] = h
            return bad

        return bf16
    if out.dtype == types.int16:

        def fp16(out, start, values, count):
            bad = 0
            for j in range(count):
                h = _to_half(values[j])
                bad += (h & np.int16(0x7C00)) == np.int16(0x7C00)
                out[np.uint64(start + j)] = h
            return bad

        return fp16

    def fp32(out, start, values, count):
        bad = 0
        for j in range(count):
            out[np.uint64(start + j)] = values[j]
            bad += (bits(values[j]) & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        return bad

    return fp32
