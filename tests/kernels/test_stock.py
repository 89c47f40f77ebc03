"""Compare Model Stock in O(T) with its definition over all pairs (`reference.stock`), segment norms with float64."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from fastmerge_kernels import reference
from oracle import DTYPES, INTERPRET, assert_rounded, assert_sums, vectors

N = 1300 if INTERPRET else 200_003
BOUNDS = [0, 3, 3, 16, N // 2, N - 100, N]


def near(count, n, dtype=torch.float32, device="cpu"):
    """Return [initial, *models]; the task vectors share a direction, so that cosines are between 0 and 1."""
    base = vectors(count + 2, n, seed=3)
    shared = base[1] - base[0]
    return [base[0].to(dtype).to(device)] + [(m + 2 * shared).to(dtype).to(device) for m in base[2:]]


def stream(initial, models, segments):
    total, units = torch.zeros_like(initial).float(), torch.zeros_like(initial).float()
    for model in models:
        fk.stock_update_(total, units, model, initial=initial, segments=segments)
    return total, units


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, repeat=2)))
def test_segment_norms(device, types):
    x, initial = (v.to(t) for v, t in zip(vectors(2, N, device=device), types, strict=True))
    d = x.double().cpu() - initial.double().cpu()
    expected = torch.stack([(d[a:b] ** 2).sum() for a, b in itertools.pairwise(BOUNDS)])
    assert_sums(fk.segment_norms(x, initial=initial, segments=BOUNDS), expected, expected)
    assert_sums(fk.segment_norms(x), (x.double().cpu() ** 2).sum()[None], (x.double().cpu() ** 2).sum()[None])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(device, count, dtype):
    initial, *models = near(count, N, dtype, device)
    for segments in (None, BOUNDS):
        total, units = stream(initial, models, segments)
        bad = torch.ones(1, dtype=torch.int64, device=device)
        out = torch.empty(N, device=device)
        fk.stock_finalize(total, units, count, initial=initial, segments=segments, out=out, nonfinite=bad)
        expected, ratios = reference.stock(
            [m.cpu() for m in models], initial=initial.cpu(), segments=segments or [0, N]
        )
        ratio = fk.stock_ratio(units, count, segments=segments).cpu()
        torch.testing.assert_close(ratio, ratios, rtol=0, atol=2e-5)
        largest = torch.stack([(m - initial).double().abs().cpu() for m in models]).amax(0)
        assert_rounded(out, expected, initial.double().abs().cpu() + 400 * largest)  # 2e-5 in the ratio
        assert bad.item() == 0


def test_task_vectors_that_point_apart(device):
    """The formula has no meaning for a mean cosine below 0: the initial model is kept, and nothing is NaN."""
    initial, delta = torch.zeros(100, device=device), torch.ones(100, device=device)
    total, units = stream(initial, [delta, -delta * 3], None)
    assert fk.stock_ratio(units, 2).tolist() == [0.0]
    assert fk.stock_finalize(total, units, 2, initial=initial).tolist() == [0.0] * 100


def test_a_task_that_changes_nothing(device):
    """Two parallel task vectors and a zero one have mean cosine 1/3, t = 0.6; in the second segment none is zero."""
    initial, delta = torch.zeros(100, device=device), torch.ones(100, device=device)
    models = [delta, delta.clone(), torch.cat([torch.zeros(40), torch.ones(60)]).to(device)]
    total, units = torch.zeros(100, device=device), torch.zeros(100, device=device)
    bounds = [0, 40, 100]
    moved = sum(fk.stock_update_(total, units, m, initial=initial, segments=bounds) for m in models)
    assert moved.tolist() == [2, 3]
    ratio = fk.stock_ratio(units, 3, moved=moved, segments=bounds)
    torch.testing.assert_close(ratio.cpu(), torch.tensor([0.6, 1.0], dtype=torch.float64))
    expected, ratios = reference.stock([m.cpu() for m in models], initial=initial.cpu(), segments=bounds)
    torch.testing.assert_close(ratio.cpu(), ratios)
    for merged in (
        fk.stock_finalize(total, units, 3, initial=initial, moved=moved, segments=bounds),
        fk.stock_merge(models, initial=initial, segments=bounds),
    ):
        torch.testing.assert_close(merged.cpu().double(), expected, rtol=0, atol=1e-6)


def test_task_vectors_may_be_given(device):
    initial, *models = near(2, 3000, device=device)
    expected = stream(initial, models, None)
    total, units = torch.zeros(3000, device=device), torch.zeros(3000, device=device)
    for model in models:
        fk.stock_update_(total, units, model - initial)
    assert torch.equal(total, expected[0]) and torch.equal(units, expected[1])


@pytest.mark.skipif(INTERPRET, reason="tests the threads of the numba loops")
def test_results_do_not_depend_on_threads():
    initial, *models = near(3, N)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            total, units = stream(initial, models, BOUNDS)
            results.append(fk.stock_finalize(total, units, 3, initial=initial, segments=BOUNDS))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(threads)


def test_bad_arguments_are_named():
    x = torch.ones(10)
    cases = [
        (lambda: fk.stock_ratio(x, 0), "count: expected the number of models"),
        (lambda: fk.stock_ratio(x, 2, moved=torch.ones(2)), "moved: expected shape .1."),
        (lambda: fk.stock_update_(x, x, x.clone()), "units: shares memory with total"),
        (lambda: fk.stock_update_(x, x[:9], x), "units: expected shape .10."),
        (lambda: fk.segment_norms(x, segments=[0, 5]), "segments: expected ascending boundaries 0, ..., 10"),
        (lambda: fk.segment_norms(x, segments=[1, 10]), "segments: expected ascending"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
