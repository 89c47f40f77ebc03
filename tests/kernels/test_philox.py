"""Compare random numbers with the published Philox vectors, the numpy reference and the normal distribution.

Masks and normals come from the public op `trm_merge`, so the tests cover the numba loop, the interpreter and CUDA.
"""

from __future__ import annotations

import math

import fastmerge_kernels as fk
import numpy as np
import pytest
import torch
from fastmerge_kernels import reference
from fastmerge_kernels.philox import key_words, threshold
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import INTERPRET, LARGE

# Random123, tests/kat_vectors, lines "philox4x32 10": counter, key, result
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def mask(n, seed, subsequence, ratio, offset, device="cpu"):
    """Read the mask from `trm_merge`: 0 not replaced, 1 taken from previous, 2 taken from current."""
    previous, current = torch.full((n,), 1.0, device=device), torch.full((n,), 2.0, device=device)
    direction = torch.ones(3, dtype=torch.float64, device=device)
    merged = fk.trm_merge(
        previous, current, 0.5, 0.0, direction, seed=seed, subsequence=subsequence, ratio=ratio, offset=offset
    )
    return torch.where(merged == 1.5, 0.0, merged).cpu()


def normal(n, seed, subsequence, offset, device="cpu"):
    """Read r from `trm_merge`: with d = 0 and ||r|| = 1 it writes previous + r."""
    tiny, direction = (
        torch.full((n,), 1e-30, device=device),
        torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=device),
    )
    position = {"seed": seed, "subsequence": subsequence, "offset": offset, "replace": "none"}
    return fk.trm_merge(tiny, tiny, 0.0, 1.0, direction, **position).cpu()


def expected_mask(n, seed, subsequence, ratio, offset):
    replaced, from_previous = reference.replaced(n, seed, subsequence, ratio, offset)
    return torch.where(replaced, torch.where(from_previous, 1.0, 2.0), 0.0)


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_published_vectors(counter, key, result):
    from fastmerge_kernels.cpu import philox

    counter, key, result = ([int(word, 16) for word in text.split()] for text in (counter, key, result))
    assert reference.philox4x32(np.array(counter)[:, None], key)[:, 0].tolist() == result
    assert [int(w) for w in philox.philox(*(np.uint32(w) for w in counter + key))] == result


def test_the_map_uses_the_published_function():
    """With seed and subsequence 0, the words of counter 0 are those of the first published vector."""
    assert reference.random_words(512, 0, 0, "mask")[[0, 128, 256, 384]].tolist() == [
        int(w, 16) for w in KNOWN[0][2].split()
    ]


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 1_000_003, 2**31 - 5, 2**40 + 77, 2**61])
def test_mask_is_bit_identical(device, offset):
    for n, seed, ratio in ((1, 0, 0.6), (1500, 2**63 - 1, 0.6), (777, 123, 1.0), (777, 123, 0.0), (600, 5, 2**-32)):
        assert torch.equal(mask(n, seed, 7, ratio, offset, device), expected_mask(n, seed, 7, ratio, offset))


@settings(max_examples=6 if INTERPRET else 60, deadline=None)
@given(
    st.integers(1, 1500), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.floats(0, 1), st.integers(0, 2**61)
)
def test_mask_is_bit_identical_anywhere(n, seed, subsequence, ratio, offset):
    assert torch.equal(mask(n, seed, subsequence, ratio, offset), expected_mask(n, seed, subsequence, ratio, offset))


@pytest.mark.parametrize("offset", [0, 333, 2**33 + 1])
def test_normals_follow_the_formula(device, offset):
    error = normal(LARGE, 11, 3, offset, device).double() - reference.random_normal(LARGE, 11, 3, offset)
    assert error.abs().max() < 1e-6


def test_normals_are_normal():
    """Moments and tail are within five standard errors of N(0, 1); neighbours and subsequences are uncorrelated."""
    n = 8_000 if INTERPRET else 1_000_000
    z, other = normal(n, 1, 0, 0).double(), normal(n, 1, 1, 0).double()
    five = 5 / math.sqrt(n)
    assert abs(z.mean()) < five
    assert abs((z**2).mean() - 1) < five * math.sqrt(2)
    assert abs((z**3).mean()) < five * math.sqrt(15)
    assert abs((z**4).mean() - 3) < five * math.sqrt(96)
    assert abs((z.abs() > 2).double().mean() - 0.0455003) < five * math.sqrt(0.0455 * 0.9545)
    for shift in (1, 128, 256):
        assert abs((z[shift:] * z[:-shift]).mean()) < five
    assert abs((z * other).mean()) < five


def test_mask_and_normal_are_independent():
    n = LARGE
    z, replaced = normal(n, 4, 2, 0).double(), mask(n, 4, 2, 0.6, 0) > 0
    assert abs(replaced.double().mean() - 0.6) < 5 * math.sqrt(0.24 / n)
    assert abs(z[replaced].mean()) < 5 / math.sqrt(0.6 * n)
    words, normals = reference.random_words(n, 4, 2, "mask"), reference.random_words(n, 4, 2, "normal")
    assert not np.intersect1d(words[:2000], normals[:2000]).size > 2


def test_keys_reject_what_does_not_fit():
    assert key_words(2**63 - 1, 0)[:2] == (2**32 - 1, 2**31 - 1)
    assert (threshold(1.0), threshold(0.0), threshold(0.5)) == (2**32, 0, 2**31)
    for seed, subsequence in ((-1, 0), (2**63, 0), (0, -1), (0, 2**63)):
        with pytest.raises(ValueError, match="seed|subsequence"):
            key_words(seed, subsequence)
