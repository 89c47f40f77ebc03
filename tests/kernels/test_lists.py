"""Rules over lists of models: compared with float64 formulas and with the streaming ops, in place, on bad input."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from fastmerge_kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, INTERPRET, SIZES, assert_rounded, vectors

N = 1300 if INTERPRET else 90_001
KEY = {"seed": 2**60 + 9, "subsequence": 5}
TYPES = [(torch.float32,) * 5, (torch.bfloat16,) * 5, (*DTYPES, *DTYPES[:2])]


def near(n, dtypes=TYPES[0], device="cpu"):
    """Return [initial, *models], one per dtype."""
    return [x.to(t).to(device) for x, t in zip(vectors(len(dtypes), n), dtypes, strict=True)]


def size(*tensors):
    return torch.stack([x.double().abs().cpu() for x in tensors]).amax(0)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtypes", TYPES)
def test_weighted_sum(device, n, dtypes):
    initial, *models = near(n, dtypes, device)
    cpu, bounds = [m.cpu() for m in models], sorted({0, n // 3, n // 2, n})
    layered = torch.rand(4, len(bounds) - 1, generator=torch.Generator().manual_seed(1))
    out, scale = torch.empty(n, device=device), 8 * size(initial, *models)
    assert_rounded(fk.weighted_sum(models, out=out), reference.weighted_sum(cpu, [0.25] * 4), scale)
    assert_rounded(
        fk.weighted_sum(models, [0.3, 0.1, -2.0, 0.0], initial=initial, out=out),
        reference.weighted_sum(cpu, [0.3, 0.1, -2.0, 0.0], initial=initial.cpu()),
        scale,
    )
    assert_rounded(
        fk.weighted_sum(models, layered, initial=initial, segments=bounds, out=out),
        reference.weighted_sum(cpu, layered, initial=initial.cpu(), segments=bounds),
        scale,
    )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtypes", TYPES)
def test_magmax(device, n, dtypes):
    initial, *models = near(n, dtypes, device)
    merged = fk.magmax_merge(models, initial=initial, scale=0.5, out=torch.empty(n, device=device))
    expected = reference.magmax_merge([m.cpu() for m in models], initial=initial.cpu(), scale=0.5)
    assert_rounded(merged, expected, size(initial, *models))


def test_magmax_equals_the_stream(device):
    """The bits are equal, also for ties, where the later model wins."""
    generator = torch.Generator().manual_seed(4)
    initial, *models = (torch.randn(N, generator=generator).round().to(device) for _ in range(6))
    kept = torch.zeros(N, device=device)
    for model in models:
        fk.magmax_update_(kept, model, initial=initial)
    assert torch.equal(fk.magmax_merge(models, initial=initial), fk.axpy(initial, kept, 1.0))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtypes", TYPES)
def test_fisher_average(device, n, dtypes):
    _, *models = near(n, dtypes, device)
    fishers = [(x**2).abs() for x in near(n, dtypes[::-1], device)[1:]]
    for fisher in fishers:
        fisher[: n // 4] = 0  # no information, so the plain mean
    weights = [1.0, 0.5, 2.0, 1.0]
    merged = fk.fisher_average(models, fishers, weights, out=torch.empty(n, device=device))
    expected = reference.fisher_average([m.cpu() for m in models], [f.cpu() for f in fishers], weights)
    assert_rounded(merged, expected, 4 * size(*models))
    equal = fk.fisher_average(models, [torch.ones(n, device=device)] * 4, out=torch.empty(n, device=device))
    assert_rounded(equal, reference.weighted_sum([m.cpu() for m in models], [0.25] * 4), 4 * size(*models))


@pytest.mark.parametrize("mixed", ["models", "fishers"])
def test_fisher_average_of_one_mixed_list(device, mixed):
    """The other list has one dtype, and so no codes of dtypes in the kernel's table."""
    many = [torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.float32]
    one = [torch.bfloat16] * 6
    models = near(1300, many if mixed == "models" else one, device)
    fishers = [x.abs() for x in near(1300, one if mixed == "models" else many, device)[::-1]]
    merged = fk.fisher_average(models, fishers, out=torch.empty(1300, device=device))
    expected = reference.fisher_average([m.cpu() for m in models], [f.cpu() for f in fishers])
    assert_rounded(merged, expected, 6 * size(*models))


@pytest.mark.parametrize("dtypes", TYPES)
def test_dare(device, dtypes):
    for n, offset in ((1, 0), (N, 2**40 + 77)) if INTERPRET else ((1, 0), (1300, 0), (N, 2**40 + 77)):
        initial, *models = near(n, dtypes, device)
        weights = [0.25, 0.5, 0.1, 1.0]
        merged = fk.dare_merge(
            models, 0.7, weights, initial=initial, offset=offset, out=torch.empty(n, device=device), **KEY
        )
        expected = reference.dare_merge(
            [m.cpu() for m in models], 0.7, weights, initial=initial.cpu(), offset=offset, **KEY
        )
        assert_rounded(merged, expected, 30 * size(initial, *models))


def test_dare_draws_the_masks_of_the_stream(device):
    initial, *models = near(N, device=device)
    parts = [
        fk.dare_delta(m, 0.5, initial=initial, seed=KEY["seed"], subsequence=KEY["subsequence"] + k)
        for k, m in enumerate(models)
    ]
    expected = fk.weighted_sum([initial + p for p in parts], [1.0] * 4, initial=initial)
    merged = fk.dare_merge(models, 0.5, [1.0] * 4, initial=initial, **KEY)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_random_mix_of_mixed_types(device):
    models = near(N, TYPES[2], device)
    mixed = fk.random_mix(models, out=torch.empty(N, device=device), **KEY)
    assert torch.equal(mixed.cpu().double(), reference.random_mix([m.cpu() for m in models], **KEY))


def rules(initial, models):
    """Return every rule as a callable that takes `out` and `nonfinite`."""
    fishers = [m.abs() for m in models]
    return [
        lambda **k: fk.weighted_sum(models, **k),
        lambda **k: fk.weighted_sum(models, initial=initial, **k),
        lambda **k: fk.magmax_merge(models, initial=initial, **k),
        lambda **k: fk.fisher_average(models, fishers, **k),
        lambda **k: fk.dare_merge(models, 0.5, initial=initial, **KEY, **k),
        lambda **k: fk.random_mix(models, **KEY, **k),
        lambda **k: fk.ties_merge(models, initial=initial, **k),
        lambda **k: fk.stock_merge(models, initial=initial, **k),
    ]


@pytest.mark.parametrize("rule", range(8))
def test_in_place_and_counted(device, rule):
    """`out` may be a model or `initial`; no other input changes; NaN and inf are counted."""
    initial, *models = near(min(N, 3000), device=device)
    expected = rules(initial, models)[rule]()
    for k in (0, 2):
        inputs = [initial.clone(), *(m.clone() for m in models)]
        others = [x.clone() for x in inputs]
        rules(inputs[0], inputs[1:])[rule](out=inputs[k])
        assert torch.equal(inputs[k], expected)
        assert all(torch.equal(x, y) for j, (x, y) in enumerate(zip(inputs, others, strict=True)) if j != k)
    models[1][17] = float("nan")
    models[2][5] = float("inf")
    bad = torch.full((1,), 7, device=device)
    merged = rules(initial, models)[rule](nonfinite=bad)
    assert bad.item() == int((~merged.isfinite()).sum()) and (rule in (4, 5, 7) or bad.item() == 2)


@pytest.mark.parametrize("rule", range(8))
def test_one_model(device, rule):
    initial, model = near(2000, TYPES[0][:2], device)
    merged = rules(initial, [model])[rule]()
    assert merged.data_ptr() != model.data_ptr()
    if rule not in (4, 6):  # DARE and TIES drop entries
        torch.testing.assert_close(merged, model, rtol=0, atol=3e-7)


@pytest.mark.skipif(INTERPRET, reason="tests the threads of the numba loops")
def test_results_do_not_depend_on_threads():
    initial, *models = near(300_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([rule() for rule in rules(initial, models)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=2 if INTERPRET else 30, deadline=None)
@given(st.data())
def test_shards_give_the_same_bits(data):
    n, offset = data.draw(st.integers(2, 20_000 if not INTERPRET else 1500)), data.draw(st.integers(0, 2**60))
    cut = data.draw(st.integers(1, n - 1))
    initial, *models = near(n)
    whole = fk.dare_merge(models, 0.7, initial=initial, offset=offset, **KEY)
    parts = [
        fk.dare_merge([m[s] for m in models], 0.7, initial=initial[s], offset=offset + k * cut, **KEY)
        for k, s in enumerate((slice(0, cut), slice(cut, n)))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_unaligned_models(device):
    memory = torch.randn(5000, device=device)
    models = [memory[1:1001], memory[1003:2003], memory[2010:3010]]
    initial = memory[3011:4011]
    copies = [m.clone() for m in models]
    pairs = zip(rules(initial, models), rules(initial.clone(), copies), strict=True)
    assert all(torch.equal(a(), b()) for a, b in pairs)


def test_many_models(device):
    """Rules accept a hundred models."""
    initial = torch.zeros(700, device=device)
    models = [torch.full((700,), float(k), device=device) for k in range(100)]
    assert fk.weighted_sum(models).tolist() == [49.5] * 700
    assert fk.magmax_merge(models, initial=initial).tolist() == [99.0] * 700
    assert fk.fisher_average(models, models)[0].item() == pytest.approx(sum(k * k for k in range(100)) / 4950)


def test_bad_arguments_are_named():
    x = torch.ones(10)
    pair, key = [x, x], {"initial": x, **KEY}
    cases = [
        (lambda: fk.weighted_sum([]), ValueError, "models: expected at least one tensor"),
        (
            lambda: fk.weighted_sum([x, torch.ones(9)]),
            ValueError,
            r"models\[1\]: expected shape .10., that of models\[0\]",
        ),
        (lambda: fk.weighted_sum([x, x.long()]), TypeError, r"models\[1\]: expected dtype"),
        (lambda: fk.weighted_sum(pair, [1.0]), ValueError, "weights: expected 2, one per model, got shape .1."),
        (lambda: fk.weighted_sum(pair, torch.ones(2, 3)), ValueError, "weights: expected shape .2, 1., got .2, 3."),
        (lambda: fk.weighted_sum(pair, segments=[0, 9]), ValueError, "segments: expected ascending boundaries"),
        (lambda: fk.weighted_sum(pair, initial=torch.ones(3)), ValueError, "initial: expected shape .10."),
        (lambda: fk.weighted_sum([x[:5], x[5:]], out=x[2:7]), ValueError, r"out: partly overlaps models\[0\]"),
        (lambda: fk.fisher_average(pair, [x]), ValueError, "fishers: expected 2, one per model, got 1"),
        (lambda: fk.fisher_average(pair, [x, -x]), ValueError, r"fishers\[1\]: expected no negative entries"),
        (lambda: fk.fisher_average(pair, pair, [1.0, 0.0]), ValueError, "weights: expected positive numbers"),
        (lambda: fk.dare_merge(pair, 1.0, **key), ValueError, "p: expected a drop probability"),
        (lambda: fk.dare_merge(pair, 0.5, initial=x, seed=-1, subsequence=0), ValueError, "seed: expected an integer"),
        (
            lambda: fk.dare_merge(pair, 0.5, initial=x, seed=1, subsequence=2**63 - 1),
            ValueError,
            "subsequence: expected",
        ),
        (lambda: fk.stock_merge([], initial=x), ValueError, "models: expected at least one tensor"),
        (lambda: fk.magmax_merge(pair, initial=x, nonfinite=torch.zeros(1)), TypeError, "nonfinite: expected an int64"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_every_pair_of_types(device):
    for first, second in itertools.product(DTYPES, repeat=2):
        a, b = torch.ones(40, dtype=first, device=device), torch.zeros(40, dtype=second, device=device)
        assert fk.weighted_sum([a, b], out=torch.empty(40, device=device)).tolist() == [0.5] * 40
