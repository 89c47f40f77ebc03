"""Compare TRM's search with an independent slow version: autograd through theta(alpha, beta) and the gradient norm.

The slow version computes the paper's formulas in float64 and shares only the random numbers with the fast one.
tests/kernels compares the fused ops with float64 formulas; here those formulas replace the ops, so that the
comparison is exact to 1e-8.
"""

import itertools
import types

import fastmerge_kernels as fk
import pytest
import torch
import torch.nn.functional as F
import toy
from fastmerge_kernels import reference
from torch import nn
from torch.func import functional_call

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.flat import FlatModel
from fastmerge.methods import trm
from fastmerge.models.heads import Head
from fastmerge.training import Learner

N, CLASSES = 12, 4


class ToyBackbone(nn.Module):
    """A two-block transformer with fused attention and class tokens, small enough for double backward."""

    name, family, weights = "toy", "toy", "random"
    image_size, mean, std = 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    feature_dim, width, layers, has_class_token = 6, 8, 2, True

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(12, self.width)
        self.cls = nn.Parameter(torch.randn(1, 1, self.width))
        self.qkv = nn.ModuleList(nn.Linear(self.width, 3 * self.width) for _ in range(self.layers))
        self.mlp = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(self.layers))
        self.proj = nn.Linear(self.width, self.feature_dim, bias=False)

    @property
    def tower(self):
        return types.SimpleNamespace(
            blocks=nn.ModuleList(nn.ModuleList(pair) for pair in zip(self.qkv, self.mlp, strict=True))
        )

    def class_tokens(self, images):
        b = images.shape[0]
        x = images.to(self.cls.dtype).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(b, 4, 12)
        x = torch.cat([self.cls.expand(b, -1, -1), self.patch(x)], 1)
        tokens = []
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + torch.tanh(mlp(x))
            tokens.append(x[:, 0])
        return self.proj(x[:, 0]), torch.stack(tokens)

    def forward(self, images):
        return self.class_tokens(images)[0]


class ToyHead(Head):
    kind, needs_initial_features = "toy", False

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.randn(CLASSES, ToyBackbone.feature_dim))

    def forward(self, features, classes):
        return 5 * F.normalize(features, dim=1) @ self.rows[classes].to(features.dtype).T

    def trainable(self):
        return []


def make_search(*flags, dtype=torch.float64, task_index=1):
    """A search between two random models (theta_{t-1}, theta_t) on random images."""
    torch.manual_seed(0)
    config = parse([f"--batch-size={N}", "--epochs=1", "--merge-epochs=2", "--device=cpu", *flags])
    learner = Learner(ToyBackbone(), ToyHead(), config, seed=3, device=torch.device("cpu"))
    if dtype != torch.float32:
        learner.flat = FlatModel(learner.backbone, dtype=dtype)
        learner.theta.add_(1e-9 * torch.randn_like(learner.theta) * (learner.theta != 0))  # digits beyond fp32
    images = TaskImages(torch.randint(0, 256, (N, 3, 4, 4), dtype=torch.uint8), torch.randint(0, CLASSES, (N,)), 0)
    task = Task(task_index, "t", tuple(range(CLASSES)), None, None)
    method = trm.TRM(learner)
    if method.initial is not None:
        method.initial.add_(0.1 * torch.randn_like(learner.theta) * (learner.theta != 0))
    during = method.begin(task)
    learner.theta.add_(0.3 * torch.randn_like(learner.theta) * (learner.theta != 0))
    return method.merge(task, images, during)


@pytest.fixture
def float64_ops(monkeypatch):
    """Replace the fused fp32 ops with the float64 reference formulas."""

    def merge(*args, out, **kwargs):
        return out.copy_(reference.trm_merge(*args, **kwargs))

    ops = types.SimpleNamespace(
        trm_direction=reference.trm_direction, trm_merge=merge, subspace_gradient=reference.subspace_gradient
    )
    monkeypatch.setattr(trm, "fk", ops)


def slow_gradients(search, alpha, beta, gamma=None, sizes=None, of=None):
    """Return dL_tra/dalpha and dL_tra/dbeta by autograd through all steps, and the terms of the loss.

    gamma: of the span, whose slope comes third. sizes: of the three terms at the start of the search.
    of: `[n]`, the group of every entry, for coefficients of several groups.
    """
    flat, learner, settings = search.learner.flat, search.learner, search.settings
    before, after = search.previous.double(), search.current.double()
    n = before.numel()
    alive = (before != 0) | (after != 0)
    seed, subsequence = search.random["seed"], search.random["subsequence"]
    replaced, from_before = reference.replaced(n, seed, subsequence, settings.replace_ratio)
    free = alive & ~replaced if settings.replace == "anchored" else alive
    r, d = reference.random_normal(n, seed, subsequence) * free, (after - before) * free
    perpendicular = r - (r @ d) / (d @ d) * d
    p = perpendicular / perpendicular.norm()

    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    along = [a, b]
    if of is not None:
        a, b = a[of], b[of]
    source = torch.where(from_before, before, after)
    if settings.replace == "none":
        theta = before + a * d + b * p
    elif settings.replace == "anchored":
        theta = torch.where(replaced & alive, source, before + a * d + b * p)
    else:
        start = search.method.initial
        theta = torch.where(replaced, source, start) + a * (after - start) + (1 - a) * (before - start) + b * p
        theta = theta * alive

    if gamma is not None:
        c = torch.tensor(gamma, dtype=torch.float64, requires_grad=True)
        along.append(c)
        theta = theta + (c if of is None else c[of]) * (before - search.method.initial)

    rows = search.batches.rows(0)
    pixels, labels = search.images.batch(rows)
    images = learner.plain(pixels)

    def tokens_of(weights):
        return functional_call(
            TokensOf(flat.module), {f"module.{k}": v for k, v in flat.as_dict(weights).items()}, images
        )

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        features, tokens = tokens_of(theta)
        task = F.cross_entropy(learner.head(features, search.objective.classes), labels)
        share = {"mean": 0.5, "current": 1.0, "previous": 0.0}[settings.teacher]
        teacher = (share * tokens_of(after)[1] + (1 - share) * tokens_of(before)[1]).detach()
        q = torch.tensor([1.0, torch.e]) if search.settings.layer_b == 1 else torch.tensor([torch.e, 1.0])
        weights = (q / q.sum()).double()
        pre = sum(w * (x - y).pow(2).sum() / N for w, x, y in zip(weights, tokens, teacher, strict=True))
        (g,) = torch.autograd.grad(task, theta, create_graph=True)
        energy = g.pow(2).sum()
        by = sizes if settings.scale == "relative" else (1.0, 1.0, 1.0)
        curvature = energy / by[2]
        if settings.energy == "bounded":
            curvature = energy / (energy + sizes[2])
        total = settings.lambda0 * task / by[0] + settings.lambda1 * pre / by[1] - settings.lambda2 * curvature
        slopes = torch.autograd.grad(total, along)
    return torch.stack(slopes), {"L_task": task, "L_pre": pre, "gradient_energy": g.pow(2).sum(), "loss": total}


class TokensOf(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module.class_tokens(images)


@pytest.mark.parametrize("replace", ["anchored", "none", "literal"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.3, 0.7), (1.2, -0.4)])
def test_gradients_equal_autograd_through_the_merge(float64_ops, replace, alpha, beta):
    flags = [f"--trm.replace={replace}", f"--trm.alpha={alpha}", f"--trm.beta={beta}", "--trm.lr=0"]
    search = make_search(*flags, "--trm.lambda2=0.05", "--trm.layer-b=2")
    terms = search.step(0)
    slopes, expected = slow_gradients(search, alpha, beta)
    torch.testing.assert_close(search.coefficients.grad, slopes, rtol=1e-8, atol=1e-8)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-8, atol=1e-8, msg=name)
    assert abs(slopes).min() > 1e-4  # the gradients are not zero


@pytest.mark.parametrize("way", ["exact", "difference", "parts"])
@pytest.mark.parametrize(
    "flags",
    [
        "--trm.teacher=current",
        "--trm.teacher=previous --trm.scale=relative",
        "--trm.energy=bounded",
        "--trm.scale=relative --trm.energy=bounded",
        "--trm.space=span",
        "--trm.space=span --trm.replace=literal --trm.scale=relative",
    ],
)
def test_other_readings_equal_autograd(float64_ops, flags, way):
    parts = ["--micro-batch=5"] if way == "parts" else []
    flags = [*flags.split(), "--trm.lambda0=0.8", "--trm.lambda1=0.3", "--trm.lambda2=0.05", "--trm.lr=0", *parts]
    search = make_search(*flags, "--trm.alpha=0.3", "--trm.beta=0.4", "--trm.layer-b=2")
    if way == "difference":
        search.objective.relative_step = 1e-9
    gamma = None
    if search.settings.space == "span":
        gamma = -0.6
        search.method.initial.add_(0.2 * torch.randn_like(search.previous) * (search.previous != 0))
        search.past = search.previous - search.method.initial
        search.coefficients.data[2] = gamma
    sizes = [0.7, 1.9, 0.4]
    search.objective.take_sizes(torch.tensor(sizes, dtype=torch.float64))
    terms = search.step(0)
    slopes, expected = slow_gradients(search, 0.3, 0.4, gamma, sizes)
    close = {"rtol": 1e-8, "atol": 1e-8} if way != "difference" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(search.coefficients.grad, slopes, **close)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-8, atol=1e-8, msg=name)
    assert abs(slopes).min() > 1e-4


@pytest.mark.parametrize("parts", [0, 5])
def test_the_sizes_are_those_of_the_first_batch(float64_ops, parts):
    """Then every term that has a lambda is 1 at the start, and a search that goes on keeps the sizes."""
    flags = ["--trm.scale=relative", "--trm.lambda0=2", "--trm.lambda1=3", "--trm.lambda2=5", "--trm.layer-b=2"]
    search = make_search(*flags, "--trm.lr=0.1", f"--micro-batch={parts}")
    terms = search.step(0)
    torch.testing.assert_close(terms["loss"], torch.tensor(2.0 + 3 - 5, dtype=torch.float64), rtol=0, atol=1e-12)
    names = ("L_task", "L_pre", "gradient_energy")
    torch.testing.assert_close(search.objective.sizes, torch.stack([terms[name] for name in names]))
    again = make_search(*flags)
    again.load(search.tensors())
    assert again.objective.lambdas == search.objective.lambdas != (2, 3, 5)
    alone = make_search(*flags[:1], "--trm.lambda0=0", "--trm.lambda2=0", "--trm.lambda1=3", "--trm.layer-b=2")
    torch.testing.assert_close(float(alone.step(0)["loss"]), 3.0)


@pytest.mark.parametrize("space", ["line", "span"])
def test_the_last_step_says_where_the_search_ended_and_why(space):
    flags = ["--trm.lr=0.02", "--trm.lambda2=0.05", "--merge-epochs=4", "--trm.replace-ratio=0.5", "--trm.layer-b=2"]
    search, said = make_search(*flags, f"--trm.space={space}", dtype=torch.float32), []
    search.learner.parts.say = said.append
    steps = [search.step(i) for i in range(search.steps)]
    last = steps[-1]
    assert "effective_alpha" in last and "effective_alpha" not in steps[0]
    names = ("alpha", "beta", "gamma")[: len(search.coefficients)]
    for name, slope in zip(names, search.coefficients.grad, strict=True):
        found = sum(float(last[f"{term}_slope_{name}"]) for term in ("L_task", "L_pre", "gradient_energy"))
        assert found == pytest.approx(float(slope), rel=1e-4)
    alpha, beta = search.coefficients.detach()[:2].tolist()
    seed, subsequence = search.random["seed"], search.random["subsequence"]
    replaced, from_before = reference.replaced(search.previous.numel(), seed, subsequence, 0.5)
    d = (search.current - search.previous).double()
    position = torch.where(replaced, (~from_before).double(), torch.full_like(d, alpha))  # of each entry along d
    effective = float((position * d * d).sum() / (d @ d))
    assert float(last["effective_alpha"]) == pytest.approx(effective, abs=1e-5)
    noise = float((((position - effective) * d).square().sum() / (d @ d)).sqrt())
    assert float(last["mask_noise"]) == pytest.approx(noise, abs=1e-4) and noise > 0.1
    assert float(last["beta_share"]) == pytest.approx(abs(beta) / float(d.norm()), rel=1e-4)
    assert float(last["sign_steps"]) == pytest.approx(abs(alpha - 0.5) / (0.02 * 4), rel=1e-6)
    search.finish()
    assert len(said) == (float(last["sign_steps"]) > 0.9)


@pytest.mark.parametrize("per", ["model", "block"])
def test_a_task_that_moves_nothing_ends_in_numbers(per, tmp_path):
    flags = ["--epochs=0", "--merge-epochs=1", "--trm.lambda1=0", f"--trm.per={per}"]
    learner = toy.learner(*flags, method="l2p")  # a toy with blocks
    method = trm.TRM.build(learner, toy.nowhere(tmp_path), None)
    for task, images in toy.tasks()[:2]:
        learner.grow_head(task, images)
        during = method.begin(task)
        toy.work(method.train(task, images, during))
        search = method.merge(task, images, during)
    last = [search.step(i) for i in range(search.steps)][-1]
    assert last["effective_alpha"] == 0 and last["mask_noise"] == 0
    assert all(torch.as_tensor(value).isfinite() for value in last.values())
    assert learner.theta.isfinite().all()


OBJECTIVES = [lambdas for lambdas in itertools.product((0, 1), repeat=3) if any(lambdas)]


@pytest.mark.parametrize("parts", [0, 5])
@pytest.mark.parametrize("on", OBJECTIVES)
def test_every_row_of_table_3(float64_ops, on, parts):
    """Each term alone and with others, the whole batch at once and in parts; only the terms with a weight are reported."""
    flags = [f"--trm.lambda{k}={w}" for k, w in enumerate((0.7, 0.2, 0.05)) if on[k]]
    flags += [f"--trm.lambda{k}=0" for k in range(3) if not on[k]]
    search = make_search(*flags, "--trm.lr=0", "--trm.alpha=0.3", "--trm.layer-b=2", f"--micro-batch={parts}")
    terms = search.step(0)
    slopes, expected = slow_gradients(search, 0.3, 0.0)
    torch.testing.assert_close(search.coefficients.grad, slopes, rtol=1e-8, atol=1e-8)
    assert {"L_pre": on[1], "gradient_energy": on[2], "L_task": on[0] or on[2]}.items() <= {
        name: int(name in terms) for name in ("L_task", "L_pre", "gradient_energy")
    }.items()
    for name in terms.keys() & expected.keys():
        torch.testing.assert_close(terms[name], expected[name].detach(), rtol=1e-8, atol=1e-8, msg=name)


def test_no_term_no_search():
    """Row a of Table 3: the merge at the start of the search."""
    search = make_search(
        "--trm.lambda0=0", "--trm.lambda1=0", "--trm.lambda2=0", "--trm.alpha=0.3", dtype=torch.float32
    )
    assert search.steps == 0
    search.finish()
    assert torch.equal(
        search.learner.theta, fk.trm_merge(search.previous, search.current, 0.3, 0.0, search.direction, **search.random)
    )


def test_fp32_ops_agree_with_the_float64_search():
    fast = make_search("--trm.lr=0", "--trm.alpha=0.3", "--trm.beta=0.2", "--trm.layer-b=2", dtype=torch.float32)
    fast.step(0)
    fast.learner.flat = FlatModel(fast.learner.backbone, dtype=torch.float64)
    slopes, _ = slow_gradients(fast, 0.3, 0.2)
    torch.testing.assert_close(fast.coefficients.grad, slopes.double(), rtol=1e-3, atol=1e-4)


def test_layer_weights_by_hand():
    e = torch.e
    expected = torch.tensor([e, e, 1.0, e, e * e])  # L = 5, b = 3: e, e, e^0, e^1, e^2
    torch.testing.assert_close(trm.layer_weights(5, 3), expected / expected.sum())
    assert trm.layer_weights(12, 20).allclose(torch.full((12,), 1 / 12))


def test_search_lowers_its_objective_and_writes_the_result():
    search = make_search("--trm.lr=0.05", "--trm.lambda2=0", "--merge-epochs=30", dtype=torch.float32)
    losses = [float(search.step(i)["loss"]) for i in range(search.steps)]
    assert search.steps == 30 and losses[-1] < losses[0]
    search.finish()
    theta = search.learner.theta.clone()
    alpha, beta = search.coefficients.detach()
    assert torch.equal(
        theta, fk.trm_merge(search.previous, search.current, alpha, beta, search.direction, **search.random)
    )
    assert search.method.state_dict() == {}


def test_first_task_is_not_merged_unless_asked():
    assert make_search(task_index=0) is None
    assert make_search("--trm.merge-first", task_index=0) is not None


def test_a_new_direction_every_epoch():
    per_task, per_epoch = (make_search(f"--trm.direction={d}", dtype=torch.float32) for d in ("task", "epoch"))
    for search in (per_task, per_epoch):
        for i in range(search.steps):
            search.step(i)
    assert per_task.random["subsequence"] == 0 and per_epoch.random["subsequence"] == 1


def test_state_goes_on_in_a_new_search():
    """A search that is saved and loaded into a fresh one continues with the same bits."""
    flags = ["--merge-epochs=6", "--trm.direction=epoch"]
    whole = make_search(*flags, dtype=torch.float32)
    for i in range(6):
        whole.step(i)
    for cut in (1, 3, 6):
        first = make_search(*flags, dtype=torch.float32)
        for i in range(cut):
            first.step(i)
        second = make_search(*flags, dtype=torch.float32)
        second.load({k: v.clone() for k, v in first.tensors().items()})
        for i in range(cut, 6):
            second.step(i)
        assert torch.equal(second.coefficients, whole.coefficients)


def distances(replace, tasks=10, n=20_000):
    """||theta - theta_init|| after each of `tasks` merges at alpha = 1/2, where every task moves theta by about 1."""
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(n, generator=generator)
    theta, lengths = initial.clone(), []
    for task in range(tasks):
        new = theta + torch.randn(n, generator=generator) / n**0.5
        random = {"seed": task, "subsequence": 0, "replace": replace}
        direction = fk.trm_direction(theta, new, **random)
        theta = fk.trm_merge(
            theta, new, 0.5, 0.0, direction, **random, initial=initial if replace == "literal" else None
        )
        lengths.append(float((theta - initial).norm()))
    return lengths


def test_the_literal_replacement_diverges():
    """Read literally, 60 % of the entries get their task vector twice: per task the mean distance from theta_init grows
    1.6-fold (1 + 0.6), its norm sqrt(0.6 * 2^2 + 0.4) = 1.67-fold. The other readings grow like a random walk."""
    literal, anchored, plane = (distances(r) for r in ("literal", "anchored", "none"))
    ratios = [b / a for a, b in zip(literal[4:], literal[5:], strict=False)]
    assert ratios == pytest.approx([2.8**0.5] * 5, rel=0.05)
    assert literal[-1] > 50 * anchored[-1]
    assert anchored[-1] < 10**0.5 and plane[-1] < 10**0.5  # at most ten independent moves of length 1


def groups_by_name(search):
    """The block of every entry by the names of the toy's tensors, and 2 for the others."""
    flat = search.learner.flat
    of = torch.full((flat.numel,), 2)
    for name, view in zip(flat.names, flat.views(of), strict=True):
        if name.startswith(("qkv.", "mlp.")):
            view.fill_(int(name.split(".")[1]))
    return of


ALPHA, BETA, GAMMA = [0.3, 0.9, 0.5], [0.2, -0.4, 0.1], [0.1, 0.0, -0.2]


@pytest.mark.parametrize("replace", ["anchored", "none", "literal"])
@pytest.mark.parametrize("space", ["line", "span"])
def test_gradients_of_every_block_equal_autograd(float64_ops, replace, space):
    flags = ["--trm.per=block", "--trm.lr=0", "--trm.lambda2=0.05", f"--trm.replace={replace}", f"--trm.space={space}"]
    search = make_search(*flags, "--trm.layer-b=2")
    gamma = GAMMA if space == "span" else None
    search.coefficients.data = torch.tensor([ALPHA, BETA] + ([gamma] if gamma else []), dtype=torch.float64)
    terms = search.step(0)
    slopes, expected = slow_gradients(search, ALPHA, BETA, gamma, of=groups_by_name(search))
    assert (
        search.groups.names == ["block_1", "block_2", "rest"] and len(search.groups.pieces) > 3
    )  # blocks in two pieces
    torch.testing.assert_close(search.coefficients.grad, slopes, rtol=1e-8, atol=1e-8)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-8, atol=1e-8, msg=name)
    assert abs(slopes).min() > 1e-6


@pytest.mark.parametrize("replace", ["anchored", "literal"])
def test_equal_coefficients_of_all_blocks_are_one_pair(replace):
    """With the fused ops: the same model to the bit, the slopes of the one pair in sum, and the same report."""
    flags = ["--trm.beta=0.2", "--trm.alpha=0.4", "--trm.lr=0", f"--trm.replace={replace}", "--merge-epochs=1"]
    one, many = (make_search(*flags, f"--trm.per={per}", dtype=torch.float32) for per in ("model", "block"))
    first, second = one.step(0), many.step(0)
    torch.testing.assert_close(many.coefficients.grad.sum(1), one.coefficients.grad, rtol=1e-4, atol=1e-5)
    for search in (one, many):
        search.finish()
    assert torch.equal(one.learner.theta, many.learner.theta)
    for name, value in first.items():
        loose = {"rtol": 0.05, "atol": 1e-3} if name == "mask_noise" else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(second[name].double(), value.double(), **loose, msg=name)


def test_the_report_of_blocks_is_where_each_of_them_is():
    search = make_search("--trm.per=block", "--trm.replace=none", "--trm.lr=0", "--merge-epochs=1", dtype=torch.float32)
    search.coefficients.data = torch.tensor([ALPHA, BETA], dtype=torch.float64)
    terms = search.step(0)
    for k, name in enumerate(("block_1", "block_2", "rest")):
        assert float(terms[f"alpha_{name}"]) == ALPHA[k] and float(terms[f"beta_{name}"]) == BETA[k]
        assert float(terms[f"effective_alpha_{name}"]) == pytest.approx(ALPHA[k], abs=1e-4)
    assert float(terms["alpha"]) == pytest.approx(sum(ALPHA) / 3) and float(terms["mask_noise"]) < 1e-3
    search.finish()
    d = search.current - search.previous
    vector = search.learner.theta - search.previous - torch.tensor(ALPHA)[groups_by_name(search)] * d
    assert float(terms["beta_share"]) == pytest.approx(float(vector.norm() / d.norm()), rel=1e-3)


def test_blocks_are_needed():
    backbone = types.SimpleNamespace(name="a ResNet", tower=nn.Linear(1, 1), check_class_tokens=lambda: None, layers=2)
    config = parse(["--trm.per", "block"])
    with pytest.raises(
        UserError, match="--trm.per block: model a ResNet has no list of transformer blocks; choose a ViT$"
    ):
        trm.TRM.check(config, backbone)
    with pytest.raises(UserError, match="--trm.per block: --prompt-length merges prefixes"):
        trm.TRM.check(parse(["--trm.per", "block", "--prompt-length", "2"]), toy.Transformer())
