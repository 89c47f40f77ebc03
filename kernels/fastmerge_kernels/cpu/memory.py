"""How loops read and write tensors: blocks of fp32 values, whatever the dtype in memory.

Loops work on blocks that stay in the first-level cache: `fetch` gives a block of an input as fp32, `store` writes one. Where
all tensors are fp32 a fetched block is the input itself. With any bf16 or fp16 it is converted by bit arithmetic and the
processor's half-precision instructions, so a loop is compiled for these two cases only.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from .cache import inline, part

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def arrays(*tensors: Tensor | None) -> list:
    """What loops take for the tensors of one call: fp32 arrays, or (address, dtype code) pairs if any of them is not fp32."""
    if all(x is None or x.dtype == torch.float32 for x in tensors):
        return [None if x is None else x.detach().numpy() for x in tensors]
    return [None if x is None else (np.uint64(x.data_ptr()), _CODES[x.dtype]) for x in tensors]


def scalar(value: float, tensor: Tensor | None) -> np.float32:
    """The op's scalar as fp32, from `checks.scalar`'s pair."""
    return np.float32(value if tensor is None else tensor.item())


def _reinterpret(source, target):
    """An intrinsic that reads the bits of one numba scalar type as another of the same width."""

    @intrinsic
    def cast(typingctx, x):
        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), codegen

    return cast


_u32 = np.uint32
bits = _reinterpret(types.float32, types.uint32)
floating = _reinterpret(types.uint32, types.float32)


@intrinsic
def fma(typingctx, a, b, c):
    """a b + c of fp32, rounded once: the same bits on every processor, and half the instructions."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def _from_half(typingctx, x):
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _to_half(typingctx, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


def _memory(source):
    """Two intrinsics for memory at an address, little to compile: read(address, i) and write(address, i, value)."""

    def pointer(context, builder, address, index):
        pointer = builder.inttoptr(address, context.get_value_type(source).as_pointer())
        return builder.gep(pointer, [index])

    @intrinsic
    def read(typingctx, address, index):
        def codegen(context, builder, signature, args):
            return builder.load(pointer(context, builder, *args), align=source.bitwidth // 8)

        return source(types.uint64, types.int64), codegen

    @intrinsic
    def write(typingctx, address, index, value):
        def codegen(context, builder, signature, args):
            builder.store(args[2], pointer(context, builder, *args[:2]), align=source.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(types.uint64, types.int64, source), codegen

    return read, write


_read16, _write16 = _memory(types.uint16)
_read32, _write32 = _memory(types.float32)


@part
def _decode(address, code, first, count, scratch):
    if code == 0:
        for j in range(count):
            scratch[j] = _read32(address, first + j)
    elif code == 1:
        for j in range(count):
            scratch[j] = floating(_u32(_u32(_read16(address, first + j)) << _u32(16)))
    else:
        for j in range(count):
            scratch[j] = _from_half(_read16(address, first + j))


@part
def _store_float(out, values):
    bad = np.int32(0)  # 32 bits like the data, or the loop runs at half speed
    for j in range(out.size):
        out[j] = values[j]
        bad = np.int32(bad + np.int32(_u32(bits(values[j]) & _u32(0x7F800000)) == _u32(0x7F800000)))
    return np.int64(bad)


@part
def _encode(address, code, first, count, values):
    bad = np.int32(0)
    if code == 0:
        for j in range(count):
            _write32(address, first + j, values[j])
            bad = np.int32(bad + np.int32(_u32(bits(values[j]) & _u32(0x7F800000)) == _u32(0x7F800000)))
    elif code == 1:
        for j in range(count):
            b = bits(values[j])
            rounded = _u32(b + _u32(0x7FFF) + _u32(_u32(b >> _u32(16)) & _u32(1)))
            quiet = _u32(b | _u32(0x400000))  # rounding could carry a NaN into infinity
            rounded = quiet if _u32(b & _u32(0x7FFFFFFF)) > _u32(0x7F800000) else rounded
            bad = np.int32(bad + np.int32(_u32(rounded & _u32(0x7F800000)) == _u32(0x7F800000)))
            _write16(address, first + j, np.uint16(rounded >> _u32(16)))
    else:
        for j in range(count):
            h = _u32(_to_half(values[j]))
            bad = np.int32(bad + np.int32(_u32(h & _u32(0x7C00)) == _u32(0x7C00)))
            _write16(address, first + j, np.uint16(h))
    return np.int64(bad)


def fetch(x, first, count, scratch):
    """Entries first .. first + count - 1 as an fp32 array, in `scratch` if they must be converted (loops only)."""


@overload(fetch, jit_options={"forceinline": True})
def _fetch(x, first, count, scratch):
    if isinstance(x, types.Array):
        return lambda x, first, count, scratch: x[first : first + count]

    def convert(x, first, count, scratch):
        _decode(x[0], x[1], first, count, scratch)
        return scratch[:count]

    return convert


def store(out, first, count, values):
    """out[first : first + count] = values[:count], rounded to nearest; returns how many of them are not finite (loops only).

    Loops compute into a block and store it here: a loop whose output may alias an input does not vectorise.
    """


@overload(store, jit_options={"forceinline": True})
def _store(out, first, count, values):
    if isinstance(out, types.Array):
        return lambda out, first, count, values: _store_float(out[first : first + count], values)
    return lambda out, first, count, values: _encode(out[0], out[1], first, count, values)


def put_back(x, first, count, values):
    """`store` for values that were fetched from there and changed in their place: fp32 is there already (loops only)."""


@overload(put_back, jit_options={"forceinline": True})
def _put_back(x, first, count, values):
    if isinstance(x, types.Array):
        return lambda x, first, count, values: None
    return lambda x, first, count, values: _encode(x[0], x[1], first, count, values)


class AddressTable(NamedTuple):
    addresses: np.ndarray  # [T] uint64
    codes: np.ndarray  # [T] int64


def address_table(tensors) -> AddressTable:
    """Many tensors for `fetch_at`. The caller keeps them alive."""
    codes = [_CODES[x.dtype] for x in tensors]
    return AddressTable(np.array([x.data_ptr() for x in tensors], np.uint64), np.array(codes, np.int64))


@intrinsic
def _pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.uint64), codegen


@part
def fetch_at(models, t, first, count, scratch):
    """`fetch` from the t-th tensor of an `address_table`."""
    if models.codes[t] == 0:
        return numba.carray(_pointer(models.addresses[t] + np.uint64(4 * first)), (count,))
    _decode(models.addresses[t], models.codes[t], first, count, scratch)
    return scratch[:count]


@inline
def entry_at(models, t, i):
    """Entry i of the t-th tensor of an `address_table`, as fp32."""
    if models.codes[t] == 0:
        return _read32(models.addresses[t], i)
    if models.codes[t] == 1:
        return floating(_u32(_u32(_read16(models.addresses[t], i)) << _u32(16)))
    return _from_half(_read16(models.addresses[t], i))
