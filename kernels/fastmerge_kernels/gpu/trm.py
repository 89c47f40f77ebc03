"""Triton kernels of `trm.py`: a program takes LANES counters, that is LANES / 128 tiles of 512 entries, a run at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..philox import threshold
from .launch import OPTIONS, cleared, int32, load, on, pieces, scalar, scalar_arguments, store, total
from .philox import counters, key, lanes, normals, positions, tiles, words

SPANS = 8  # spans of LANES counters that one program of a reduction adds up; 1 in vectors too short to fill a GPU
WARPS = 4
ROW = 3


@triton.jit
def is_replaced(u, last):
    return u <= last.to(tl.uint32, bitcast=True)


_FREE = ["first_tile", "k0", "k1", "s0", "s1", "last", "half"]  # values for which no new kernel shall be compiled


@triton.jit(do_not_specialize=_FREE[:-1])
def sums_kernel(
    previous, current, gradient, gradient2, scale2, rows, n, first_tile, shift, k0, k1, s0, s1, last,
    MASKED: tl.constexpr, LANES: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """One row per program: (<r,d>, <d,d>, <r,r>), or with a gradient (<G,d>, <G,r>, <G,G>)."""
    x, y, w = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    scale2 = tl.cast(scale2, tl.float32)
    span = tl.program_id(0).to(tl.int64) * SPANS
    for step in range(SPANS):
        base = (span + step) * (LANES * 4) - shift
        for run in tl.static_range(4):
            i = base + positions(LANES) + run * 128
            inside = (i >= 0) & (i < n)
            a, b = load(previous, i, inside), load(current, i, inside)
            if run == 0:
                counter = counters(first_tile + (span + step) * (LANES // 128), a, LANES)
                z = normals(counter, k0, k1, s0, s1)
                if MASKED:
                    u = words(counter, k0, k1, s0, s1, 0)
            keep = (a != 0.0) | (b != 0.0)
            if MASKED:
                keep = keep & ~is_replaced(u[run], last)
            r, d = tl.where(keep, z[run], 0.0), tl.where(keep, b - a, 0.0)
            if gradient is None:
                x += r * d
                y += d * d
                w += r * r
            else:
                g = load(gradient, i, inside)
                if gradient2 is not None:
                    g += scale2 * load(gradient2, i, inside)
                x += g * d
                y += g * r
                w += g * g
    row = rows + tl.program_id(0).to(tl.int64) * 3
    tl.store(row, tl.sum(x.to(tl.float64), 0))
    tl.store(row + 1, tl.sum(y.to(tl.float64), 0))
    tl.store(row + 2, tl.sum(w.to(tl.float64), 0))


@triton.jit
def perpendicular(direction):
    """`trm.perpendicular` in float64 on the device: (<r,d>/<d,d>, 1/||r - c d||) with both degenerate cases."""
    rd, dd, rr = tl.load(direction), tl.load(direction + 1), tl.load(direction + 2)
    c = tl.where(dd == 0.0, 0.0, rd / tl.where(dd == 0.0, 1.0, dd))
    square = rr - c * rd
    degenerate = square <= 1e-6 * rr
    return c, tl.where(degenerate, 0.0, 1.0 / tl.sqrt(tl.where(degenerate, 1.0, square)))


@triton.jit
def project_kernel(sums, direction):
    """(<G,d>, <G,r>, <G,G>) becomes (<G,d>, <G,P>, <G,G>)."""
    c, scale = perpendicular(direction)
    tl.store(sums + 1, scale * (tl.load(sums + 1) - c * tl.load(sums)))


@triton.jit
def plane_kernel(direction, plane):
    """plane: fp32 (c, 1/||r - c d||). Once, because every thread of `merge_kernel` would repeat it in float64."""
    c, scale = perpendicular(direction)
    tl.store(plane, c.to(tl.float32))
    tl.store(plane + 1, scale.to(tl.float32))


@triton.jit(do_not_specialize=_FREE)
def merge_kernel(
    previous, current, initial, out, n, alpha, alpha_pointer, beta, beta_pointer, plane, nonfinite,
    first_tile, shift, k0, k1, s0, s1, last, half, MASKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0).to(tl.int64)
    base = span * (LANES * 4) - shift
    alpha, beta = scalar(alpha, alpha_pointer), scalar(beta, beta_pointer)
    c, scale = tl.load(plane), beta * tl.load(plane + 1)
    for run in tl.static_range(4):
        i = base + positions(LANES) + run * 128
        inside = (i >= 0) & (i < n)
        a, b = load(previous, i, inside), load(current, i, inside)
        if run == 0:
            counter = counters(first_tile + span * (LANES // 128), a, LANES)
            z = normals(counter, k0, k1, s0, s1)
            if MASKED:
                u = words(counter, k0, k1, s0, s1, 0)
        d = b - a
        step = scale * (z[run] - c * d)
        if MASKED:
            chosen = tl.where(u[run] < half.to(tl.uint32, bitcast=True), a, b)
        if initial is None:
            value = a + alpha * d + step
            if MASKED:
                value = tl.where(is_replaced(u[run], last), chosen, value)
        else:
            start = load(initial, i, inside)
            value = start
            if MASKED:
                value = tl.where(is_replaced(u[run], last), chosen, start)
            value = value + alpha * (b - start) + (1.0 - alpha) * (a - start) + step
        value = tl.where((a != 0.0) | (b != 0.0), value, 0.0)
        store(out, i, value, inside, nonfinite)


def _mask(replace, ratio):
    """(last replaced word, whether there is a mask)."""
    masked = replace != "none" and threshold(ratio) > 0
    return int32(threshold(ratio) - 1) if masked else 0, masked


def _sums(gradient, gradient2, scale2, previous, current, seed, subsequence, replace, ratio, offset):
    last, masked = _mask("none" if replace == "literal" else replace, ratio)
    size, words, launches = lanes(gradient, gradient2, previous, current), key(seed, subsequence), []
    for start, stop, vectors in pieces(previous, current, gradient, gradient2, offset=offset):
        first, shift, count = tiles(offset + start, stop - start)
        spans = SPANS if count >= 4096 else 1
        launches.append((triton.cdiv(count * 128, size * spans), spans, vectors, (stop - start, first, shift)))
    programs = [launch[0] for launch in launches]
    rows = torch.empty(sum(programs), ROW, dtype=torch.float64, device=previous.device)
    for (count, spans, (a, b, g, g2), place), row in zip(launches, rows.split(programs), strict=True):
        sums_kernel[(count,)](
            a, b, g, g2, scale2, row, *place, *words, last,
            MASKED=masked, LANES=size, SPANS=spans, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return total(rows)


def direction(previous, current, *position):
    if previous.numel() == 0:
        return torch.zeros(ROW, dtype=torch.float64, device=previous.device)
    with on(previous):
        return _sums(None, None, 0.0, previous, current, *position)


def gradient(gradient, gradient2, scale2, previous, current, direction, *position):
    if previous.numel() == 0:
        return torch.zeros(ROW, dtype=torch.float64, device=previous.device)
    with on(previous):
        sums = _sums(gradient, gradient2, scale2, previous, current, *position)
        project_kernel[(1,)](sums, direction, num_warps=1, **OPTIONS)
        return sums


def merge(
    previous, current, initial, alpha, beta, direction, seed, subsequence, replace, ratio, offset, out, nonfinite
):
    size, nonfinite = lanes(previous, current, initial, out), cleared(nonfinite)
    if previous.numel() == 0:
        return
    last, masked = _mask(replace, ratio)
    numbers = (*scalar_arguments(alpha, previous), *scalar_arguments(beta, previous))
    words, half = key(seed, subsequence), int32(threshold(ratio / 2))
    plane = torch.empty(2, dtype=torch.float32, device=previous.device)
    with on(previous):
        plane_kernel[(1,)](direction, plane, num_warps=1, **OPTIONS)
        for start, stop, vectors in pieces(previous, current, initial, out, offset=offset):
            first, shift, count = tiles(offset + start, stop - start)
            merge_kernel[(triton.cdiv(count * 128, size),)](
                *vectors, stop - start, *numbers, plane, nonfinite, first, shift, *words, last, half,
                MASKED=masked, LANES=size, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
