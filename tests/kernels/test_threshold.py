"""Compare the k-th largest magnitude with sorting: ties, NaN, segments, misleading samples, threads, shards."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import numpy as np
import pytest
import torch
from fastmerge_kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, INTERPRET, vectors

N = 1200 if INTERPRET else 70_000


def kept(x, threshold, cut):
    """Return the mask of kept entries by the rule of `ties.py`, on one segment."""
    bits, limit = x.abs().float().view(torch.int32), threshold.view(torch.int32)
    return (bits > limit) | ((bits == limit) & (torch.arange(len(x), device=x.device) <= cut))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["at least", "exactly"])
def test_threshold_equals_sorting(device, dtype, keep):
    """The threshold is the k-th largest of a sort, with and without ties; bf16 and fp16 have many ties."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    for k in (0, 1, N // 5, N - 1, N):
        threshold, cut = fk.magnitude_threshold(x, k, keep=keep)
        if k:
            assert threshold.item() == x.abs().float().cpu().sort(descending=True).values[k - 1].item()
        expected = reference.keep_largest(x.abs().float().cpu(), k, keep)
        assert torch.equal(kept(x, threshold, cut).cpu(), expected)
        if k and (keep == "at least" or (x.abs() >= threshold).sum() == k):
            assert cut.item() == N  # no tie is left out


@settings(max_examples=3 if INTERPRET else 60, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-42, -3e38, 65504.0, float("inf")]), min_size=1, max_size=60
    ),
    st.data(),
)
def test_threshold_of_many_ties(values, data):
    x = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    for keep in ("at least", "exactly"):
        assert torch.equal(kept(x, *fk.magnitude_threshold(x, k, keep=keep)), reference.keep_largest(x.abs(), k, keep))


def test_threshold_per_segment(device):
    x, initial = (v.to(device) for v in vectors(2, N))
    bounds = [0, 1, 17, 17, N // 2, N]
    counts = [1, 3, 0, 100, N // 4]
    thresholds, cuts = fk.magnitude_threshold(x, counts, initial=initial, segments=bounds, keep="exactly")
    for k, (a, b), t, c in zip(counts, itertools.pairwise(bounds), thresholds, cuts, strict=True):
        d = (x - initial)[a:b]
        assert torch.equal(kept(d, t, c - a).cpu(), reference.keep_largest(d.abs().cpu(), k, "exactly"))


def test_many_equal_values_in_several_chunks(device):
    """On a GPU a chunk of 4096 has slots for 512 entries near the threshold; here most chunks have more of them."""
    n = 9000
    x = (3 * torch.randn(n, generator=torch.Generator().manual_seed(4))).round().to(device)
    x[4096:4400] = torch.randn(304, generator=torch.Generator().manual_seed(5)).to(device)
    x[8192:] += 0.001
    for bounds, counts in (([0, n], [n // 3]), ([0, 5000, n], [2, 3999])):
        thresholds, cuts = fk.magnitude_threshold(x, counts, segments=bounds, keep="exactly")
        for k, (a, b), t, c in zip(counts, itertools.pairwise(bounds), thresholds, cuts, strict=True):
            assert torch.equal(kept(x[a:b], t, c - a).cpu(), reference.keep_largest(x[a:b].abs().cpu(), k, "exactly"))


@pytest.mark.skipif(INTERPRET, reason="tests the brackets of the numba loops")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape", ["normal", "sorted", "periodic", "few values", "one spike", "all equal", "nan", "bf16"]
)
def test_values_that_mislead_a_sample(shape, threads, monkeypatch):
    """A misleading sample does not change the threshold; neither do threads that share a large segment."""
    from fastmerge_kernels.cpu import threshold

    monkeypatch.setattr(threshold, "LARGE", 50_000)
    n, generator = 200_003, torch.Generator().manual_seed(2)
    x = torch.randn(n, generator=generator)
    if shape == "sorted":
        x = x.sort().values
    elif shape == "periodic":
        x[::16] = 100.0
    elif shape == "few values":
        x = x.round()
    elif shape == "one spike":
        x = torch.zeros(n).index_fill_(0, torch.tensor([123_456]), 1.0)
    elif shape == "all equal":
        x = torch.full((n,), -3.0)
    elif shape == "nan":
        x[1000:1500] = float("nan")
        x[70_000:70_100] = float("inf")
    elif shape == "bf16":
        x = x.bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for k in (1, 2, 501, n // 5, n - 1, n):
            for keep in ("at least", "exactly"):
                limit, cut = fk.magnitude_threshold(x, [k, 7], segments=[0, n - 10, n], keep=keep) if k < n - 10 else (
                    torch.cat([fk.magnitude_threshold(x, k, keep=keep)[0]] * 2),
                    torch.cat([fk.magnitude_threshold(x, k, keep=keep)[1]] * 2),
                )  # fmt: skip
                part = x[: n - 10] if k < n - 10 else x
                bits = part.float().abs().view(torch.int32)  # orders NaN above infinity
                expected = reference.keep_largest(bits.double(), k, keep)
                assert torch.equal(kept(part, limit[0], cut[0]), expected), (k, keep)
    finally:
        torch.set_num_threads(before)


def test_histograms_of_shards_find_the_threshold(device):
    """Run the loop of the docstring over two shards with two segments each."""
    x, initial = (v.to(device) for v in vectors(2, N))
    shards = [(slice(0, 600), [0, 100, 600]), (slice(600, N), [0, 50, N - 600])]
    prefix, known, rank = None, 0, torch.tensor([40, 900 if INTERPRET else 9000], device=device)
    wanted = rank.tolist()
    for bits in (11, 8, 7, 5):
        counts = sum(
            fk.magnitude_histogram(
                x[part].clone(), initial=initial[part].clone(), segments=b, prefix=prefix, known=known, bits=bits
            )
            for part, b in shards
        )
        assert counts.shape == (2, 2**bits)
        digit, rank = fk.magnitude_digit(counts, rank)
        prefix, known = digit if prefix is None else prefix << bits | digit, known + bits
    magnitude = (x - initial).abs().cpu()
    parts = [torch.cat([magnitude[:100], magnitude[600:650]]), torch.cat([magnitude[100:600], magnitude[650:]])]
    expected = [p.sort(descending=True).values[k - 1] for p, k in zip(parts, wanted, strict=True)]
    assert prefix.view(torch.float32).tolist() == [v.item() for v in expected]


def test_bad_arguments_are_named():
    x, prefix = torch.ones(10), torch.zeros(1, dtype=torch.int32)
    cases = [
        (lambda: fk.magnitude_threshold(x, 11), "k: expected 0 <= k <= 10"),
        (lambda: fk.magnitude_threshold(x, [1, 2]), "k: expected one number or 1"),
        (lambda: fk.magnitude_threshold(x, 1, keep="most"), "keep: expected one of at least, exactly"),
        (lambda: fk.magnitude_threshold(x, 1, segments=[0, 11]), "segments: expected ascending boundaries 0, ..., 10"),
        (lambda: fk.magnitude_threshold(x, 1, segments=[0, 7, 5, 10]), "segments: expected ascending"),
        (lambda: fk.magnitude_histogram(x, bits=12), "bits: expected 1 to 11"),
        (
            lambda: fk.magnitude_histogram(x, bits=8, known=24, prefix=prefix),
            "bits: expected 1 to 11 of the 31 - known",
        ),
        (lambda: fk.magnitude_histogram(x, known=8), "prefix: needed for known > 0"),
        (lambda: fk.magnitude_histogram(x, prefix=prefix), "prefix: needed for known > 0 and only there"),
        (lambda: fk.magnitude_histogram(x, known=8, prefix=prefix.long()), "prefix: expected int32 .1."),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    for k in (2.5, [1.0], None):
        with pytest.raises(TypeError, match="k: expected a whole number, or one per segment"):
            fk.magnitude_threshold(x, k)
    for k in (np.int64(3), torch.tensor(3), torch.tensor([3]), np.array([3])):
        assert fk.magnitude_threshold(torch.arange(10.0), k)[0] == 7
