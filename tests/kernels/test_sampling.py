"""random_mix, random_replace_ and dare_delta: compared with `reference.py`; distribution, shards, bad input."""

from __future__ import annotations

import itertools
import math

import fastmerge_kernels as fk
import pytest
import torch
from fastmerge_kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, INTERPRET, LARGE, assert_rounded, vectors

KEY = {"seed": 2**60 + 9, "subsequence": 5}


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_mix(device, count, dtype):
    for n, offset in ((1, 0), (1111, 2**40 + 77)) if INTERPRET else ((1, 0), (1300, 0), (1111, 2**40 + 77)):
        models = vectors(count, n, dtype, device)
        mixed = fk.random_mix(models, offset=offset, **KEY)
        expected = reference.random_mix([m.cpu() for m in models], offset=offset, **KEY)
        assert torch.equal(mixed.cpu().double(), expected)


def test_random_mix_takes_every_model_equally_often(device):
    n, count = LARGE, 5
    models = [torch.full((n,), float(k), device=device) for k in range(count)]
    share = torch.bincount(fk.random_mix(models, **KEY).long(), minlength=count) / n
    assert (share - 1 / count).abs().max() < 5 * math.sqrt(0.16 / n)


def test_random_mix_may_overwrite_a_model(device):
    models = vectors(3, 1500, device=device)
    expected = fk.random_mix(models, **KEY)
    bad = torch.ones((), dtype=torch.int64, device=device)
    assert fk.random_mix(models, out=models[1], nonfinite=bad, **KEY) is models[1]
    assert torch.equal(models[1], expected) and bad.item() == 0


def test_random_mix_of_other_output_type(device):
    models = vectors(2, 700, device=device)
    out = torch.empty(700, dtype=torch.float16, device=device)
    assert_rounded(fk.random_mix(models, out=out, **KEY), reference.random_mix([m.cpu() for m in models], **KEY), 0.0)


def test_random_mix_of_unaligned_models(device):
    memory = torch.randn(3100, device=device)
    models = [memory[1:1001], memory[1003:2003]]
    assert torch.equal(fk.random_mix(models, **KEY), fk.random_mix([m.clone() for m in models], **KEY))


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, repeat=2)))
def test_random_replace(device, types):
    kept, theta = (x.to(t) for x, t in zip(vectors(2, 1333, device=device), types, strict=True))
    for p, offset in ((0.25, 0), (0.0, 5), (1.0, 2**33 + 1)):
        bad = torch.full((1,), 3, device=device)
        expected = reference.random_replace(kept.cpu(), theta.cpu(), p, offset=offset, **KEY)
        out = kept.clone()
        assert fk.random_replace_(out, theta, p, offset=offset, nonfinite=bad, **KEY) is out and bad.item() == 0
        assert_rounded(out, expected, 0.0)


def test_a_stream_is_mixed_equally(device):
    """With p = 1 / t for the t-th model, each of five models gets a fifth of the entries."""
    kept = torch.zeros(LARGE, device=device)
    for k in range(5):
        fk.random_replace_(kept, torch.full_like(kept, float(k)), 1 / (k + 1), seed=3, subsequence=k)
    share = torch.bincount(kept.long(), minlength=5) / LARGE
    assert (share - 0.2).abs().max() < 5 * math.sqrt(0.16 / LARGE)


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, repeat=2)))
def test_dare(device, types):
    theta, initial = (x.to(t) for x, t in zip(vectors(2, 1333, device=device), types, strict=True))
    for p, start, offset in ((0.9, initial, 0), (0.0, initial, 5), (0.5, None, 2**33 + 1)):
        out = torch.empty_like(initial)
        fk.dare_delta(theta, p, initial=start, offset=offset, out=out, **KEY)
        expected = reference.dare_delta(
            theta.cpu(), p, initial=None if start is None else start.cpu(), offset=offset, **KEY
        )
        assert_rounded(out, expected, expected.abs() + (theta.double().abs().cpu() / (1 - p)))


def test_dare_keeps_the_mean(device):
    delta = torch.ones(LARGE, device=device)
    dropped = fk.dare_delta(delta, 0.8, **KEY)
    assert set(dropped.unique().tolist()) == {0.0, 5.0}
    assert abs(dropped.mean().item() - 1) < 5 * math.sqrt(0.2 * 0.8 / LARGE) / 0.2


def test_streams_are_independent(device):
    delta = torch.ones(LARGE, device=device)
    first, second = (fk.dare_delta(delta, 0.5, seed=1, subsequence=k) > 0 for k in (0, 1))
    assert abs((first == second).double().mean().item() - 0.5) < 2.5 / math.sqrt(LARGE)
    assert torch.equal(first, fk.dare_delta(delta, 0.5, seed=1, subsequence=0) > 0)


def test_nonfinite_values_are_counted(device):
    delta = torch.full((1000,), float("inf"), device=device)
    bad = torch.zeros(1, dtype=torch.int64, device=device)
    out = fk.dare_delta(delta, 0.5, nonfinite=bad, **KEY)
    assert bad.item() == int(out.isinf().sum()) and 400 < bad.item() < 600


@settings(max_examples=3 if INTERPRET else 40, deadline=None)
@given(st.data())
def test_shards_give_the_same_bits(data):
    n, offset = data.draw(st.integers(2, 1500)), data.draw(st.integers(0, 2**60))
    cut, position = data.draw(st.integers(1, n - 1)), {"seed": data.draw(st.integers(0, 2**63 - 1)), "subsequence": 1}
    models = vectors(3, n)
    parts = [[m[:cut] for m in models], [m[cut:] for m in models]]
    mixed = [fk.random_mix(p, offset=offset + k * cut, **position) for k, p in enumerate(parts)]
    assert torch.equal(torch.cat(mixed), fk.random_mix(models, offset=offset, **position))
    drops = [fk.dare_delta(p[0], 0.7, initial=p[1], offset=offset + k * cut, **position) for k, p in enumerate(parts)]
    assert torch.equal(torch.cat(drops), fk.dare_delta(models[0], 0.7, initial=models[1], offset=offset, **position))


def test_bad_arguments_are_named():
    x = torch.ones(10)
    with pytest.raises(ValueError, match="models: expected at least one tensor"):
        fk.random_mix([], **KEY)
    with pytest.raises(ValueError, match=r"models\[1\]: expected shape .10., that of models\[0\], got .9."):
        fk.random_mix([x, torch.ones(9)], **KEY)
    with pytest.raises(TypeError, match=r"models\[1\]: expected dtype float32, bfloat16 or float16, got torch.int64"):
        fk.random_mix([x, x.long()], **KEY)
    with pytest.raises(ValueError, match=r"p: expected a number in \[0, 1\], got 1.1"):
        fk.random_replace_(x, x.clone(), 1.1, **KEY)
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"p: expected a drop probability in \[0, 1\)"):
            fk.dare_delta(x, p, **KEY)
