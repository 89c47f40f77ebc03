"""Compare every merge rule with its paper's batch formula in float64, over lists of T = 1, 2, 5, 20 models.

Models are "near" each other or on a "lattice", where fp32 is exact and magnitudes, sums and Fishers tie.
"""

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import fastmerge_kernels as fk
import fastmerge_kernels.reference
import numpy as np
import pytest
import torch
from torch import nn

from fastmerge.config import Config
from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.merging import RULES, build_rule
from fastmerge.merging import della as della_rule
from fastmerge.merging.regmean import nearest
from fastmerge.merging.rule import Base
from fastmerge.methods import METHODS

SEED = 7
ROUNDING = {"rtol": 0, "atol": 4e-6}  # 20 models of order 1, merged in sequence in fp32
TURNING = {"rtol": 0, "atol": 2e-5}  # the same for OPCM, where rounding turns the singular vectors of the next step


class Net(nn.Module):
    """Odd sizes, a 0-d and an empty parameter, a frozen part, a buffer of integers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(37, 21), nn.Linear(21, 9)
        self.scale, self.nothing = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, 4))
        self.still = nn.Parameter(torch.randn(17))
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(3))


def configured(groups):
    default = Config()
    return dataclasses.replace(default, **{g: dataclasses.replace(getattr(default, g), **s) for g, s in groups.items()})


class Case:
    """theta_init, T models and their Fishers: flat vectors for the rules, dicts of float64 tensors for the formulas."""

    def __init__(self, count, kind="near", groups=None):
        torch.manual_seed(count)
        self.config, self.module = configured(groups or {}), Net()
        self.flat = FlatModel(self.module)
        if kind == "lattice":
            for view in self.flat.views(self.flat.theta.data):
                view.copy_(torch.randint(-8, 9, view.shape) / 4)
        self.base = Base.of(self.flat, SEED)
        self.start = self.named(self.base.theta)
        shared = {n: torch.randn(x.shape) for n, x in self.start.items()}
        self.thetas = [self.filled(lambda n, k=k: self.model(kind, n, k, shared[n])) for k in range(count)]
        self.weights = [self.filled(lambda n, k=k: self.fisher(kind, n, k == count - 1)) for k in range(count)]
        self.models, self.fishers = [self.named(x) for x in self.thetas], [self.named(x) for x in self.weights]
        self.moments = [self.moment() for _ in range(count)]
        self.subsequences, self.shares = range(1, count + 1), [1] * count  # what a restart changes
        self.padding = self.filled(lambda n: torch.ones(self.start[n].shape)) == 0

    def model(self, kind, name, k, shared):
        x = self.start[name]
        if name == "still" or (name == "b.weight" and k % 2 == 0):  # never or only sometimes moved
            return x
        if kind == "lattice":  # more negative than positive, so that the majority is not the default sign
            return x + torch.randint(-4, 4, x.shape) / 4
        towards = -shared if name == "a.bias" and k % 2 else shared  # a mean cosine below 0
        return x + 0.2 * (towards + 0.5 * torch.randn(x.shape))

    def fisher(self, kind, name, last):
        x = torch.rand(self.start[name].shape)
        if kind == "lattice":
            return (3 * x).floor()
        return x * (name != "b.weight") * (name != "b.bias" or last)  # zero in all models; zero in all but the last

    def moment(self):
        """G of the two linear layers, the second used as x @ W; the first input is zero in all images."""
        found = {}
        for name, axis in (("a.weight", 1), ("b.weight", 0)):
            x = torch.randn(30, self.start[name].shape[axis]) * torch.linspace(0, 1, self.start[name].shape[axis])
            found[self.flat.names.index(name)] = axis, x.mT @ x
        return found

    def about(self, rule, k):
        """What a rule needs of model k besides its weights."""
        return self.weights[k] if rule.needs_fisher else self.moments[k] if rule.needs_moments else None

    def filled(self, make):
        out = torch.zeros_like(self.base.theta)
        for name, view in zip(self.flat.names, self.flat.views(out), strict=True):
            view.copy_(make(name))
        return out

    def named(self, vector):
        return {n: v.double() for n, v in zip(self.flat.names, self.flat.views(vector.clone()), strict=True)}

    def deltas(self):
        return [each(torch.sub, model, self.start) for model in self.models]

    def rule(self, name):
        return build_rule(name, self.base, self.config)

    def feed(self, rule, order):
        for k in order:
            rule.update(self.thetas[k], self.about(rule, k))
        return rule

    def merge(self, name, order=None):
        return result(self.feed(self.rule(name), range(len(self.thetas)) if order is None else order))


def result(rule):
    return rule.merged(torch.full_like(rule.base.theta, 9.0))


def each(function, *models, **settings):
    return {n: function(*(m[n] for m in models), **settings) for n in models[0]}


# -- the formulas of the papers ----------------------------------------------------------------------------------------


def mean(*xs):
    return torch.stack(xs).mean(0)


def mix(a, b, lam):
    return (1 - lam) * a + lam * b


def plus(case, scale, delta):
    return each(lambda x, d: x + scale * d, case.start, delta)


def average(case):
    return each(mean, *case.models)


def task_arithmetic(case):
    return plus(case, case.config.task_arithmetic.scale, each(lambda *ds: sum(ds), *case.deltas()))


def trimmed(x, s):
    """Zero all but the largest entries of x [n]; of equals at the threshold keep the earlier ones, or all."""
    if not len(x):
        return x
    order = x.abs().argsort(descending=True, stable=True)[: max(1, int(s.density * len(x)))]
    kept = x.abs() >= x[order[-1]].abs()
    if s.keep == "exactly":
        kept = torch.isin(torch.arange(len(x)), order)
    return x * kept


def ties(case, deltas=None):
    s, rows = case.config.ties, []
    for delta in deltas or case.deltas():
        parts = [x.flatten() for x in delta.values()]
        parts = [torch.cat(parts)] if s.scope == "global" else parts
        rows.append(torch.cat([trimmed(x, s) for x in parts]))
    rows = torch.stack(rows)
    sign = rows.sum(0).sign()
    majority = 1 if sign.sum() >= 0 else -1
    sign[sign == 0] = {"positive": 1, "negative": -1, "majority": majority}[s.zero]
    agree = rows * sign > 0
    merged = (rows * agree).sum(0) / (agree.sum(0).clamp_min(1) if s.merge == "mean" else 1)
    pieces = merged.split([x.numel() for x in case.start.values()])
    return plus(case, s.scale, {n: p.view(x.shape) for (n, x), p in zip(case.start.items(), pieces, strict=True)})


def thinned(case):
    """The op chooses the kept entries; the arithmetic is done here."""
    p, ones = case.config.dare.p, torch.ones_like(case.base.theta)
    stay = [case.named(fk.dare_delta(ones, p, seed=SEED, subsequence=k) != 0) for k in case.subsequences]
    return [each(lambda d, s: d * s / (1 - p), *pair) for pair in zip(case.deltas(), stay, strict=True)]


def dare(case):
    return plus(case, case.config.dare.scale, each(mean, *thinned(case)))


def dare_ties(case):
    return ties(case, thinned(case))


def rows_of(x):
    return list(x.flatten(1)) if x.dim() > 1 else [x.flatten()]


def magpruned(case):
    """The bits of the draws are those of the reference; the ranks and the arithmetic are done here."""
    s, n, pruned = case.config.della, case.base.theta.numel(), []
    for k, deltas in zip(case.subsequences, case.deltas(), strict=True):
        draws = np.zeros(n)
        for bit in range(16):
            words = fk.reference.random_words(n, SEED, 16 * k + bit, "mix")
            draws = draws / 2 + (words < 2**31) / 2
        draws = case.named(torch.from_numpy(draws))
        if s.scope == "row":
            rows = [pair for name, d in deltas.items() for pair in zip(*map(rows_of, (d, draws[name])), strict=True)]
        elif s.scope == "tensor":
            rows = [(d.flatten(), draws[name].flatten()) for name, d in deltas.items()]
        else:
            rows = [tuple(torch.cat([x.flatten() for x in of.values()]) for of in (deltas, draws))]
        found = []
        for x, u in rows:
            share = torch.full_like(x, 0.5)
            if len(x) > 1:
                share[x.abs().sort(stable=True).indices] = torch.linspace(0, 1, len(x), dtype=x.dtype)
            stay = 1 - (s.p + s.epsilon) + 2 * s.epsilon * share
            out = x * (u >= 1 - stay) / (stay if s.rescale == "probability" else 1)
            found.append(out)
        out = torch.cat(found).split([x.numel() for x in deltas.values()])
        out = {name: new.view(x.shape) for (name, x), new in zip(deltas.items(), out, strict=True)}
        if s.rescale == "norm":
            groups = [list(deltas)] if s.scope == "global" else [[name] for name in deltas]
            for names in groups:
                before, after = (sum(of[name].abs().sum() for name in names) for of in (deltas, out))
                for name in names:
                    out[name] = out[name] * (before / after if after else 1)
        pruned.append(out)
    return pruned


def della_linear(case):
    return plus(case, case.config.della.scale, each(mean, *magpruned(case)))


def della(case):
    def tensor(*ds):
        rows = torch.stack(ds)
        agree = rows * torch.where(rows.sum(0) >= 0, 1, -1) > 0
        return (rows * agree).sum(0) / agree.sum(0).clamp_min(1)

    return plus(case, case.config.della.scale, each(tensor, *magpruned(case)))


def magmax(case):
    def largest(*ds):
        best, later = torch.zeros_like(ds[0]), case.config.magmax.ties == "later"
        for d in ds:
            best = torch.where(d.abs() >= best.abs() if later else d.abs() > best.abs(), d, best)
        return best

    return plus(case, case.config.magmax.scale, each(largest, *case.deltas()))


def random_mix(case):
    """The op chooses the entries that a model replaces."""
    merged, ones = case.models[0], torch.ones_like(case.base.theta)
    for t, (subsequence, model) in enumerate(zip(case.subsequences, case.models, strict=True), 1):
        turn = case.named(fk.random_replace_(torch.zeros_like(ones), ones, 1 / t, seed=SEED, subsequence=subsequence))
        merged = each(lambda a, b, m: torch.where(m > 0, b, a), merged, model, turn)
    return merged


def stock(case):
    def tensor(*ds):
        pairs = [(a.flatten(), b.flatten()) for a, b in itertools.combinations(ds, 2)]
        cosines = [a @ b / (a.norm() * b.norm()) if a.any() and b.any() else 0 * a.sum() for a, b in pairs]
        cosine = mean(*cosines).clamp_min(0) if pairs else 1  # below 0 the formula has no meaning
        ratio = 2 * cosine / (1 + cosine) if len(ds) == 2 else len(ds) * cosine / (1 + (len(ds) - 1) * cosine)
        return ratio * mean(*ds)

    return plus(case, 1, each(tensor, *case.deltas()))


def arc(a, b, t):
    norms = a.norm() * b.norm()
    cosine = (a * b).sum() / norms if norms else torch.tensor(1.0)
    if cosine.abs() > 0.9995:
        return mix(a, b, t)
    w = cosine.acos()
    return (((1 - t) * w).sin() * a + (t * w).sin() * b) / w.sin()


def slerp(case):
    merged = case.models[0]
    for count, model in enumerate(case.models[1:], 2):
        merged = each(arc, merged, model, t=1 / count)
    return merged


def weighed_mean(case):
    shares, count = torch.tensor(case.shares), len(case.models)

    def tensor(*xs):
        thetas, fishers = torch.stack(xs[:count], -1), torch.stack(xs[count:], -1)
        known = fishers.sum(-1, keepdim=True) > 0
        weights = torch.where(known, fishers, shares)  # the plain mean where all Fishers are 0
        return (weights * thetas).sum(-1) / weights.sum(-1)

    return each(tensor, *case.models, *case.fishers)


def weighed(case, s):
    if s.accumulate == "sum":
        return weighed_mean(case)
    theta, past = case.models[0], case.fishers[0]
    for model, new in zip(case.models[1:], case.fishers[1:], strict=True):
        total = each(mix, past, new, lam=s.lam)
        share = each(lambda g, f: torch.where(f > 0, s.lam * g / f, s.lam), new, total)
        theta, past = each(mix, theta, model, share), new if s.accumulate == "last" else total
    return theta


def coma(case):
    merged = case.models[0]
    for model in case.models[1:]:
        merged = each(mix, merged, model, lam=case.config.coma.lam)
    return merged


def ema(case):
    merged = case.start
    for model in case.models:
        merged = each(mix, merged, model, lam=case.config.ema.weight)
    return merged


def regmean(case):
    shares = torch.tensor(case.shares).double()
    merged = each(lambda *ws: (torch.stack(ws, -1) * shares).sum(-1) / shares.sum(), *case.models)
    names = list(case.start)
    for k in case.moments[0]:
        name, axis = names[k], case.moments[0][k][0]
        ws = [m[name] if axis == 1 else m[name].mT for m in case.models]
        grams = [m[k][1].double() for m in case.moments]
        alpha = case.config.regmean.alpha
        grams = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in grams]
        seen = sum(grams).diagonal() > 0
        inverse = torch.linalg.inv(sum(grams)[seen][:, seen])
        products = sum(w[:, seen] @ g[seen][:, seen] for w, g in zip(ws, grams, strict=True))
        out = merged[name] if axis == 1 else merged[name].mT
        out[:, seen] = products @ inverse
    return merged


def on_matrices(case, of_matrix, of_other):
    """theta_init + the merged task vector: of_matrix for tensors with two dimensions, of_other for the rest."""
    return plus(
        case, 1, each(lambda *ds: (of_matrix if ds[0].dim() == 2 and ds[0].numel() else of_other)(*ds), *case.deltas())
    )


def svd(matrix):
    """Without the directions that have no singular value."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = torch.linalg.matrix_rank(matrix, rtol=2e-7 * max(matrix.shape))
    return u[:, :rank], s[:rank], v[:rank]


def iso_c(case):
    scale = case.config.iso_c.scale

    def matrix(*ds):
        u, s, v = svd(sum(ds))
        return scale * s.mean() * u @ v if len(s) else torch.zeros_like(ds[0])

    return on_matrices(case, matrix, lambda *ds: scale * mean(*ds))


def tsv(case):
    scale = case.config.tsv.scale

    def matrix(*ds):
        d = max(1, min(ds[0].shape) // len(ds))
        parts = [[x[:, :d] if i == 0 else x[:d] for i, x in enumerate(svd(delta))] for delta in ds]
        us, s, vs = (
            torch.cat([u for u, _, _ in parts], 1),
            torch.cat([s for _, s, _ in parts]),
            torch.cat([v for *_, v in parts]),
        )
        if not len(s):
            return torch.zeros_like(ds[0])
        (a, _, b), (e, _, f) = svd(us), svd(vs)
        return scale * a @ b @ torch.diag(s) @ e @ f

    return on_matrices(case, matrix, lambda *ds: scale * mean(*ds))


def opcm(case):
    def norm(delta):
        return torch.cat([x.flatten() for x in delta.values()]).norm()

    first, *later = case.deltas()
    lam, norms = case.lam if hasattr(case, "lam") else (1.0, [norm(first)])
    merged = first
    for delta in later:
        norms, cleaned = [*norms, norm(delta)], {}
        for name, x in delta.items():
            if x.dim() == 2 and x.numel():
                u, s, v = svd(merged[name])
                block = u.T @ x @ v.T
                keep = torch.ones_like(block) - torch.eye(len(s))
                split = int((s.cumsum(0) <= case.config.opcm.alpha * s.sum()).sum())
                keep[:split, :split] = 0
                x = x - u @ block @ v + u @ (block * keep) @ v
            cleaned[name] = x
        total = each(lambda a, b, lam=lam: lam * a + b, merged, cleaned)
        lam = norm(total) / (sum(norms) / len(norms))
        merged = each(lambda x, lam=lam: x / lam, total)
    return plus(case, 1, merged)


def knots(case):
    """TIES of the coordinates in the common basis; `ties` gets them as task vectors."""
    deltas, turned, bases = case.deltas(), [{} for _ in case.models], {}
    for name, x in case.start.items():
        if x.dim() == 2 and x.numel():
            u, s, _ = torch.linalg.svd(torch.cat([d[name] for d in deltas], 1), full_matrices=False)
            bases[name] = u[:, s > 1e-5]
        for new, d in zip(turned, deltas, strict=True):
            new[name] = bases[name].T @ d[name] if name in bases else d[name]
    space = SimpleNamespace(start=each(torch.zeros_like, turned[0]), config=case.config)
    merged = ties(space, turned)
    return each(torch.add, case.start, {n: bases[n] @ x if n in bases else x for n, x in merged.items()})


def breadcrumbs(case):
    s = case.config.breadcrumbs

    def masked(d):
        order = d.abs().flatten().argsort(descending=True)
        kept = int(s.density * d.numel())
        outliers = min(int(s.gamma * d.numel()), d.numel() - kept)
        mask = torch.zeros(d.numel(), dtype=torch.bool)
        mask[order[outliers : outliers + kept]] = True
        return d * mask.view(d.shape)

    return plus(case, s.scale, each(lambda *ds: sum(masked(d) for d in ds), *case.deltas()))


def sce(case):
    def tensor(*ds):
        rows = torch.stack([d.flatten() for d in ds])
        if not rows.numel():
            return ds[0]
        variance = (rows - rows.mean(0)).square().mean(0)
        count = int(case.config.sce.density * int((variance > 0).sum()))
        if count and case.config.sce.density < 1:
            rows = rows * (variance >= variance.sort(descending=True).values[count - 1])
        weights, merged = [float(row @ row) for row in rows], torch.zeros_like(rows[0])
        for k in range(rows.shape[1]):
            sign = 1 if rows[:, k].sum() >= 0 else -1
            agree = [(w, x) for w, x in zip(weights, rows[:, k].tolist(), strict=True) if sign * x > 0]
            merged[k] = sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0
        return merged.view(ds[0].shape)

    return plus(case, 1, each(tensor, *case.deltas()))


def karcher(case):
    """A longer iteration, and the sum of the logarithms there is zero."""

    def tensor(*ws):
        norms = torch.stack([w.norm() for w in ws])
        units = [w / n for w, n in zip(ws, norms, strict=True) if n > 0]
        if not units:
            return torch.zeros_like(ws[0])
        mean = sum(units) / sum(units).norm()

        def log(u):
            angle = (mean * u).sum().clamp(-1, 1).acos()
            return (angle / angle.sin() if angle > 1e-7 else 1.0) * (u - (mean * u).sum() * mean)

        for _ in range(60):
            step = sum(log(u) for u in units) / len(units)
            if step.norm() > 0:
                mean = step.norm().cos() * mean + step.norm().sin() * step / step.norm()
        assert sum(log(u) for u in units).norm() < 1e-7
        return norms.mean() * mean

    return each(tensor, *case.models)


def nuslerp(case):
    def turned(a, b, t):
        if not (a.any() and b.any()):
            return mix(a, b, t)
        w = ((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1).acos()
        return (((1 - t) * w).sin() * a + (t * w).sin() * b) / w.sin() if w > 1e-6 else mix(a, b, t)

    merged, *later = case.deltas()
    for count, delta in enumerate(later, 2):
        merged = each(turned, merged, delta, t=1 / count)
    return plus(case, 1, merged)


ORACLES = {
    "breadcrumbs": breadcrumbs, "sce": sce, "karcher": karcher, "nuslerp": nuslerp,
    "regmean": regmean, "iso-c": iso_c, "tsv": tsv, "opcm": opcm, "knots": knots,
    "average": average, "task-arithmetic": task_arithmetic, "ties": ties, "dare": dare, "dare-ties": dare_ties,
    "della": della, "della-linear": della_linear,
    "magmax": magmax, "randmix": random_mix, "stock": stock, "slerp": slerp, "coma": coma, "ema": ema,
    "fisher": lambda case: weighed(case, case.config.fisher), "cofima": lambda case: weighed(case, case.config.cofima),
    "wise-ft": lambda case: each(mix, case.start, case.models[-1], lam=case.config.wise_ft.alpha),
}  # fmt: skip
VARIANTS = [(name, "near", {}) for name in RULES] + [
    ("task-arithmetic", "near", {"task_arithmetic": {"scale": 0.9}}),
    ("ties", "near", {"ties": {"scope": "tensor", "keep": "at least"}}),
    *[("ties", "lattice", {"ties": s}) for s in (
        {}, {"keep": "at least"}, {"scope": "tensor"}, {"scope": "tensor", "keep": "at least", "zero": "positive"},
        {"zero": "positive"}, {"zero": "negative"}, {"density": 0.5, "scale": 0.55}, {"density": 1.0}, {"density": 1e-9},
        {"merge": "sum", "scope": "tensor"},
    )],
    ("dare", "near", {"dare": {"p": 0.7, "scale": 0.5}}),
    ("dare-ties", "lattice", {"dare": {"p": 0.5}, "ties": {"scope": "tensor", "keep": "at least"}}),
    ("dare-ties", "lattice", {"dare": {"p": 0.5, "scale": 0.3}, "ties": {"density": 0.5, "zero": "positive"}}),
    ("dare-ties", "near", {"dare": {"p": 0.5}, "ties": {"merge": "sum"}}),
    *[(name, kind, {"della": {"p": 0.3, "epsilon": 0.3, "scope": scope, "rescale": how, "scale": 0.7}})
      for name, kind, scope, how in (
        ("della", "lattice", "row", "probability"), ("della-linear", "near", "tensor", "norm"),
        ("della", "near", "global", "norm"), ("della-linear", "lattice", "global", "probability"))],
    ("della-linear", "near", {"della": {"p": 0.0, "epsilon": 0.0}}),
    ("magmax", "near", {"magmax": {"scale": 1.0}}),
    *[("magmax", "lattice", {"magmax": {"ties": order}}) for order in ("later", "earlier")],
    *[("fisher", kind, {"fisher": {"accumulate": how, "lam": 0.3}})
      for kind in ("near", "lattice") for how in ("sum", "ema", "last")],
    *[("cofima", "lattice", {"cofima": {"accumulate": how, "lam": 0.7}}) for how in ("sum", "ema", "last")],
    ("coma", "near", {"coma": {"lam": 0.2}}),
    ("ema", "near", {"ema": {"weight": 0.2}}),
    ("wise-ft", "near", {"wise_ft": {"alpha": 0.8}}),
    ("regmean", "near", {"regmean": {"alpha": 0.5}}),
    ("iso-c", "near", {"iso_c": {"scale": 0.6}}),
    ("tsv", "near", {"tsv": {"scale": 0.6}}),
    ("opcm", "near", {"opcm": {"alpha": 0.9}}),
    ("breadcrumbs", "near", {"breadcrumbs": {"density": 0.5, "gamma": 0.1, "scale": 1.0}}),
    ("breadcrumbs", "near", {"breadcrumbs": {"density": 0.8, "gamma": 0.5}}),
    ("sce", "near", {"sce": {"density": 1.0}}),
    ("sce", "lattice", {"sce": {"density": 1.0}}),
    ("knots", "near", {"ties": {"scope": "tensor", "scale": 0.6, "density": 0.7}}),
    ("knots", "near", {"ties": {"merge": "sum", "density": 0.7}}),
]  # fmt: skip


def test_every_rule_has_a_formula_here():
    assert set(ORACLES) == set(RULES)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize(("name", "kind", "groups"), VARIANTS, ids=lambda x: str(x).replace(" ", ""))
def test_rule_equals_its_formula(name, kind, groups, count):
    case = Case(count, kind, groups)
    merged, expected = case.merge(name), ORACLES[name](case)
    before = {n: x.clone() for n, x in case.module.state_dict().items()}
    assert case.padding.any() and not merged[case.padding].any()
    case.flat.theta.data.copy_(merged)
    for n, x in case.module.state_dict().items():
        if n in expected:
            close = TURNING if name == "opcm" else ROUNDING
            torch.testing.assert_close(x.double(), expected[n], **close, msg=lambda m, n=n: f"{n}: {m}")
        else:
            assert n.startswith("frozen") or n == "steps"
            assert torch.equal(x, before[n])


def tensors_of(about):
    """The tensors that a rule gets besides the weights."""
    if isinstance(about, dict):
        return [moment for _, moment in about.values()]
    return [] if about is None else [about]


@pytest.mark.parametrize("name", RULES)
def test_stream_state_and_aliasing(name):
    case = Case(5)
    whole, start, rule = case.merge(name), case.base.theta.clone(), case.rule(name)
    with pytest.raises(ValueError, match="no model to merge yet"):
        result(rule)
    for k in range(5):
        theta, about = case.thetas[k].clone(), copy.deepcopy(case.about(rule, k))
        rule.update(theta, about)
        assert torch.equal(theta, case.thetas[k])
        before = case.about(rule, k)
        for mine, its in zip(tensors_of(about), tensors_of(before), strict=True):
            assert torch.equal(mine, its)
        for x in (theta, *tensors_of(about)):
            x.fill_(torch.nan)  # would reach the result if the rule held it
        if k == 1:  # save, and load into a new rule
            saved = {n: x.clone() for n, x in rule.state_dict().items()}
            rule = case.rule(name)
            rule.load_state_dict(saved)
    first = result(rule)
    assert torch.equal(first, whole)
    first.fill_(torch.nan)
    assert torch.equal(result(rule), whole) and torch.equal(case.base.theta, start)


@pytest.mark.parametrize(
    ("name", "groups"), [*((n, {}) for n in RULES), ("fisher", {"fisher": {"accumulate": "ema", "lam": 0.3}})]
)
def test_restart_is_a_merge_of_two(name, groups):
    """A restarted rule merges the stand-in and the new model. It keeps its Fisher and continues its random numbers; RegMean
    keeps its moments, OPCM its scale and the norms."""
    case = Case(4, groups=groups)
    fisher = case.rule(name).needs_fisher
    left = {"fisher"} if fisher else {f"gram.{k}" for k in case.moments[0]} if name == "regmean" else set()
    left |= {"sizes"} if name == "opcm" else set()
    merged = []
    for forgets in (False, True):
        rule = case.feed(case.rule(name), [0, 1])
        if forgets:
            rule.forget()
            assert set(rule.kept) == left and rule.fed == 2
            if name == "opcm":
                lam, norms = rule.kept["sizes"].tolist()
                case.lam = lam, [norms / 2] * 2
        stand_in = case.thetas[2].clone()
        rule.restart(stand_in)
        stand_in.fill_(torch.nan)
        merged.append(result(case.feed(rule, [3])))
    assert torch.equal(*merged)
    f, g, _, last = case.fishers
    s = getattr(case.config, name, None)
    how = s.accumulate if fisher else "last"
    past = g if how == "last" else each(torch.add, f, g) if how == "sum" else each(mix, f, g, lam=s.lam)
    one, two, _, end = case.moments
    case.moments = [{k: (axis, g + two[k][1]) for k, (axis, g) in one.items()}, end]
    case.models, case.fishers, case.subsequences, case.shares = case.models[2:], [past, last], (3, 4), (2, 1)
    if name == "ema":  # the stand-in is its average so far
        case.start, case.models = case.models[0], case.models[1:]
    expected = case.named(case.filled(lambda n: ORACLES[name](case)[n]))
    each(lambda x, y: torch.testing.assert_close(x, y, **ROUNDING), case.named(merged[0]), expected)


@pytest.mark.parametrize("name", RULES)
def test_unscaled_inverts_the_scale(name):
    scaled = [g for g in RULES[name].groups if hasattr(getattr(Config(), g), "scale")]
    case, plain = (Case(5, groups={g: {"scale": s} for g in scaled}) for s in (0.3, 1.0))
    back = case.rule(name).unscaled(case.merge(name))
    torch.testing.assert_close(back, plain.merge(name), rtol=0, atol=1e-5)  # the rounding grows by 1 / 0.3


@pytest.mark.parametrize(
    "name", ["average", "task-arithmetic", "ties", "magmax", "stock", "fisher", "regmean", "iso-c", "tsv"]
)
def test_order_of_the_models_does_not_matter(name):
    case = Case(5, groups={"ties": {"keep": "at least"}})
    one, other = case.merge(name), case.merge(name, [3, 0, 4, 2, 1])
    torch.testing.assert_close(one, other, **(ROUNDING if name != "magmax" else {"rtol": 0, "atol": 0}))


def test_stream_equals_the_op_over_the_list():
    torch.manual_seed(0)
    theta, bounds = torch.randn(3000), [0, 5, 1000, 3000]
    models = [theta + 0.2 * (theta.roll(1) + torch.randn(3000)) for _ in range(5)]
    fishers, config = [torch.rand(3000) for _ in models], configured({"ties": {"scope": "tensor"}})
    lists = {
        "average": fk.weighted_sum(models),
        "task-arithmetic": fk.weighted_sum(models, [0.4] * 5, initial=theta),
        "ties": fk.ties_merge(models, initial=theta, segments=bounds),
        "dare": fk.dare_merge(models, 0.1, [0.2] * 5, initial=theta, seed=SEED, subsequence=1),
        "magmax": fk.magmax_merge(models, initial=theta, scale=0.5),
        "stock": fk.stock_merge(models, initial=theta, segments=bounds),
        "fisher": fk.fisher_average(models, fishers),
    }
    for name, expected in lists.items():
        rule = build_rule(name, Base(theta, bounds, seed=SEED), config)
        for model, fisher in zip(models, fishers, strict=True):
            rule.update(model, fisher if rule.needs_fisher else None)
        exact = name in ("ties", "magmax")  # the README of the kernels promises equal bits
        torch.testing.assert_close(result(rule), expected, **({"rtol": 0, "atol": 0} if exact else ROUNDING))


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_random_mix_takes_every_model_equally_often(count):
    n, mixes = 40_000, []
    for seed in (1, 2):
        rule = build_rule("randmix", Base(torch.zeros(n), seed=seed), Config())
        for k in range(count):
            rule.update(torch.full((n,), float(k)))
        mixes.append(result(rule))
        observed = torch.bincount(mixes[-1].long(), minlength=count)
        chi_square = ((observed - n / count) ** 2).sum() / (n / count)
        assert chi_square <= count - 1 + 5 * (2 * (count - 1)) ** 0.5
        assert len(observed) == count and mixes[-1].frac().count_nonzero() == 0
    assert count == 1 or not torch.equal(*mixes)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dare_drops_a_part_p_of_every_model_for_itself(p):
    n = 40_000
    rule = build_rule("dare", Base(torch.zeros(n), seed=SEED), configured({"dare": {"p": p}}))
    for k in range(3):
        rule.update(torch.full((n,), 2.0**k))
    digits = (result(rule) * 3 * (1 - p)).round().long()  # bit k: whether model k was kept
    for part in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        share, q = torch.stack([digits >> k & 1 for k in part]).prod(0).double().mean().item(), (1 - p) ** len(part)
        assert abs(share - q) < 5 * (q * (1 - q) / n) ** 0.5


def test_a_refused_model_does_not_count():
    base = Base(torch.zeros(4))
    rule = build_rule("average", base, Config())
    with pytest.raises(ValueError):
        rule.update(torch.ones(3))
    rule.update(torch.full((4,), 4.0))
    assert rule.merged(torch.empty(4)).tolist() == [4.0] * 4
    rule = build_rule("fisher", base, Config())
    with pytest.raises(ValueError, match="needs the diagonal Fisher"):
        rule.update(torch.ones(4))
    rule.update(torch.full((4,), 4.0), torch.zeros(4))
    assert rule.merged(torch.empty(4)).tolist() == [4.0] * 4
    rule.forget()
    with pytest.raises(ValueError, match="no model to merge yet"):
        rule.merged(torch.empty(4))
    with pytest.raises(ValueError, match="call restart"):
        rule.update(torch.ones(4), torch.ones(4))
    rule = build_rule("regmean", base, Config())
    with pytest.raises(ValueError, match="needs the second moments"):
        rule.update(torch.ones(4))
    rule.update(torch.full((4,), 4.0), {})
    assert rule.merged(torch.empty(4)).tolist() == [4.0] * 4


def test_two_rules_do_not_share_a_state():
    one, other = (build_rule("average", Base(torch.zeros(4)), Config()) for _ in range(2))
    one.update(torch.ones(4))
    other.load_state_dict(one.state_dict())
    other.update(torch.full((4,), 9.0))
    assert one.merged(torch.empty(4)).tolist() == [1.0] * 4


@pytest.mark.parametrize("rescale", ["probability", "norm"])
def test_magprune_is_that_of_mergekit(rescale, monkeypatch):
    """mergekit's own code with our draws; it keeps the L1 norm, or with no norm leaves the division to us."""
    sparsify = pytest.importorskip("mergekit.sparsify")
    settings = configured({"della": {"p": 0.6, "epsilon": 0.2, "rescale": rescale}}).della
    torch.manual_seed(0)
    delta, draws, chances = torch.randn(5, 41), torch.rand(5, 41), []
    monkeypatch.setattr(torch, "bernoulli", lambda p: chances.append(p) or (1 - draws < p).float())
    theirs = sparsify.della_magprune(delta, 0.4, 0.2, "l1" if rescale == "norm" else None)
    if rescale == "probability":
        theirs = theirs / chances[0]
    torch.testing.assert_close(della_rule.magpruned(delta, draws, settings), theirs)
    assert 0 < theirs.count_nonzero() < theirs.numel()


def test_della_drops_small_entries_more_often():
    n = 40_000
    base = Base(torch.zeros(n), shapes=[(n // 20, 20)], seed=SEED)
    rule = build_rule("della-linear", base, configured({"della": {"p": 0.4, "epsilon": 0.3}}))
    rule.update(torch.arange(1.0, 21.0).repeat(n // 20))
    kept = (result(rule).view(-1, 20) != 0).double().mean(0)
    expected = torch.linspace(0.3, 0.9, 20).double()
    assert (kept - expected).abs().max() < 5 * (0.25 / (n // 20)) ** 0.5


def few_images(count=3, inputs=20):
    """(weights of models [5, inputs], X [4, inputs] of each, of which the first input is zero)."""
    torch.manual_seed(2)
    images = torch.randn(count, 4, inputs) * torch.linspace(0, 2, inputs)
    return torch.randn(count, 5, inputs), images


def least_squares(models, images):
    """The W nearest to the average of the models among those with the least sum of |X_i W^T - X_i W_i^T|^2, float64."""
    models, images = models.double(), images.double()
    mean = models.mean(0)
    goal = torch.cat([x @ (w - mean).mT for w, x in zip(models, images, strict=True)])
    return mean + torch.linalg.lstsq(images.flatten(0, 1), goal, rcond=1e-10, driver="gelsd").solution.mT


@pytest.mark.parametrize("count", [2, 3, 9])
def test_regmean_of_fewer_images_than_inputs(count):
    """With alpha 1: 8 or 12 images and 20 inputs; with 36 images all directions have data but that of the first input."""
    models, images = few_images(count)
    rule = build_rule("regmean", Base(torch.zeros(100), shapes=[(5, 20)]), configured({"regmean": {"alpha": 1.0}}))
    for w, x in zip(models, images, strict=True):
        rule.update(w.flatten(), {0: (1, x.mT @ x)})
    found = result(rule).view(5, 20).double()
    torch.testing.assert_close(found, least_squares(models, images), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[:, 0], models.double().mean(0)[:, 0])


def test_regmean_below_alpha_1_solves_as_before():
    models, images = few_images(2)
    grams = [x.mT @ x for x in images]
    grams = [torch.where(torch.eye(20) == 1, g, 0.9 * g) for g in grams]
    total, dead = sum(grams).double(), torch.arange(20) == 0
    change = grams[1].double() @ (models[1].double() - models[0].double()).mT
    step = torch.linalg.solve(total + torch.diag(dead.double()), change)
    expected = torch.where(dead, models.mean(0).double(), models[0].double() + step.mT)
    assert torch.equal(nearest(*models, grams[1], sum(grams), models.mean(0), 0.9), expected)


def test_regmean_names_moments_that_are_not_finite():
    case = Case(2)
    axis, gram = case.moments[1][case.flat.names.index("a.weight")]
    gram[1, 1] = torch.nan
    with pytest.raises(UserError, match="a.weight: the second moments of its inputs have NaN or inf"):
        case.merge("regmean")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["iso-c", "tsv", "opcm", "knots"])
def test_a_matrix_without_singular_values_is_named(name, value):
    case = Case(3)
    list(case.flat.views(case.thetas[1]))[case.flat.names.index("a.weight")][0, 1] = value
    with pytest.raises(UserError, match="a.weight: its task vector has NaN or inf"):
        case.merge(name)


def test_probabilities_of_della_that_are_none_are_refused():
    backbone = SimpleNamespace(layers=1)
    for p, epsilon in ((0.1, 0.15), (0.9, 0.15)):
        config = configured({"della": {"p": p, "epsilon": epsilon}})
        for name in ("della", "della-linear"):
            with pytest.raises(UserError, match=rf"--della.p {p} and --della.epsilon {epsilon}: "):
                METHODS[name].check(config, backbone)
