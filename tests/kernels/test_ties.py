"""Compare TIES with its float64 definition (`reference.ties`), and the list op with the streaming ops."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from fastmerge_kernels import reference
from fastmerge_kernels.ties import CONVENTIONS
from oracle import DTYPES, INTERPRET, assert_rounded, vectors

N = 1200 if INTERPRET else 70_000


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


def stream(models, initial, convention, bounds, weights, keep="exactly", scale=0.7):
    """Compute `ties_merge` with the streaming ops."""
    rule = CONVENTIONS[convention]
    state = [torch.zeros(initial.shape, device=initial.device) for _ in range(4)]
    mass = torch.zeros_like(state[0]) if rule["elect"] == "unweighted" else None
    counts = [max(rule["smallest"], int(0.2 * (b - a))) for a, b in itertools.pairwise(bounds)]
    for model, weight in zip(models, weights, strict=True):
        threshold, cut = fk.magnitude_threshold(model, counts, initial=initial, segments=bounds, keep=keep)
        trim = {"threshold": threshold, "cut": cut, "segments": bounds}
        fk.ties_update_(*state, model, initial=initial, weight=weight, count=rule["count"], mass=mass, **trim)
    return fk.ties_finalize(*state, mass=mass, initial=initial, scale=scale, zero=rule["zero"])


@pytest.mark.parametrize("convention", ["paper", "mergekit", "peft"])
@pytest.mark.parametrize("keep", ["at least", "exactly"])
def test_list_and_stream_give_the_same_bits(device, convention, keep):
    """On a lattice many kept entries cancel exactly, which tests the rule for zero mass; `out` may be an input."""
    generator = torch.Generator().manual_seed(5)
    others = 2 if INTERPRET else 4
    initial, *models = ((torch.randn(N, generator=generator) * 2).round().to(device) for _ in range(1 + others))
    models.append(initial - 1)  # more negative signs than positive
    cases = [([0, N], [1.0] * 5, 0), ([0, 7, 1000, N], [1.0, 0.5, 2.0, 1.0, 0.25], 2)]
    if INTERPRET:  # slow: one of them for each convention, the other one with the other `keep`
        cases = [cases[(("exactly" == keep) + ("paper" == convention)) % 2]]
    for bounds, weights, k in cases:
        weights = weights[: len(models)]
        expected = stream(models, initial, convention, bounds, weights, keep)
        merged = fk.ties_merge(
            models, initial=initial, convention=convention, segments=bounds, weights=weights, keep=keep, scale=0.7
        )
        assert torch.equal(merged, expected)
        inputs = [initial.clone(), *(m.clone() for m in models)]
        fk.ties_merge(
            inputs[1:], initial=inputs[0], convention=convention, segments=bounds, weights=weights, keep=keep,
            scale=torch.tensor(0.7), out=inputs[k],  # initial, or a model
        )  # fmt: skip
        assert torch.equal(inputs[k], expected)


def test_mixed_types(device):
    initial, *models = (v.to(device) for v in vectors(4, N))
    models = [m.to(t) for m, t in zip(models, DTYPES, strict=True)]
    merged = fk.ties_merge(models, initial=initial)
    expected = reference.ties(
        [m.cpu() for m in models], initial=initial.cpu(), counts=[int(0.2 * N)], segments=[0, N], weights=[1.0] * 3
    )
    assert_rounded(merged, expected, initial.double().abs().cpu() + 2)


def test_small_cases(device):
    """Merging one model at density 1 returns it; tiny tensors and entries that cancel follow the convention."""
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


@pytest.mark.skipif(INTERPRET, reason="tests the threads of the numba loops")
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
        (lambda: fk.ties_update_(*state, x, weight=-1.0), "weight: expected a positive number"),
        (lambda: fk.ties_update_(*state, x, threshold=torch.zeros(2)), "threshold: expected torch.float32 .1."),
        (lambda: fk.ties_update_(*state[:3], state[0], x), "negative_count: shares memory with positive"),
        (lambda: fk.ties_merge([], initial=x), "models: expected at least one"),
        (lambda: fk.ties_merge([x], initial=x, density=1.2), "density: expected a number in .0, 1."),
        (
            lambda: fk.ties_merge([x], initial=x, convention="papers"),
            "convention: expected one of paper, mergekit, peft",
        ),
        (lambda: fk.ties_merge([x], initial=x, weights=[1.0, 2.0]), "weights: expected 1 positive"),
        (lambda: fk.ties_merge([x], initial=x, weights=[0.0]), "weights: expected 1 positive"),
        (lambda: fk.ties_merge([x], initial=x, out=torch.zeros(9)), "out: expected shape .10."),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
