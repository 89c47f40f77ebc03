"""TIES and its thresholds: against sorting, the definition in float64 (`reference.ties`), and peft and mergekit."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from fastmerge_kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, INTERPRET, assert_rounded, vectors

N = 1200 if INTERPRET else 70_000


def kept(x, threshold, cut):
    """The rule of `ties.py`, on one segment."""
    bits, limit = x.abs().float().view(torch.int32), threshold.view(torch.int32)
    return (bits > limit) | ((bits == limit) & (torch.arange(len(x), device=x.device) <= cut))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["at least", "exactly"])
def test_threshold_equals_sorting(device, dtype, keep):
    """The k-th largest of a sort, for values with and without ties; bf16 and fp16 have many."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    for k in (0, 1, N // 5, N - 1, N):
        threshold, cut = fk.magnitude_threshold(x, k, keep=keep)
        if k:
            assert threshold.item() == x.abs().float().cpu().sort(descending=True).values[k - 1].item()
        expected = reference.keep_largest(x.abs().float().cpu(), k, keep)
        assert torch.equal(kept(x, threshold, cut).cpu(), expected)


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


def test_histograms_of_shards_add_up(device):
    x, initial = (v.to(device) for v in vectors(2, N))
    whole = fk.magnitude_histogram(x, initial=initial)
    parts = [fk.magnitude_histogram(x[a:b].clone(), initial=initial[a:b].clone()) for a, b in ((0, 333), (333, N))]
    bits = (x - initial).abs().view(torch.int32)
    assert torch.equal(whole, parts[0] + parts[1])
    assert torch.equal(whole.cpu(), torch.bincount((bits >> 15).cpu(), minlength=65536))
    high = whole.argmax()[None]
    chosen = bits[(bits >> 15) == high] & 0x7FFF
    assert torch.equal(
        fk.magnitude_histogram(x, initial=initial, high=high).cpu(), torch.bincount(chosen.cpu(), minlength=32768)
    )


@pytest.mark.parametrize("convention", ["paper", "mergekit", "peft"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("weights", [None, (1.0, 0.25, 2.0, 0.5)])
def test_merge_equals_the_definition(device, convention, per_tensor, weights):
    initial, *models = (v.to(device) for v in vectors(5, N))
    bounds = [0, 5, 1000, N] if per_tensor else [0, N]
    smallest = 0 if convention == "peft" else 1
    counts = [max(smallest, int(0.2 * (b - a))) for a, b in itertools.pairwise(bounds)]
    merged = fk.ties_merge(
        models,
        initial=initial,
        convention=convention,
        segments=bounds if per_tensor else None,
        weights=weights,
        scale=0.7,
    )
    expected = reference.ties(
        [m.cpu() for m in models], initial=initial.cpu(), counts=counts, segments=bounds,
        weights=weights or (1.0,) * 4, convention=convention, scale=0.7,
    )  # fmt: skip
    assert_rounded(merged, expected, initial.double().abs().cpu() + 2)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_models(device, dtype):
    initial, *models = (v.to(dtype).to(device) for v in vectors(4, N))
    for keep in ("at least", "exactly"):
        merged = fk.ties_merge(models, initial=initial, density=0.3, keep=keep)
        expected = reference.ties(
            [m.cpu() for m in models],
            initial=initial.cpu(),
            counts=[int(0.3 * N)],
            segments=[0, N],
            weights=[1.0] * 3,
            keep=keep,
        )
        assert_rounded(merged, expected, initial.double().abs().cpu() + 2)


def test_small_cases(device):
    """Density 1 of one model is the model; tiny tensors keep an entry; equal and opposite entries follow the convention."""
    initial, model = (v.to(device) for v in vectors(2, 500))
    torch.testing.assert_close(fk.ties_merge([model], initial=initial, density=1.0), model, rtol=0, atol=2e-7)
    for n in (1, 4, 8):
        zero = torch.zeros(n, device=device)
        for convention, entries in (("paper", max(1, n // 5)), ("mergekit", max(1, n // 5)), ("peft", n // 5)):
            merged = fk.ties_merge([zero + 3], initial=zero, convention=convention)
            assert int((merged == 3).sum()) == entries and int((merged == 0).sum()) == n - entries
    zero, cancel = torch.zeros(4, device=device), torch.tensor([1.0, -2.0, -2.0, -2.0], device=device)
    opposite = cancel * torch.tensor([-1.0, 1.0, 1.0, 1.0], device=device)
    for convention, first in (("paper", -1.0), ("mergekit", 1.0), ("peft", 1.0)):
        merged = fk.ties_merge([cancel, opposite], initial=zero, density=1.0, convention=convention)
        assert merged.tolist() == [first, -2.0, -2.0, -2.0]


def test_nan_is_not_dropped(device):
    initial, model = torch.zeros(100, device=device), torch.ones(100, device=device)
    model[7] = float("nan")
    bad = torch.zeros(1, dtype=torch.int64, device=device)
    merged = fk.ties_merge([model, -model], initial=initial, density=0.05, nonfinite=bad)
    assert bad.item() == 1 and merged[7].isnan()


@pytest.mark.skipif(INTERPRET, reason="threads of the numba loops")
def test_results_do_not_depend_on_threads():
    initial, *models = vectors(4, 300_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(fk.ties_merge(models, initial=initial, segments=[0, 70_000, 300_001]))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(threads)


def test_bad_arguments_are_named():
    x = torch.ones(10)
    state = [torch.zeros(10) for _ in range(4)]
    cases = [
        (lambda: fk.magnitude_threshold(x, 11), "k: expected 0 <= k <= 10"),
        (lambda: fk.magnitude_threshold(x, [1, 2]), "k: expected one number or 1"),
        (lambda: fk.magnitude_threshold(x, 1, keep="most"), "keep: expected one of at least, exactly"),
        (lambda: fk.magnitude_threshold(x, 1, segments=[0, 11]), "segments: expected ascending boundaries 0, ..., 10"),
        (lambda: fk.magnitude_threshold(x, 1, segments=[0, 7, 5, 10]), "segments: expected ascending"),
        (lambda: fk.ties_update_(*state, x, weight=-1.0), "weight: expected a positive number"),
        (lambda: fk.ties_update_(*state, x, threshold=torch.zeros(2)), "threshold: expected torch.float32 .1."),
        (lambda: fk.ties_update_(*state[:3], state[0], x), "negative_count: shares memory with positive"),
        (lambda: fk.ties_merge([], initial=x), "models: expected at least one"),
        (lambda: fk.ties_merge([x], initial=x, density=1.2), "density: expected a number in .0, 1."),
        (
            lambda: fk.ties_merge([x], initial=x, convention="papers"),
            "convention: expected one of paper, mergekit, peft",
        ),
        (lambda: fk.ties_merge([x], initial=x, weights=[1.0, 2.0]), "weights: expected 1"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.25, 2.0)])
def test_equals_peft(weights):
    utilities = pytest.importorskip("peft.utils.merge_utils")
    initial, *models = vectors(4, 5000)
    deltas = [m - initial for m in models]
    expected = initial + utilities.ties(deltas, torch.tensor(weights), 0.2, majority_sign_method="total")
    merged = fk.ties_merge(models, initial=initial, convention="peft", weights=weights)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.25, 2.0)])
def test_equals_mergekit(weights):
    methods = pytest.importorskip("mergekit.merge_methods")
    initial, *models = vectors(4, 5000)
    inputs = {"base": {"w": initial}} | {f"m{k}": {"w": m} for k, m in enumerate(models)}
    parameters = {"weight": {f"m{k}": w for k, w in enumerate(weights)}, "density": 0.2}
    with torch.no_grad():
        expected = methods.merge_state_dicts(inputs, "ties", base="base", parameters=parameters)["w"]
    merged = fk.ties_merge(models, initial=initial, convention="mergekit", weights=weights, segments=[0, 5000])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
