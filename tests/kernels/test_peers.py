"""The conventions we name after mergekit 0.1.5 and peft 0.21.2, held against those packages (`pip install -e .[bench]`)."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from oracle import INTERPRET, vectors

pytestmark = pytest.mark.skipif(INTERPRET, reason="compares conventions, not kernels")
BOUNDS = [0, 1, 4, 9, 400, 5000, 5064, 20_000]  # tensors down to one entry
WEIGHTS = [(1.0, 1.0, 1.0), (1.0, 0.25, 2.0)]
TIGHT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture
def mergekit():
    """merge(method, [base, *models], **parameters): state dicts of BOUNDS' tensors through mergekit, flat again."""
    methods = pytest.importorskip("mergekit.merge_methods")

    def merge(method, models, base=None, **parameters):
        inputs = {f"m{k}": named(m) for k, m in enumerate(models)} | ({} if base is None else {"base": named(base)})
        with torch.no_grad():
            start = {} if base is None else {"base": "base"}
            merged = methods.merge_state_dicts(inputs, method, parameters=parameters, **start)
        return torch.cat([merged[f"p{k:03d}"] for k in range(len(BOUNDS) - 1)])

    return merge


@pytest.fixture
def peft():
    """merge(function, models, base, weights, *arguments): tensor by tensor through peft.utils.merge_utils, flat again."""
    functions = pytest.importorskip("peft.utils.merge_utils")

    def merge(function, models, base, weights, *arguments, **keywords):
        parts = []
        for a, b in itertools.pairwise(BOUNDS):
            deltas = [m[a:b] - base[a:b] for m in models]
            rule = getattr(functions, function)
            parts.append(base[a:b] + rule(deltas, torch.tensor(weights), *arguments, **keywords))
        return torch.cat(parts)

    return merge


def named(flat):
    return {f"p{k:03d}": flat[a:b].clone() for k, (a, b) in enumerate(itertools.pairwise(BOUNDS))}


def models(values="normal"):
    """[base, three models]; 'lattice': few values, so that thresholds cut through ties and entries cancel exactly."""
    base, *others = vectors(4, BOUNDS[-1], seed=7)
    if values == "lattice":
        return [(4 * x).round() / 4 for x in (base, *(base + 3 * (m - base) for m in others))]
    return [base, *others]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_of_mergekit(mergekit, weights, density):
    base, *others = models()
    parameters = {"weight": {f"m{k}": w for k, w in enumerate(weights)}, "density": density}
    expected = mergekit("ties", others, base, **parameters)
    merged = fk.ties_merge(
        others, initial=base, convention="mergekit", weights=weights, density=density, segments=BOUNDS
    )
    torch.testing.assert_close(merged, expected, **TIGHT)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_of_peft(peft, weights, density):
    base, *others = models()
    expected = peft("ties", others, base, weights, density, majority_sign_method="total")
    merged = fk.ties_merge(others, initial=base, convention="peft", weights=weights, density=density, segments=BOUNDS)
    torch.testing.assert_close(merged, expected, **TIGHT)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_zero_mass_is_elected_as_in_both(mergekit, peft, weights):
    """Untrimmed values of a lattice: thousands of entries cancel exactly."""
    base, *others = models("lattice")
    cancel = sum(w * (m - base) for w, m in zip(weights, others, strict=True)) == 0
    moved = torch.stack([m != base for m in others]).any(0)
    assert int((cancel & moved).sum()) > 100
    parameters = {"weight": {f"m{k}": w for k, w in enumerate(weights)}, "density": 1.0}
    settings = {"initial": base, "weights": weights, "density": 1.0, "segments": BOUNDS}
    torch.testing.assert_close(
        fk.ties_merge(others, convention="mergekit", **settings), mergekit("ties", others, base, **parameters), **TIGHT
    )
    expected = peft("ties", others, base, weights, 1.0, majority_sign_method="total")
    torch.testing.assert_close(fk.ties_merge(others, convention="peft", **settings), expected, **TIGHT)


def test_ties_of_equal_magnitudes_keep_as_many(mergekit, peft):
    """Where equal magnitudes straddle the threshold all keep the same number of entries, though not the same ones."""
    base, model = torch.zeros(BOUNDS[-1]), torch.ones(BOUNDS[-1])
    for convention, merged in (
        ("mergekit", mergekit("ties", [model], base, weight=1.0, density=0.2)),
        ("peft", peft("ties", [model], base, [1.0], 0.2)),
    ):
        ours = fk.ties_merge([model], initial=base, convention=convention, density=0.2, segments=BOUNDS)
        for a, b in itertools.pairwise(BOUNDS):
            assert int(ours[a:b].sum()) == int(merged[a:b].sum()), (convention, a, b)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_average_and_task_arithmetic(mergekit, peft, weights):
    base, *others = models()
    by_model = {f"m{k}": w for k, w in enumerate(weights)}
    shares = [w / sum(weights) for w in weights]
    expected = mergekit("linear", others, weight=by_model)  # normalises
    torch.testing.assert_close(fk.weighted_sum(others, shares), expected, **TIGHT)
    merged = fk.weighted_sum(others, weights, initial=base)
    torch.testing.assert_close(merged, mergekit("task_arithmetic", others, base, weight=by_model), **TIGHT)
    torch.testing.assert_close(merged, peft("task_arithmetic", others, base, weights), **TIGHT)


def test_model_stock(mergekit):
    base, *others = vectors(5, BOUNDS[-1], seed=3)
    shared = others[0] - base
    others = [m + 2 * shared for m in others[1:]]
    expected = mergekit("model_stock", others, base, filter_wise=False)
    merged = fk.stock_merge(others, initial=base, segments=BOUNDS)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_dare_in_distribution(mergekit, peft):
    """Same share of kept entries and same rescaled values as peft; mergekit rescales by the L1 norm: its values differ."""
    base, model = torch.zeros(BOUNDS[-1]), torch.ones(BOUNDS[-1])
    torch.manual_seed(0)
    ours = fk.dare_merge([model], 0.8, [1.0], initial=base, seed=1, stream=2)
    theirs = peft("dare_linear", [model], base, [1.0], 0.2)
    slack = 5 * (0.2 * 0.8 / BOUNDS[-1]) ** 0.5
    for merged in (ours, theirs):
        torch.testing.assert_close(merged[merged != 0].unique(), torch.tensor([5.0]))
        assert abs((merged != 0).double().mean().item() - 0.2) < slack
    rescaled = mergekit("dare_linear", [model], base, weight=1.0, density=0.2)
    for a, b in itertools.pairwise(BOUNDS):
        if b - a > 400:  # the L1 norm of the tensor is restored exactly, ours only in the mean
            assert rescaled[a:b].sum().item() == pytest.approx(b - a, rel=1e-3)
