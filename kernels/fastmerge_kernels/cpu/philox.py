"""Philox4x32-10 and Box-Muller as numba loops over one tile of 512 entries (see `philox.py` for the map)."""

from __future__ import annotations

import numpy as np

from ..philox import PURPOSES, TILE, key_words
from .cache import inline, part
from .memory import bits, floating, fma

MASK, NORMAL, MIX, DROP = (np.uint32(PURPOSES[p]) for p in ("mask", "normal", "mix", "drop"))

_u32, _u64, _f32 = np.uint32, np.uint64, np.float32


def key(seed: int, subsequence: int) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """`key_words` typed for the loops."""
    return tuple(np.uint32(word) for word in key_words(seed, subsequence))


@inline
def philox(x0, x1, x2, x3, k0, k1):
    """Ten rounds of Philox4x32 on four uint32 counters and two uint32 keys."""
    for _ in range(10):
        a = _u64(0xD2511F53) * _u64(x0)
        b = _u64(0xCD9E8D57) * _u64(x2)
        x0, x1, x2, x3 = _u32(b >> _u64(32)) ^ x1 ^ k0, _u32(b), _u32(a >> _u64(32)) ^ x3 ^ k1, _u32(a)
        k0 = _u32(k0 + _u32(0x9E3779B9))
        k1 = _u32(k1 + _u32(0xBB67AE85))
    return x0, x1, x2, x3


@part
def words(u, tile, key, purpose):
    """Fill u [512] uint32 with the words of one tile, in the order of its entries."""
    counter = _u64(tile) * _u64(128)
    low = _u32(counter & _u64(0xFFFFFFFF))  # the tile's 128 counters never carry into the high word
    high = _u32(counter >> _u64(32)) | _u32(purpose << _u32(29))
    for lane in range(128):
        w0, w1, w2, w3 = philox(_u32(low + _u32(lane)), high, key[2], key[3], key[0], key[1])
        u[lane] = w0
        u[lane + 128] = w1
        u[lane + 256] = w2
        u[lane + 384] = w3


@inline
def box_muller(a, b):
    """Two standard normals from two uint32 words."""
    # ln(k / 2^24) with k = 2^e m, m in [sqrt(1/2), sqrt(2))
    k = bits(_f32(np.int32((a >> _u32(8)) + _u32(1))))
    shifted = np.int32(k - _u32(0x3F3504F3))
    e = _f32((shifted >> np.int32(23)) - np.int32(24))
    f = floating(_u32((_u32(shifted) & _u32(0x7FFFFF)) + _u32(0x3F3504F3))) - _f32(1.0)
    y = fma(_f32(7.0376836292e-2), f, _f32(-1.1514610310e-1))
    y = fma(y, f, _f32(1.1676998740e-1))
    y = fma(y, f, _f32(-1.2420140846e-1))
    y = fma(y, f, _f32(1.4249322787e-1))
    y = fma(y, f, _f32(-1.6668057665e-1))
    y = fma(y, f, _f32(2.0000714765e-1))
    y = fma(y, f, _f32(-2.4999993993e-1))
    y = fma(y, f, _f32(3.3333331174e-1))
    ff = f * f
    y = fma(y * f, ff, fma(e, _f32(-2.12194440e-4), _f32(-0.5) * ff))
    radius = np.sqrt(_f32(-2.0) * fma(e, _f32(0.693359375), f + y))
    # angle = quadrant * pi / 2 + t, |t| <= pi / 4
    quadrant = _u32(b + _u32(1 << 29)) >> _u32(30)
    t = _f32(np.int32(b - _u32(quadrant << _u32(30)))) * _f32(1.4629180792671596e-09)  # pi / 2^31
    tt = t * t
    s = fma(fma(fma(_f32(-1.9515295891e-4), tt, _f32(8.3321608736e-3)), tt, _f32(-1.6666654611e-1)) * tt, t, t)
    c = fma(fma(_f32(2.443315711809948e-5), tt, _f32(-1.388731625493765e-3)), tt, _f32(4.166664568298827e-2))
    c = fma(c * tt, tt, fma(_f32(-0.5), tt, _f32(1.0)))
    odd = (quadrant & _u32(1)) != _u32(0)
    cosine = bits(s if odd else c) ^ ((_u32(quadrant + _u32(1)) & _u32(2)) << _u32(30))
    sine = bits(c if odd else s) ^ ((quadrant & _u32(2)) << _u32(30))
    return radius * floating(_u32(cosine)), radius * floating(_u32(sine))


@part
def normals(z, u, tile, key):
    """Fill z [512] fp32 with the standard normals of one tile; u [512] uint32 is scratch."""
    words(u, tile, key, NORMAL)
    for lane in range(128):
        z[lane], z[lane + 128] = box_muller(u[lane], u[lane + 128])
    for lane in range(128):
        z[lane + 256], z[lane + 384] = box_muller(u[lane + 256], u[lane + 384])


@part
def block_words(u, block, key, purpose):
    """Fill u, whole tiles long, with the words of the block-th stretch of that length."""
    tiles = u.size // TILE
    for t in range(tiles):
        words(u[t * TILE : (t + 1) * TILE], block * tiles + t, key, purpose)


@inline
def block_span(block, size, start, stop, offset):
    """Entries start..stop-1 that lie in this block: (first local index, first index inside the block, count)."""
    base = block * size - offset
    first = max(start, base)
    return first, first - base, min(stop, base + size) - first


@inline
def tile_span(tile, start, stop, offset):
    """`block_span` of one tile."""
    return block_span(tile, TILE, start, stop, offset)
