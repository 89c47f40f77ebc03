"""Philox4x32-10 and Box-Muller in Triton (see `philox.py` for the map): LANES counters serve 4 * LANES entries."""

from __future__ import annotations

import triton
import triton.language as tl

from ..philox import TILE, key_words
from .launch import int32


@triton.jit
def counters(first_tile, loaded, LANES: tl.constexpr):
    """64-bit counters of the LANES / 128 tiles from `first_tile` (int64) on, in the layout of `loaded`.

    loaded: fp32 [LANES], entries that the program has read. Adding a zero that depends on them gives a thread the counters of
    the entries that it holds; else Triton gives it others and moves all words through shared memory. Triton keeps this zero,
    LLVM removes it.
    """
    zero = (loaded.to(tl.int32, bitcast=True) & 1) >> 1
    return first_tile * 128 + (tl.arange(0, LANES) + zero)


@triton.jit
def positions(LANES: tl.constexpr):
    """Where word 0 of each counter goes, relative to the first tile; word w goes 128 w further."""
    lane = tl.arange(0, LANES)
    return (lane // 128) * 512 + lane % 128


@triton.jit
def words(counter, k0, k1, s0, s1, PURPOSE: tl.constexpr):
    """The four uint32 words of each counter. k0, k1, s0, s1: int32 bits of `key_words`."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32) | (PURPOSE << 29)
    s0, s1 = s0.to(tl.uint32, bitcast=True), s1.to(tl.uint32, bitcast=True)
    return philox(low, high, s0, s1, k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True))


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 with one 64-bit product where `tl.philox_impl` has two of 32 bits. All arguments are uint32."""
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):
    """Two blocks of standard normals from two blocks of words; the arithmetic of `cpu.philox.box_muller`."""
    k = ((a >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    shifted = k - 0x3F3504F3
    e = ((shifted >> 23) - 24).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    y = 7.0376836292e-2 * f - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    ff = f * f
    y = y * f * ff + e * -2.12194440e-4 - 0.5 * ff
    radius = tl.sqrt(-2.0 * (f + y + e * 0.693359375))
    quadrant = (b + (1 << 29)) >> 30
    t = (b - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    tt = t * t
    s = ((-1.9515295891e-4 * tt + 8.3321608736e-3) * tt - 1.6666654611e-1) * tt * t + t
    c = (2.443315711809948e-5 * tt - 1.388731625493765e-3) * tt + 4.166664568298827e-2
    c = c * tt * tt - 0.5 * tt + 1.0
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    return radius * cosine.to(tl.float32, bitcast=True), radius * sine.to(tl.float32, bitcast=True)


@triton.jit
def normals(counter, k0, k1, s0, s1):
    """The standard normals of each counter's four entries."""
    w0, w1, w2, w3 = words(counter, k0, k1, s0, s1, 1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


def key(seed: int, subsequence: int) -> tuple[int, int, int, int]:
    """`key_words` as launch arguments."""
    return tuple(int32(word) for word in key_words(seed, subsequence))


def tiles(offset: int, length: int) -> tuple[int, int, int]:
    """(first tile, entries of it that lie before the vector, number of tiles) of positions offset .. offset + length - 1."""
    first = offset // TILE
    return first, offset - first * TILE, (offset + length - 1) // TILE + 1 - first


def lanes(*tensors) -> int:
    """Counters of a program: 128-bit accesses need 4 fp32 or 8 half-precision entries per thread and run."""
    return 128 * (4 if all(x is None or x.element_size() == 4 for x in tensors) else 8)
