"""Merge rules with `--lora-rank`: each equals its float64 formula on the vector of the adapted weights alone."""

from types import SimpleNamespace

import pytest
import test_merging
import torch
import toy

from fastmerge.merging import RULES
from fastmerge.methods.posthoc import PostHoc

SETTINGS = {
    "fisher": ["--fisher.accumulate=sum"],
    "ties": ["--ties.density=0.3"],
    "dare": ["--dare.p=0.4"],
    "dare-ties": ["--dare.p=0.4"],
}
VARIANTS = [(rule, []) for rule in RULES] + [(rule, ["--ties.scope=tensor"]) for rule in ("ties", "dare-ties")]


def names_of(blocks, vector):
    pieces = vector.double().split([b.rows * b.columns for b in blocks])
    return {f"{b.name}[{b.first}:]": piece.view(b.rows, b.columns) for b, piece in zip(blocks, pieces, strict=True)}


@pytest.mark.parametrize("protocol", ["full", "running", "strict"])
@pytest.mark.parametrize(("rule", "flags"), VARIANTS, ids=lambda x: str(x))
def test_every_rule_merges_what_moved_and_nothing_else(rule, flags, protocol, tmp_path, monkeypatch):
    learner = toy.learner("--lora-rank=2", "--lr=3e-2", "--fisher.floor=1e-3", *SETTINGS.get(rule, []), *flags)
    method = PostHoc(learner, toy.nowhere(tmp_path), rule, protocol)
    monkeypatch.setattr(test_merging, "SEED", learner.seed_for("rule", rule))
    adapted, whole = learner.adapted(2), learner.theta.clone()
    start = adapted.gather(whole)
    fed, update = [], method.rules[rule].update
    monkeypatch.setattr(
        method.rules[rule], "update", lambda theta, about=None: (fed.append(about), update(theta, about))
    )

    def named(vector):
        return names_of(adapted.blocks, vector)

    def formula(models, about, subsequences, shares, sizes=None):
        models, moments = [named(m) for m in models], [m for m in about if isinstance(m, dict)]
        fishers = [named(f) for f in about if isinstance(f, torch.Tensor)]
        case = SimpleNamespace(start=named(start), models=models, fishers=fishers, config=learner.config, named=named)
        case.moments = moments
        if sizes is not None:  # lambda of OPCM and the sum of the norms after t tasks
            case.lam = float(sizes[0]), [float(sizes[1]) / shares[0]] * shares[0]
        case.base, case.subsequences, case.shares = SimpleNamespace(theta=start), subsequences, shares
        case.deltas = lambda: [test_merging.each(torch.sub, model, case.start) for model in models]
        return test_merging.ORACLES[rule](case)

    trained, fishers = [], []
    scale = getattr(method.rules[rule].settings, "scale", 1.0)
    for task, images in toy.tasks():
        t = task.index
        learner.grow_head(task, images)
        previous = adapted.gather(learner.theta)
        during = method.begin(task)
        toy.work(method.train(task, images, during))
        trained.append(adapted.gather(learner.theta))
        sizes = method.rules[rule].kept.get("sizes")
        toy.work(method.merge(task, images, during))
        fishers.append(fed[-1])
        if protocol == "full" or t == 0 or rule == "ema":  # a recursion, which sees all models under any protocol
            expected = formula(trained, fishers, range(1, t + 2), [1] * (t + 1))
        else:
            if protocol == "running":
                previous = start + (previous - start) / scale
            past = None
            if isinstance(fishers[0], dict):
                past = {k: (axis, sum(m[k][1] for m in fishers[:-1])) for k, (axis, _) in fishers[0].items()}
            elif fishers[0] is not None:
                past = fishers[-2] if rule == "cofima" else torch.stack(fishers[:-1]).sum(0)
            expected = formula([previous, trained[-1]], [past, fishers[-1]], (2 * t, 2 * t + 1), [t, 1], sizes)
        if protocol == "strict" and t == 0 and rule != "ema":
            expected = named(trained[0])
        merged = named(adapted.gather(learner.theta))
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6)
    assert not torch.equal(adapted.gather(learner.theta), start)
    adapted.scatter(start, learner.theta)
    assert torch.equal(learner.theta, whole)  # the other weights never moved
    assert all(t.dim() == 0 or t.shape[-1] <= len(start) for t in method.state_dict().values())
