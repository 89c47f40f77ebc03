"""Triton kernels of `elementwise.py`: they take the vectors, the length, (value, pointer) per number, the counter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import BLOCK, OPTIONS, cleared, load, on, pieces, scalar, scalar_arguments, store, total


@triton.jit
def entries(n, BLOCK: tl.constexpr):
    """(indices of this program, which of them exist)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < n


@triton.jit
def lerp_kernel(a, b, out, n, alpha, alpha_pointer, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    alpha = scalar(alpha, alpha_pointer)
    store(out, i, (1.0 - alpha) * load(a, i, inside) + alpha * load(b, i, inside), inside, nonfinite)


@triton.jit
def axpy_kernel(theta, delta, out, n, c, c_pointer, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    store(out, i, load(theta, i, inside) + scalar(c, c_pointer) * load(delta, i, inside), inside, nonfinite)


@triton.jit
def fisher_merge_kernel(theta_t, fisher_t, theta, fisher, n, lam, lam_pointer, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    lam = scalar(lam, lam_pointer)
    new = lam * load(fisher_t, i, inside)
    mixed = new + (1.0 - lam) * load(fisher, i, inside)
    known = mixed != 0.0
    w = tl.where(known, new, lam) / tl.where(known, mixed, 1.0)
    store(theta, i, (1.0 - w) * load(theta, i, inside) + w * load(theta_t, i, inside), inside, nonfinite)
    store(fisher, i, mixed, inside, nonfinite)


@triton.jit
def pam_accumulate_kernel(fisher, theta, initial, total, moment, n, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    f = load(fisher, i, inside)
    store(total, i, load(total, i, inside) + f, inside, nonfinite)
    moved = load(theta, i, inside) - load(initial, i, inside)
    store(moment, i, load(moment, i, inside) + f * moved, inside, nonfinite)


@triton.jit
def larger(new, kept):
    """The later value wins ties; a NaN on either side stays."""
    return tl.where((tl.abs(new) < tl.abs(kept)) | (kept != kept), kept, new)


@triton.jit
def magmax_update_kernel(theta, initial, kept, n, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    store(kept, i, larger(load(theta, i, inside) - load(initial, i, inside), load(kept, i, inside)), inside, nonfinite)


@triton.jit
def magmax_delta_kernel(delta, kept, n, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    store(kept, i, larger(load(delta, i, inside), load(kept, i, inside)), inside, nonfinite)


@triton.jit
def fisher_accumulate_kernel(gradient, fisher, n, scale, scale_pointer, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    g = load(gradient, i, inside)
    store(fisher, i, load(fisher, i, inside) + scalar(scale, scale_pointer) * (g * g), inside, nonfinite)


@triton.jit
def ewc_gradient_kernel(fisher, theta, anchor, gradient, n, lam, lam_pointer, nonfinite, BLOCK: tl.constexpr):
    i, inside = entries(n, BLOCK)
    pull = load(fisher, i, inside) * (load(theta, i, inside) - load(anchor, i, inside))
    store(gradient, i, load(gradient, i, inside) + scalar(lam, lam_pointer) * pull, inside, nonfinite)


KERNELS = {
    "lerp": lerp_kernel,
    "axpy": axpy_kernel,
    "fisher_merge_": fisher_merge_kernel,
    "pam_accumulate_": pam_accumulate_kernel,
    "magmax_update_": magmax_update_kernel,
    "magmax_delta_": magmax_delta_kernel,
    "fisher_accumulate_": fisher_accumulate_kernel,
    "ewc_gradient_": ewc_gradient_kernel,
}


def launch(name, vectors, numbers, nonfinite):
    n, nonfinite = vectors[0].numel(), cleared(nonfinite)
    if n:
        pairs = [argument for number in numbers for argument in scalar_arguments(number, vectors[0])]
        with on(vectors[0]):
            for start, stop, parts in pieces(*vectors):
                grid = (triton.cdiv(stop - start, BLOCK),)
                KERNELS[name][grid](*parts, stop - start, *pairs, nonfinite, BLOCK=BLOCK, **OPTIONS)


@triton.jit
def pam_sums_kernel(total, moment, merged, theta, initial, rows, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    p, q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        i = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        s, x = load(total, i, inside), load(merged, i, inside)
        d = load(theta, i, inside) - x
        p += (s * (x - load(initial, i, inside)) - load(moment, i, inside)) * d
        q += s * d * d
    row = rows + tl.program_id(0).to(tl.int64) * 2
    tl.store(row, tl.sum(p.to(tl.float64), 0))
    tl.store(row + 1, tl.sum(q.to(tl.float64), 0))


def pam_coefficient(*vectors):
    steps, parts = 8, pieces(*vectors)
    programs = [max(1, triton.cdiv(stop - start, BLOCK * steps)) for start, stop, _ in parts]
    rows = torch.empty(sum(programs), 2, dtype=torch.float64, device=vectors[0].device)
    with on(vectors[0]):
        for (start, stop, part), count, row in zip(parts, programs, rows.split(programs), strict=True):
            pam_sums_kernel[(count,)](*part, row, stop - start, BLOCK=BLOCK, STEPS=steps, **OPTIONS)
        return total(rows)
