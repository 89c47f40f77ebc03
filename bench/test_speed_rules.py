"""Merge rules over lists of T models, compared with copies and with peers on the same tensors.

x_models is the time divided by that of moving the T models' bytes once at the copy's speed. Targets in copies of the T
models (CPU, one thread, T = 8): average, task arithmetic, MagMax, random mix 1; Fisher, Model Stock 3; TIES 4; DARE 5.
Extra memory counts everything a call allocates; the output is allocated beforehand. Peers' calls include building their
inputs and results. `test_speed_one_pass.py` times the streaming forms per model.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import pytest
import torch
from measure import Case, named
from peers import mergekit, peft

DENSITY = 0.2


def average(b, base, models, out):
    return Case(
        lambda: fk.weighted_sum(models, out=out),
        len(models) + 1,
        lambda: sum(models[1:], models[0].clone()).div_(len(models)),
    )


def task_arithmetic(b, base, models, out):
    scale = 0.3

    def formula():
        merged = base.clone()
        for model in models:
            merged += scale * (model - base)
        return merged

    weights = [scale] * len(models)
    return Case(lambda: fk.weighted_sum(models, weights, initial=base, out=out), len(models) + 2, formula)


def magmax(b, base, models, out):
    def formula():
        kept = torch.zeros_like(base)
        for model in models:
            delta = model - base
            kept = torch.where(delta.abs() >= kept.abs(), delta, kept)
        return base + 0.5 * kept

    run = lambda: fk.magmax_merge(models, initial=base, scale=0.5, out=out)  # noqa: E731
    return Case(run, len(models) + 2, formula)


def random_mix(b, base, models, out):
    def formula():
        chosen, merged = torch.randint(len(models), base.shape, device=base.device), models[0].clone()
        for k, model in enumerate(models[1:], 1):
            torch.where(chosen == k, model, merged, out=merged)
        return merged

    return Case(lambda: fk.random_mix(models, seed=1, subsequence=2, out=out), 1 + len(models), formula)


def fisher(b, base, models, out):
    fishers = [b.positive() for _ in range(b.distinct)]
    fishers = [fishers[k % len(fishers)] for k in range(len(models))]

    def formula():
        weighted, total = fishers[0] * models[0], fishers[0].clone()
        for model, new in zip(models[1:], fishers[1:], strict=True):
            weighted += new * model
            total += new
        return weighted / total

    return Case(lambda: fk.fisher_average(models, fishers, check=False, out=out), 2 * len(models) + 1, formula)


def dare(b, base, models, out):
    weight = 1 / len(models)

    def formula():
        merged = base.clone()
        for model in models:
            delta = model - base
            merged += delta * torch.empty_like(delta).bernoulli_(DENSITY) * (weight / DENSITY)
        return merged

    run = lambda: fk.dare_merge(models, 1 - DENSITY, initial=base, seed=1, subsequence=0, out=out)  # noqa: E731
    return Case(run, len(models) + 2, formula)


def stock(b, base, models, out):
    return Case(lambda: fk.stock_merge(models, initial=base, segments=b.bounds, out=out), 3 * (len(models) + 1) + 1)


def _trimmed(delta, k):
    return delta * (delta.abs() >= delta.abs().topk(k, sorted=False).values.amin())


def _ties(b, base, models, out, bounds, convention):
    def formula():
        parts = list(zip(bounds, bounds[1:], strict=False))
        deltas = torch.stack([m - base for m in models])
        for delta in deltas:
            for start, stop in parts:
                delta[start:stop] = _trimmed(delta[start:stop], max(1, int(DENSITY * (stop - start))))
        agree = deltas.sign() == deltas.sum(0).sign()
        return base + (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)

    passes = 2 * len(models) + len(models) + 2  # one pass over model and base per threshold, then the merge
    return Case(
        lambda: fk.ties_merge(models, initial=base, density=DENSITY, convention=convention, segments=bounds, out=out),
        passes,
        formula if b.fits(4 * len(models)) else None,
    )


def ties_per_tensor(b, base, models, out):
    return _ties(b, base, models, out, b.bounds, "mergekit")


def ties_global(b, base, models, out):
    return _ties(b, base, models, out, [0, b.n], "paper")


PEERS = {  # mergekit's method and parameters, peft's function and arguments; T is the number of models
    "average": (("linear", {"weight": 1.0}), None),
    "task_arithmetic": (("task_arithmetic", {"weight": 0.3}), ("task_arithmetic", 0.3)),
    "dare": (("dare_linear", {"weight": "1/T", "density": DENSITY}), ("dare_linear", "1/T", DENSITY)),
    "stock": (("model_stock", {"filter_wise": False}), None),
    "ties_per_tensor": (("ties", {"weight": 1.0, "density": DENSITY}), ("ties", 1.0, DENSITY)),
}


def peers_of(rule: str, b, base, models) -> dict:
    if rule not in PEERS or not b.fits(4 * len(models)):
        return {}
    flats, start, fraction = [named(m, b.size) for m in models], named(base, b.size), 1 / len(models)
    (method, parameters), second = PEERS[rule]
    parameters = {name: fraction if value == "1/T" else value for name, value in parameters.items()}
    found = mergekit(method, flats, None if method == "linear" else start, **parameters)
    if second is not None:
        name, weight, *rest = second
        found |= peft(name, flats, start, fraction if weight == "1/T" else weight, *rest)
    return found


RULES = (average, task_arithmetic, magmax, random_mix, fisher, dare, stock, ties_per_tensor, ties_global)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(bench, rule, tasks, size, dtype):
    base = bench.normal()
    models, out = bench.models(int(tasks), base), torch.empty_like(base)
    case = rule(bench, base, models, out)
    case.bytes, case.model_bytes = case.bytes * bench.bytes, bench.bytes
    case.models_bytes = len(models) * bench.bytes
    case.peers = peers_of(rule.__name__, bench, base, models)
    if not bench.fits(4):
        case.eager = None
    info = bench.row(case)
    assert info["x_models"] > 0
