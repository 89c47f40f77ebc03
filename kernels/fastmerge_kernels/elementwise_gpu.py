"""Triton kernels of `elementwise.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .gpu import BLOCK, OPTIONS, cleared, on, pointer, scalar, store


@triton.jit
def lerp_kernel(a, b, out, n, alpha, alpha_pointer, nonfinite, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    alpha = scalar(alpha, alpha_pointer)
    x, y = tl.load(a + i, mask=inside, other=0).to(tl.float32), tl.load(b + i, mask=inside, other=0).to(tl.float32)
    store(out, i, (1.0 - alpha) * x + alpha * y, inside, nonfinite)


def lerp(a, b, alpha, out, nonfinite):
    n, nonfinite = a.numel(), cleared(nonfinite)
    if n:
        with on(a):
            lerp_kernel[(triton.cdiv(n, BLOCK),)](a, b, out, n, *pointer(alpha, a), nonfinite, BLOCK=BLOCK, **OPTIONS)
