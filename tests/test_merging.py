"""Every merge rule against its batch formula in float64, tensor by tensor on named tensors, for T = 1, 2, 5 and 20 models."""

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from torch import nn

from fastmerge.config import parse
from fastmerge.flat import FlatModel
from fastmerge.merging import RULES, build_rule
from fastmerge.merging.rule import Base

SEED = 7


class Model(nn.Module):
    """Odd sizes (padding), a 0-d and an empty parameter, a frozen part and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(13, 7), nn.Linear(7, 3, bias=False)
        self.scale, self.nothing = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("steps", torch.tensor(3))


class Case:
    """theta_init, T models near it and their Fishers, each as a flat vector and as named float64 tensors."""

    def __init__(self, count, *flags):
        torch.manual_seed(count)
        self.config = parse(list(flags))
        self.module = Model()
        self.flat = FlatModel(self.module)
        self.base = Base.of(self.flat, SEED)
        self.models = [self.filled(lambda x: x + 0.3 * torch.randn_like(x), self.base.theta) for _ in range(count)]
        self.fishers = [self.filled(lambda x: torch.rand_like(x), self.base.theta) for _ in range(count)]
        for vector in (*self.models[::2], *self.fishers[:-1]):  # a tensor that a task did not move; zero Fishers
            stretch = slice(self.flat.offsets[2], self.flat.offsets[2] + self.flat.sizes[2])
            vector[stretch] = 0 if vector.min() >= 0 else self.base.theta[stretch]

    def filled(self, make, like):
        out = torch.zeros_like(like)
        for view, old in zip(self.flat.views(out), self.flat.views(like), strict=True):
            view.copy_(make(old))
        return out

    def named(self, vector):
        return {n: v.double().clone() for n, v in zip(self.flat.names, self.flat.views(vector), strict=True)}

    def rule(self, name):
        return build_rule(name, self.base, self.config)

    def feed(self, rule, order=None):
        for k in range(len(self.models)) if order is None else order:
            rule.update(self.models[k], self.fishers[k] if rule.needs_fisher else None)
        return rule.merged(torch.full_like(self.base.theta, 9.0))

    def deltas(self):
        start = self.named(self.base.theta)
        return start, [{n: x - start[n] for n, x in self.named(m).items()} for m in self.models]

    def flattened(self, tensors):
        out = torch.zeros_like(self.base.theta, dtype=torch.float64)
        for view, name in zip(self.flat.views(out), self.flat.names, strict=True):
            view.copy_(tensors[name])
        return out


# -- the formulas, as their papers have them -------------------------------------------------------------------------------


def average(case):
    return {n: torch.stack([case.named(m)[n] for m in case.models]).mean(0) for n in case.flat.names}


def task_arithmetic(case):
    start, deltas = case.deltas()
    return {n: x + case.config.task_arithmetic.scale * sum(d[n] for d in deltas) for n, x in start.items()}


def kept(x, density, keep):
    """x [n] with all but its largest entries zero; exactly: the earlier of equals."""
    k = min(len(x), max(1, int(density * len(x))))
    if not len(x):
        return x
    order = torch.argsort(x.abs(), descending=True, stable=True)
    if keep == "exactly":
        mask = torch.zeros(len(x), dtype=torch.bool).index_fill_(0, order[:k], True)
    else:
        mask = x.abs() >= x.abs()[order[k - 1]]
    return torch.where(mask, x, 0.0)


def ties(case, deltas=None):
    s, (start, own) = case.config.ties, case.deltas()
    names = list(start)
    sizes = [start[n].numel() for n in names]
    rows = [torch.cat([d[n].flatten() for n in names]) for d in deltas or own]
    if s.scope == "global":
        rows = [kept(r, s.density, s.keep) for r in rows]
    else:
        rows = [torch.cat([kept(x, s.density, s.keep) for x in r.split(sizes)]) for r in rows]
    matrix = torch.stack(rows)
    sign = matrix.sum(0).sign()
    zero = {"positive": 1.0, "negative": -1.0, "majority": 1.0 if sign.sum() >= 0 else -1.0}[s.zero]
    sign = torch.where(sign == 0, zero, sign)
    agree = (matrix.sign() == sign) & (matrix != 0)
    merged = s.scale * (matrix * agree).sum(0) / agree.sum(0).clamp_min(1)
    return {n: start[n] + x.view(start[n].shape) for n, x in zip(names, merged.split(sizes), strict=True)}


def thinned(case):
    """Task vectors after dropping; which entries stay is the op's, the arithmetic is ours."""
    start, deltas = case.deltas()
    ones = torch.ones_like(case.base.theta)
    for k, delta in enumerate(deltas):
        stay = case.named(fk.dare_delta(ones, case.config.dare.p, seed=SEED, stream=k + 1))
        yield {n: (stay[n] != 0) * delta[n] / (1 - case.config.dare.p) for n in start}


def dare(case):
    start, deltas = case.named(case.base.theta), list(thinned(case))
    return {n: x + case.config.dare.scale * sum(d[n] for d in deltas) / len(deltas) for n, x in start.items()}


def dare_ties(case):
    return ties(case, list(thinned(case)))


def magmax(case):
    start, deltas = case.deltas()
    order = deltas if case.config.magmax.ties == "later" else deltas[::-1]
    out = {}
    for n, x in start.items():
        best = torch.zeros_like(x)
        for d in order:
            best = torch.where(d[n].abs() >= best.abs(), d[n], best)
        out[n] = x + case.config.magmax.scale * best
    return out


def stock(case):
    start, deltas = case.deltas()
    count, out = len(deltas), {}
    for n, x in start.items():
        rows = torch.stack([d[n].flatten() for d in deltas])
        norms = rows.norm(dim=1)
        pairs = itertools.combinations(range(count), 2)
        cosines = [
            float(rows[i] @ rows[j] / (norms[i] * norms[j])) if norms[i] * norms[j] > 0 else 0.0 for i, j in pairs
        ]
        cosine = max(0.0, sum(cosines) / len(cosines)) if cosines else 1.0
        t = count * cosine / (1 + (count - 1) * cosine)
        out[n] = x + t * rows.mean(0).view(x.shape)
    return out


def slerp(case):
    merged = None
    for count, model in enumerate(map(case.named, case.models), start=1):
        if merged is None:
            merged = model
            continue
        t = 1 / count
        for n, b in model.items():
            a = merged[n]
            norm = a.norm() * b.norm()
            cosine = ((a * b).sum() / norm).clamp(-1, 1) if norm > 0 else torch.tensor(1.0)
            if cosine.abs() > 0.9995:
                merged[n] = (1 - t) * a + t * b
            else:
                w = cosine.acos()
                merged[n] = (((1 - t) * w).sin() * a + (t * w).sin() * b) / w.sin()
    return merged


def weighed(case, accumulate, lam):
    """The recursion, or for `sum` the closed form sum F theta / sum F."""
    models, fishers = list(map(case.named, case.models)), list(map(case.named, case.fishers))
    out = {}
    for n in case.flat.names:
        theta, fisher = models[0][n], fishers[0][n]
        for count in range(2, len(models) + 1):
            weight = 1 / count if accumulate == "sum" else lam
            new, its = models[count - 1][n], fishers[count - 1][n]
            total = (1 - weight) * fisher + weight * its
            mixed = ((1 - weight) * fisher * theta + weight * its * new) / total
            theta = torch.where(total == 0, (1 - weight) * theta + weight * new, mixed)
            fisher = its if accumulate == "last" else total
        out[n] = theta
    return out


def fisher(case):
    return weighed(case, case.config.fisher.accumulate, case.config.fisher.lam)


def cofima(case):
    return weighed(case, case.config.cofima.accumulate, case.config.cofima.lam)


def coma(case):
    lam, models = case.config.coma.lam, list(map(case.named, case.models))
    out = models[0]
    for model in models[1:]:
        out = {n: (1 - lam) * x + lam * model[n] for n, x in out.items()}
    return out


def wise_ft(case):
    alpha, start, last = case.config.wise_ft.alpha, case.named(case.base.theta), case.named(case.models[-1])
    return {n: (1 - alpha) * x + alpha * last[n] for n, x in start.items()}


FORMULAS = {
    "average": average, "task-arithmetic": task_arithmetic, "ties": ties, "dare": dare, "dare-ties": dare_ties,
    "magmax": magmax, "stock": stock, "slerp": slerp, "fisher": fisher, "cofima": cofima, "coma": coma, "wise-ft": wise_ft,
}  # fmt: skip
OPTIONS = {
    "task-arithmetic": ["--task-arithmetic.scale=0.9"],
    "ties": ["--ties.scope=tensor", "--ties.keep=at least", "--ties.zero=positive", "--ties.zero=negative",
             "--ties.scale=0.55", "--ties.density=1", "--ties.density=0.5"],
    "dare": ["--dare.p=0.7", "--dare.scale=0.5"],
    "dare-ties": ["--dare.p=0.5", "--ties.scope=tensor"],
    "magmax": ["--magmax.ties=earlier", "--magmax.scale=1"],
    "fisher": ["--fisher.accumulate=ema", "--fisher.accumulate=last"],
    "cofima": ["--cofima.accumulate=ema", "--cofima.lam=0.3"],
    "coma": ["--coma.lam=0.2"],
    "wise-ft": ["--wise-ft.alpha=0.8"],
}  # fmt: skip


def test_every_rule_has_a_formula_here():
    assert {*FORMULAS, "randmix"} == set(RULES)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize(("name", "flag"), [(n, f) for n in FORMULAS for f in [None, *OPTIONS.get(n, [])]])
def test_rule_equals_its_formula(name, flag, count):
    case = Case(count, *([flag] if flag else []))
    merged = case.feed(case.rule(name))
    torch.testing.assert_close(merged.double(), case.flattened(FORMULAS[name](case)), rtol=2e-5, atol=2e-6)
    assert case.module.steps == 3 and not case.module.frozen.requires_grad


def test_fisher_of_all_models_is_the_weighed_mean():
    case = Case(5)
    case.fishers = [f + case.filled(torch.ones_like, f) for f in case.fishers]
    total = sum(f.double() for f in case.fishers)
    wanted = sum(f.double() * m for f, m in zip(case.fishers, case.models, strict=True)) / total
    inside = total > 0
    torch.testing.assert_close(case.feed(case.rule("fisher"))[inside].double(), wanted[inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_random_mix_takes_every_model_equally_often(count):
    torch.manual_seed(0)
    module = nn.Linear(300, 200, bias=False)
    flat = FlatModel(module)
    rule = build_rule("randmix", Base.of(flat, SEED), parse([]))
    models = [torch.full_like(flat.theta.detach(), float(k)) for k in range(count)]
    for model in models:
        rule.update(model)
    merged, n = rule.merged(torch.empty_like(models[0])), flat.numel
    shares = torch.bincount(merged.long(), minlength=count)
    assert shares.sum() == n and (shares - n / count).abs().max() < 5 * (n / count) ** 0.5


def test_dare_drops_other_entries_of_every_model():
    case = Case(3, "--dare.p=0.5")
    stays = [torch.cat([x.flatten() for x in d.values()]) != 0 for d in thinned(case)]
    assert not torch.equal(stays[0], stays[1])
    assert 0.3 < stays[1].double().mean() < 0.7


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_a_stream_with_a_state(name):
    case = Case(5)
    whole = case.feed(case.rule(name))
    padding = case.filled(torch.ones_like, case.base.theta) == 0
    assert padding.any() and (whole[padding] == 0).all()

    rule = case.rule(name)
    with pytest.raises(ValueError, match="no model to merge yet"):
        rule.merged(torch.empty_like(whole))
    for k in range(2):
        rule.update(case.models[k], case.fishers[k] if rule.needs_fisher else None)
    other = case.rule(name)
    other.load_state_dict({k: v.clone() for k, v in rule.state_dict().items()})
    for k in range(2, 5):
        model, weight = case.models[k].clone(), case.fishers[k].clone()
        other.update(model, weight if other.needs_fisher else None)
        assert torch.equal(model, case.models[k]) and torch.equal(weight, case.fishers[k])
        model.fill_(5.0), weight.fill_(5.0)  # nothing of it is held
    first, second = (other.merged(torch.empty_like(whole)) for _ in range(2))
    assert torch.equal(first, whole) and torch.equal(second, whole)
    assert case.base.theta.equal(Case(5).base.theta)


@pytest.mark.parametrize("name", RULES)
def test_restart_is_a_merge_of_two(name):
    case = Case(3)
    rule = case.rule(name)
    case.feed(rule, [0, 1])
    stand_in = case.models[0].clone()
    rule.restart(stand_in)
    stand_in.fill_(7.0)
    got = case.feed(rule, [2])
    if name in ("randmix", "dare", "dare-ties"):  # the draws go on, so that the same entries are not hit again
        again = case.rule(name)
        assert not torch.equal(got, case.feed(again, [0, 2]))
    elif case.rule(name).needs_fisher:
        two = case.rule(name)
        case.feed(two, [0, 1])
        two.kept["merged"].copy_(case.models[0])
        assert torch.equal(got, case.feed(two, [2]))
    else:
        assert torch.equal(got, case.feed(case.rule(name), [0, 2]))
    rule.forget()
    assert set(rule.kept) == ({"fisher"} if rule.needs_fisher else set())


@pytest.mark.parametrize("name", ["task-arithmetic", "ties", "dare", "magmax", "average", "fisher"])
def test_unscaled_takes_the_scale_back(name):
    case = Case(2)
    rule = case.rule(name)
    merged = case.feed(rule)
    scale = getattr(rule.settings, "scale", 1.0)
    wanted = case.base.theta + (merged - case.base.theta) / scale
    torch.testing.assert_close(rule.unscaled(merged), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["average", "task-arithmetic", "ties", "magmax", "stock", "fisher"])
def test_the_order_of_the_models_does_not_matter(name):
    case = Case(5, "--ties.keep=at least")
    case.fishers = [f + case.filled(torch.ones_like, f) for f in case.fishers]
    one, other = case.feed(case.rule(name)), case.feed(case.rule(name), [3, 0, 4, 2, 1])
    if name == "magmax":  # no two entries have the same magnitude but where a task moved nothing
        assert torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_stream_equals_the_op_over_the_list():
    case = Case(5)
    b, models, bounds = case.base.theta, case.models, case.base.bounds
    n = sum(case.base.sizes)
    pairs = {
        "average": fk.weighted_sum(models),
        "task-arithmetic": fk.weighted_sum(models, [0.4] * 5, initial=b),
        "magmax": fk.magmax_merge(models, initial=b, scale=0.5),
        "stock": fk.stock_merge(models, initial=b, segments=bounds),
        "ties": fk.ties_merge(models, initial=b, density=int(0.2 * n) / len(b) + 1e-9),
    }
    for name, wanted in pairs.items():
        torch.testing.assert_close(case.feed(case.rule(name)), wanted, rtol=1e-5, atol=1e-6)
    positive = [f + 1 for f in case.fishers]
    case.fishers = positive
    torch.testing.assert_close(
        case.feed(case.rule("fisher")), fk.fisher_average(models, positive), rtol=1e-5, atol=1e-6
    )
