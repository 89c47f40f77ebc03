"""Compare the conventions named after mergekit 0.1.5 and peft 0.21.2 with those packages (`pip install -e .[bench]`).

Where our ops differ on purpose, a test shows how.
"""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from oracle import INTERPRET, vectors

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="compares conventions, not kernels"),
    pytest.mark.filterwarnings("ignore:The density 1.0 is greater"),
]
MIXED = [0, 1, 4, 9, 9, 400, 5000, 5064, 20_000]  # includes tensors with one entry and with none
SMALL = [0, *itertools.accumulate(1 + k % 30 for k in range(600))]
LARGE = [0, 3, 1 << 18, (1 << 18) + 1000, 400_001]
WEIGHTS = [(1.0, 1.0, 1.0), (1.0, 0.25, 2.0)]
TIGHT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture
def mergekit():
    """merge(method, models, base=None, bounds=MIXED, **parameters) merges flat vectors with mergekit."""
    methods = pytest.importorskip("mergekit.merge_methods")

    def merge(method, models, base=None, bounds=MIXED, **parameters):
        def named(flat):
            return {f"p{k:04d}": flat[a:b].clone() for k, (a, b) in enumerate(itertools.pairwise(bounds))}

        inputs = {f"m{k}": named(m) for k, m in enumerate(models)} | ({} if base is None else {"base": named(base)})
        with torch.no_grad():
            start = {} if base is None else {"base": "base"}
            merged = methods.merge_state_dicts(inputs, method, parameters=parameters, **start)
        return torch.cat([merged[f"p{k:04d}"] for k in range(len(bounds) - 1)])

    return merge


@pytest.fixture
def peft():
    """merge(function, models, base, weights, *arguments, bounds=MIXED) merges flat vectors with peft, per tensor."""
    functions = pytest.importorskip("peft.utils.merge_utils")

    def merge(function, models, base, weights, *arguments, bounds=MIXED):
        rule, parts = getattr(functions, function), []
        for a, b in itertools.pairwise(bounds):
            deltas = [m[a:b] - base[a:b] for m in models]
            parts.append(base[a:b] + rule(deltas, torch.tensor(weights, dtype=base.dtype), *arguments))
        return torch.cat(parts)

    return merge


@pytest.fixture(params=["mergekit", "peft"])
def ties(request):
    """(convention, merge); merge(models, base, weights, density, bounds=MIXED) is TIES of that package."""
    rule = request.getfixturevalue(request.param)

    def merge(models, base, weights, density, bounds=MIXED):
        if request.param == "peft":
            return rule("ties", models, base, weights, density, "total", bounds=bounds)
        return rule("ties", models, base, bounds, weight=by_model(weights), density=density)

    return request.param, merge


def by_model(weights):
    return {f"m{k}": w for k, w in enumerate(weights)}


def ranks(count, bounds, seed=11):
    """Return integer task vectors with distinct magnitudes in each tensor: no ties, exact sums, many sums of zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    return [
        torch.cat([1 + torch.randperm(n, generator=generator) for n in sizes])
        * (torch.randint(2, (bounds[-1],), generator=generator) * 2.0 - 1)
        for _ in range(count)
    ]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties(ties, weights, density):
    convention, merge = ties
    base, *models = vectors(4, MIXED[-1], seed=7)
    settings = {"weights": weights, "density": density, "segments": MIXED}
    merged = fk.ties_merge(models, initial=base, convention=convention, **settings)
    torch.testing.assert_close(merged, merge(models, base, weights, density), **TIGHT)


@pytest.mark.parametrize("bounds", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("weights", [None, (1.0, 0.25, 2.0, 0.5, 1.0)])
@pytest.mark.parametrize("density", [0.2, 0.29, 0.9])
def test_ties_bit_for_bit(ties, bounds, weights, density):
    """On 600 small or a few large tensors, in exact arithmetic, kept sets, zero mass and divisors must all agree."""
    convention, merge = ties
    base, models = torch.zeros(bounds[-1]), ranks(5, bounds)
    expected = merge(models, base, weights or (1.0,) * 5, density, bounds)
    settings = {"weights": weights, "density": density, "segments": bounds, "keep": "exactly"}
    assert torch.equal(fk.ties_merge(models, initial=base, convention=convention, **settings), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_zero_mass_is_elected_as_in_both(ties, weights):
    """Untrimmed values on a lattice, so that many entries cancel exactly."""
    convention, merge = ties
    base, *others = vectors(4, MIXED[-1], seed=7)
    base, *models = ((4 * x).round() / 4 for x in (base, *(base + 3 * (m - base) for m in others)))
    cancel = sum(w * (m - base) for w, m in zip(weights, models, strict=True)) == 0
    moved = torch.stack([m != base for m in models]).any(0)
    assert int((cancel & moved).sum()) > 100
    settings = {"weights": weights, "density": 1.0, "segments": MIXED}
    merged = fk.ties_merge(models, initial=base, convention=convention, **settings)
    torch.testing.assert_close(merged, merge(models, base, weights, 1.0), **TIGHT)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_fewer_nonzero_entries_than_are_kept(ties, density):
    convention, merge = ties
    base, models = torch.zeros(LARGE[-1]), ranks(3, LARGE)
    models = [m * (torch.arange(len(m)) % 8 == 0) for m in models]
    merged = fk.ties_merge(models, initial=base, convention=convention, density=density, segments=LARGE)
    assert torch.equal(merged, merge(models, base, (1.0,) * 3, density, LARGE))


@pytest.mark.parametrize("values", ["constant", "lattice"])
def test_equal_magnitudes_keep_as_many(ties, values):
    """With ties at the threshold, both keep the same magnitudes in every tensor, but may keep them at other places."""
    convention, merge = ties
    base = torch.zeros(MIXED[-1])
    model = base + 1 if values == "constant" else (vectors(1, MIXED[-1])[0] * 4).round()
    ours = fk.ties_merge([model], initial=base, convention=convention, density=0.2, segments=MIXED)
    theirs = merge([model], base, (1.0,), 0.2)
    for a, b in itertools.pairwise(MIXED):
        assert torch.equal(ours[a:b].abs().sort().values, theirs[a:b].abs().sort().values)


def test_tiny_tensors(ties):
    """At density 0.2 mergekit keeps one entry of a tensor with fewer than five entries; peft keeps none."""
    convention, merge = ties
    bounds = [0, *itertools.accumulate(range(1, 11))]
    base, (model,) = torch.zeros(bounds[-1]), ranks(1, bounds)
    merged = fk.ties_merge([model], initial=base, convention=convention, density=0.2, segments=bounds)
    assert torch.equal(merged, merge([model], base, (1.0,), 0.2, bounds))
    kept = [int((merged[a:b] != 0).sum()) for a, b in itertools.pairwise(bounds)]
    assert kept == ([1] * 9 + [2] if convention == "mergekit" else [0] * 4 + [1] * 5 + [2])


def test_density_zero(ties):
    convention, merge = ties
    base, models = torch.zeros(SMALL[-1]), ranks(2, SMALL)
    expected = merge(models, base, (1.0, 1.0), 0.0, SMALL)
    assert int(expected.count_nonzero()) == 0
    merged = fk.ties_merge(models, initial=base, convention=convention, density=0.0, segments=SMALL)
    assert torch.equal(merged, expected)


def test_ties_with_nan_and_inf(ties):
    """NaN and infinity count as the largest magnitudes, so they are kept and appear in the result."""
    convention, merge = ties
    base, models = torch.zeros(LARGE[-1]), ranks(3, LARGE)
    models[0][7], models[1][300_000] = float("nan"), float("-inf")
    for m in (models[0], models[2]):
        m[300_000] = -1
    merged = fk.ties_merge(models, initial=base, convention=convention, density=0.2, segments=LARGE)
    assert merged[7].isnan() and merged[300_000] == -torch.inf
    expected = merge(models, base, (1.0,) * 3, 0.2, LARGE)
    assert torch.equal(merged.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


def test_ties_in_bf16(ties):
    """The integers are exact in bf16, so that mergekit's bf16 arithmetic only rounds at the end; peft returns fp32."""
    convention, merge = ties
    base, models = torch.zeros(SMALL[-1]).bfloat16(), [m.bfloat16() for m in ranks(4, SMALL)]
    expected = merge(models, base, (1.0,) * 4, 0.3, SMALL)
    assert expected.dtype == (torch.bfloat16 if convention == "mergekit" else torch.float32)
    settings = {"density": 0.3, "segments": SMALL, "out": torch.empty_like(expected)}
    assert torch.equal(fk.ties_merge(models, initial=base, convention=convention, **settings), expected)


def test_scale_is_lambda_of_mergekit(mergekit):
    base, *models = vectors(4, MIXED[-1], seed=7)
    expected = mergekit("ties", models, base, weight=1.0, density=0.2, **{"lambda": 0.7})
    merged = fk.ties_merge(models, initial=base, convention="mergekit", segments=MIXED, scale=0.7)
    torch.testing.assert_close(merged, expected, **TIGHT)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_average_and_task_arithmetic(mergekit, peft, weights):
    """Test the list ops, and `lerp` and `axpy` with one model at a time."""
    base, *models = vectors(4, MIXED[-1], seed=7)
    shares = [w / sum(weights) for w in weights]
    average = mergekit("linear", models, weight=by_model(weights))  # normalises
    torch.testing.assert_close(fk.weighted_sum(models, shares), average, **TIGHT)
    running = models[0].clone()
    for k in (1, 2):
        fk.lerp(running, models[k], weights[k] / sum(weights[: k + 1]), out=running)
    torch.testing.assert_close(running, average, **TIGHT)
    plain = mergekit("linear", models, weight=by_model(weights), normalize=False)
    torch.testing.assert_close(fk.weighted_sum(models, weights), plain, rtol=0, atol=3e-6)
    arithmetic = mergekit("task_arithmetic", models, base, weight=by_model(weights))
    merged, stream = fk.weighted_sum(models, weights, initial=base), base.clone()
    for model, w in zip(models, weights, strict=True):
        fk.axpy(stream, model - base, w, out=stream)
    for ours in (merged, stream):
        torch.testing.assert_close(ours, arithmetic, **TIGHT)
        torch.testing.assert_close(ours, peft("task_arithmetic", models, base, weights), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_of_many_half_precision_models(mergekit, dtype):
    """Both sum in fp32 and round once: results rarely differ, and by at most one unit."""
    models = vectors(20, MIXED[-1], dtype, seed=7)
    ours, theirs = fk.weighted_sum(models), mergekit("linear", models, weight=1.0)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert (ours != theirs).double().mean() < 1e-2


def towards_each_other(count, n, pull, seed=3):
    """Return [base, models]; the task vectors share a part `pull` times as large as their own part."""
    base, shared, *own = vectors(count + 2, n, seed=seed)
    return base, [m + pull * (shared - base) for m in own]


def streamed_stock(models, base, bounds):
    total, units = torch.zeros_like(base), torch.zeros_like(base)
    moved = sum(fk.stock_update_(total, units, model, initial=base, segments=bounds) for model in models)
    return fk.stock_finalize(total, units, len(models), initial=base, moved=moved, segments=bounds)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("bounds", [MIXED, [0, 5, 70_000, 400_000]], ids=["mixed", "large"])
def test_model_stock(mergekit, count, bounds):
    base, models = towards_each_other(count, bounds[-1], 2.0)
    expected = mergekit("model_stock", models, base, bounds, filter_wise=False)
    for merged in (fk.stock_merge(models, initial=base, segments=bounds), streamed_stock(models, base, bounds)):
        compared = 0
        for a, b in itertools.pairwise(bounds):
            d = torch.stack([m[a:b] - base[a:b] for m in models])
            units = torch.nn.functional.normalize(d, dim=1).sum(0)
            if units @ units > count:  # mean cosine above 0
                torch.testing.assert_close(merged[a:b], expected[a:b], rtol=0, atol=1e-5)
                compared += 1
        assert compared >= len(bounds) - 4


def test_model_stock_of_opposing_task_vectors(mergekit):
    """For a mean cosine below 0 mergekit extrapolates away from the models' mean (t < 0); we keep the initial model."""
    base, models = torch.zeros(1000), vectors(2, 1000, seed=1)
    models[1] = models[1] - 2 * models[0]
    t = mergekit("model_stock", models, base, [0, 1000], filter_wise=False) / (sum(models) / 2)
    assert t[-1] < -1
    assert torch.equal(fk.stock_merge(models, initial=base), base)
    assert torch.equal(streamed_stock(models, base, [0, 1000]), base)


def test_model_stock_of_short_task_vectors(mergekit):
    """mergekit clamps the product of norms to at least 1e-6, so cosines of task vectors shorter than 1e-3 are wrong."""
    base = torch.zeros(100)
    models = [base + 1e-5, base + 1e-5]  # parallel: t = 1
    theirs = mergekit("model_stock", models, base, [0, 100], filter_wise=False)
    assert theirs[0].item() < 0.1e-5
    for merged in (fk.stock_merge(models, initial=base), streamed_stock(models, base, [0, 100])):
        torch.testing.assert_close(merged, models[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("merge", [lambda *a: fk.stock_merge(a[0], initial=a[1], segments=a[2]), streamed_stock])
def test_model_stock_with_a_task_that_changes_nothing(mergekit, merge):
    """A zero task vector has cosines 0: two parallel task vectors and a zero one have mean cosine 1/3, t = 0.6."""
    base = torch.zeros(100)
    models = [base + 1, base + 1, base.clone()]
    expected = mergekit("model_stock", models, base, [0, 100], filter_wise=False)
    torch.testing.assert_close(expected, base + 0.4)
    torch.testing.assert_close(merge(models, base, [0, 100]), expected)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_in_distribution(peft, density):
    """The share and the values of kept entries are right for every model; the masks of models are independent."""
    torch.manual_seed(0)
    base, n = torch.zeros(MIXED[-1]), MIXED[-1]
    models, weights = [base + 1, base + 16, base + 256], (1.0, 0.5, 2.0)
    ours = fk.dare_merge(models, 1 - density, weights, initial=base, seed=1, subsequence=2)
    theirs = peft("dare_linear", models, base, weights, density)
    for merged in (ours, theirs):
        digits, kept = (merged * density).round().long(), []
        for value in (1, 8, 512):  # weight times task vector; all sums differ
            kept.append(digits & value != 0)
            assert abs(kept[-1].double().mean().item() - density) < 5 * (density * (1 - density) / n) ** 0.5
        torch.testing.assert_close(merged, sum(v * k for v, k in zip((1, 8, 512), kept, strict=True)) / density)
        all_three = (kept[0] & kept[1] & kept[2]).double().mean().item()
        assert abs(all_three - density**3) < 5 * (density**3 / n) ** 0.5


def test_dare_keeps_the_mean(peft):
    """The merge's projection on the task vector has relative length 1, up to the noise of the mask."""
    torch.manual_seed(0)
    base, model = vectors(2, MIXED[-1], seed=5)
    delta = model - base
    noise = 5 * (0.8 / 0.2 * (delta**4).sum() ** 0.5 / (delta**2).sum()).item()
    for merged in (
        fk.dare_merge([model], 0.8, [1.0], initial=base, seed=1, subsequence=2),
        peft("dare_linear", [model], base, (1.0,), 0.2),
    ):
        assert abs(((merged - base) @ delta / (delta @ delta)).item() - 1) < noise


def test_dare_of_mergekit_restores_the_l1_norm(mergekit):
    """mergekit scales by ||delta||_1 / ||kept||_1 per tensor, we by 1 / density: equal mean, different values."""
    torch.manual_seed(0)
    n, base = MIXED[-1], torch.zeros(MIXED[-1])
    delta = vectors(1, n, seed=5)[0] + 0.01
    theirs = mergekit("dare_linear", [delta], base, weight=1.0, density=0.2)
    ours = fk.dare_merge([delta], 0.8, [1.0], initial=base, seed=1, subsequence=2)
    for a, b in itertools.pairwise(MIXED):
        kept, factor = theirs[a:b] != 0, (theirs[a:b] / delta[a:b])[theirs[a:b] != 0]
        if b - a > 30:
            assert abs(kept.double().mean().item() - 0.2) < 5 * (0.16 / (b - a)) ** 0.5 + 0.05  # some deltas are 0.01
            torch.testing.assert_close(theirs[a:b].abs().sum(), delta[a:b].abs().sum(), rtol=1e-4, atol=0)
            assert factor.max() - factor.min() < 1e-4 * factor.mean() and abs(factor.mean().item() - 5) > 1e-3
            nonzero = ours[a:b] != 0
            torch.testing.assert_close(ours[a:b][nonzero], 5 * delta[a:b][nonzero])
    plain = mergekit("dare_linear", [delta], base, weight=1.0, density=0.2, rescale=False)
    torch.testing.assert_close(plain[plain != 0], delta[plain != 0])
