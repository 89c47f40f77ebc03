"""Random numbers as a function of position: Philox4x32-10 (Salmon et al., SC 2011), the only source of randomness here.

Every entry has a 64-bit absolute position: its index in the *whole* parameter vector, `offset + i`. Nothing else (device,
shard, chunk, thread) decides which number it gets. Positions are taken in tiles of 512:

    tile, q  = position // 512, position % 512
    counter  = tile * 128 + q % 128        the lane's counter
    word     = q // 128                    which of its four 32-bit words

so word w of 128 consecutive counters serves the w-th run of 128 entries, and neither a GPU nor a SIMD loop has to shuffle.
The 64 + 128 bits that Philox takes are

    key      = (seed low, seed high)                                                    seed in [0, 2^63)
    counter  = (counter low, counter high | purpose << 29, subsequence low, subsequence high)     subsequence in [0, 2^63)

so subsequences and purposes (mask, normal, ...) of one seed never overlap: Philox is a bijection of the counter for each key.

Normals are Box-Muller pairs (a, b) from words (0, 1) and (2, 3) of one counter:

    radius = sqrt(-2 ln(((a >> 8) + 1) / 2^24)),   angle = 2 pi b / 2^32,   (radius cos(angle), radius sin(angle))

with our own polynomials for ln, sin and cos (Cephes; the result is good to about 1e-6), so that CPU and GPU agree and the CPU
loop vectorises. Masks compare the word as an integer and are equal bit for bit everywhere.
"""

from __future__ import annotations

TILE = 512
RUN = 128
PURPOSES = {"mask": 0, "normal": 1, "mix": 2, "drop": 3}


def key_words(seed: int, subsequence: int) -> tuple[int, int, int, int]:
    """(seed low, seed high, subsequence low, subsequence high), each in [0, 2^32). Raises ValueError outside [0, 2^63)."""
    for name, value in (("seed", seed), ("subsequence", subsequence)):
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{name}: expected an integer in [0, 2**63), got {value}")
    return seed & 0xFFFFFFFF, seed >> 32, subsequence & 0xFFFFFFFF, subsequence >> 32


def check_span(offset: int, length: int) -> None:
    """Raise ValueError unless positions offset .. offset + length - 1 lie in [0, 2^62)."""
    if offset < 0 or offset + length > 1 << 62:
        raise ValueError(f"offset: expected 0 <= offset <= 2**62 - length, got {offset} with length {length}")


def threshold(probability: float) -> int:
    """floor(probability * 2^32): a 32-bit word u < threshold has this probability. In [0, 2^32]."""
    return int(probability * 4294967296.0)  # exact: multiplying by a power of two only moves the exponent
