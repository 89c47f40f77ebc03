"""Sums of blocks: fp32 in a tree of fixed shape, float64 from 16 partial sums on."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .cache import part


@intrinsic
def _sum512(typingctx, address):
    """Sum of the 512 fp32 at an address: folded in halves down to 16 in fp32, those in float64."""

    def codegen(context, builder, signature, args):
        def halves(x, stop):
            while x.type.count > stop:
                n, nothing = x.type.count // 2, ir.Constant(x.type, ir.Undefined)
                pick = [ir.Constant(ir.VectorType(ir.IntType(32), n), [*range(k, k + n)]) for k in (0, n)]
                x = builder.fadd(*(builder.shuffle_vector(x, nothing, p) for p in pick))
            return x

        def tree(parts):
            return parts[0] if len(parts) == 1 else builder.fadd(tree(parts[::2]), tree(parts[1::2]))

        wide = ir.VectorType(ir.FloatType(), 64)
        first = builder.inttoptr(args[0], wide.as_pointer())
        parts = [builder.load(builder.gep(first, [ir.Constant(ir.IntType(32), k)]), align=4) for k in range(8)]
        exact = builder.fpext(halves(tree(parts), 16), ir.VectorType(ir.DoubleType(), 16))
        return builder.extract_element(halves(exact, 1), ir.Constant(ir.IntType(32), 0))

    return types.float64(types.uint64), codegen


@part
def add_sums(row, terms, count):
    """row[k] += sum of terms[k, :count], by `_sum512`. terms: [K, a multiple of 512]; entries from `count` on are lost."""
    for k in range(row.size):
        term, total = terms[k], 0.0
        rest = term[count : -(-count // 512) * 512]
        for j in range(rest.size):
            rest[j] = np.float32(0.0)
        for first in range(0, count, 512):
            total += _sum512(np.uint64(term.ctypes.data) + np.uint64(4 * first))
        row[k] += total
