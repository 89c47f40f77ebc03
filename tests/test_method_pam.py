"""P&M: compare LoRA with written-out sums and with peft, the closed form with the paper's sum over stored models."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn
from torch.func import functional_call

from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.loop import kept_bytes
from fastmerge.methods.pam import PAM
from fastmerge.methods.posthoc import PostHoc
from fastmerge.models import load_backbone
from fastmerge.models.lora import LowRank, find_blocks
from fastmerge.plan import read_method
from fastmerge.training import Train


class Attention(nn.Module):
    """Attention with the separate projections that peft needs."""

    def __init__(self, d=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x)[:, None] for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class Backbone(toy.Backbone):
    """A toy with one attention layer over 6 tokens of 8 numbers."""

    def __init__(self):
        nn.Module.__init__(self)
        self.attn, self.outer = Attention(), nn.Linear(48, 5, bias=False)

    def forward(self, images):
        return self.outer(self.attn(images.flatten(1).to(self.outer.weight).view(-1, 6, 8)).flatten(1))


@pytest.fixture
def learner(monkeypatch):
    monkeypatch.setattr(toy, "Backbone", Backbone)
    return lambda *flags, **kw: toy.learner("--clip=0", "--pam.rank=2", "--pam.lr=5e-2", *flags, **kw)


def made(flat, rank=3, seed=0, targets=("key", "value")):
    return LowRank(flat, rank, targets, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "weights", "layer"),
    [
        ("tiny", "glyphs", "tower.transformer.resblocks.0.attn.in_proj_weight"),
        ("test_vit", "none", "tower.blocks.0.attn.qkv.weight"),
    ],
)
def test_fused_matrices_get_their_key_and_value_rows(name, weights, layer):
    torch.manual_seed(0)
    backbone, _ = load_backbone(name, weights, download=False)
    flat = FlatModel(backbone.eval())
    adapter, x = made(flat), torch.randn(2, 3, backbone.image_size, backbone.image_size)
    assert len(adapter.blocks) == 2 * backbone.layers and adapter.blocks[0].name == layer
    before, old = backbone(x), backbone.get_parameter(layer).detach().clone()
    same = functional_call(backbone, adapter.named(adapter.base + adapter.shift()), (x,))
    torch.testing.assert_close(same, before)  # B is zero at first
    adapter.theta.data.normal_(0, 0.1)
    a, b = adapter.theta.data[: 3 * old.shape[1]].view(3, -1), adapter.theta.data[3 * old.shape[1] :]
    b = b[: 3 * old.shape[1]].view(-1, 3)
    weights = (adapter.base + adapter.shift()).detach()
    moved = functional_call(backbone, adapter.named(weights), (x,))
    theta = flat.theta.detach()
    adapter.scatter(weights, theta)  # folds the shift in
    torch.testing.assert_close(backbone(x), moved)
    d, new = old.shape[1], backbone.get_parameter(layer).detach()
    assert torch.equal(new[:d], old[:d])  # the query rows
    torch.testing.assert_close(new[d : 2 * d], old[d : 2 * d] + b @ a)
    assert torch.equal(adapter.gather(theta), weights) and (moved - before).abs().max() > 1e-3


def test_lora_equals_peft_on_separate_projections(learner):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    backbone = Backbone()
    other = Backbone()
    other.load_state_dict(backbone.state_dict())
    flat = FlatModel(backbone)
    adapter = made(flat, rank=2)
    adapter.theta.data.normal_(0, 0.3)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["k_proj", "v_proj"])
    wrapped = peft.get_peft_model(other, config)
    pieces = adapter.theta.detach().split([16, 16] * 2)
    for k, name in enumerate(("k_proj", "v_proj")):
        layer = getattr(wrapped.base_model.model.attn, name)
        layer.lora_A["default"].weight.data.copy_(pieces[2 * k].view(2, 8))
        layer.lora_B["default"].weight.data.copy_(pieces[2 * k + 1].view(8, 2))
    x = torch.randn(4, 3, 4, 4)
    ours = functional_call(backbone, adapter.named(adapter.base + adapter.shift()), (x,))
    torch.testing.assert_close(ours, wrapped(x))
    ours.square().sum().backward()
    wrapped(x).square().sum().backward()
    theirs = [getattr(wrapped.base_model.model.attn, n) for n in ("k_proj", "v_proj")]
    wanted = [w for p in theirs for w in (p.lora_A["default"].weight.grad, p.lora_B["default"].weight.grad)]
    torch.testing.assert_close(adapter.theta.grad, torch.cat([w.flatten() for w in wanted]), rtol=1e-4, atol=1e-6)


def test_targets_and_models_without_attention():
    flat = FlatModel(Backbone())
    assert [b.name for b in find_blocks(flat.names, flat.shapes, flat.offsets, ("query",))] == ["attn.q_proj.weight"]
    with pytest.raises(UserError, match="no key or value projection"):
        flat = FlatModel(nn.Linear(2, 2))
        find_blocks(flat.names, flat.shapes, flat.offsets, ("key", "value"))
    with pytest.raises(UserError, match="ewc does not read it"):
        read_method("ewc", toy.parse(["--lora-rank", "4"]))
    with pytest.raises(UserError, match="pam does not read it; give --pam.rank"):
        PAM.check(toy.parse(["--lora-rank", "4"]), Backbone())


@pytest.mark.parametrize("perturb", ["task", "gauss", "none"])
@pytest.mark.parametrize("rank", [0, 2])
def test_perturbed_training_is_equation_15(learner, perturb, rank):
    run = learner(f"--pam.perturb={perturb}", f"--pam.rank={rank}", "--epochs=4")
    method = PAM(run)
    task, images = toy.tasks()[0]
    during = method.begin(task)
    phase = method.train(task, images, during)
    phase.trainable.theta.data.add_(0.1 * torch.randn_like(phase.trainable.theta))
    theta = phase.trainable.theta.detach().clone().requires_grad_()
    base, draws = during["previous"].clone(), []
    for i in range(8):
        theta.data.copy_(phase.trainable.theta.detach())
        values = phase.step(i)
        draws.append(float(values["perturbation"]))
        pixels, labels = images.batch(phase.batches.rows(i))
        x = run.augmented(pixels, run.generator("augment", 0, i))
        if rank:
            a1, b1, a2, b2 = (p.view(*s) for p, s in zip(theta.split(16), [(2, 8), (8, 2)] * 2, strict=True))
            shift = torch.cat([(b1 @ a1).flatten(), (b2 @ a2).flatten()])
        else:
            shift = theta - base
        c = draws[-1]
        if perturb == "gauss" and c:
            noise = torch.randn(shift.numel(), generator=run.generator("gauss", 0, i))
            weights = base + shift + c * shift.detach().norm() / noise.norm() * noise
        else:
            weights = base + (1 + c) * shift
        logits = run.head(functional_call(run.flat.module, phase.trainable.named(weights), (x,)), phase.classes)
        (wanted,) = torch.autograd.grad(F.cross_entropy(logits, labels), theta)
        torch.testing.assert_close(phase.trainable.theta.grad, wanted, rtol=1e-4, atol=1e-6)
    assert set(draws) == ({0.0} if perturb == "none" else {-0.5, 0.0, 0.5})


def test_the_draws_are_thirds(learner):
    method = PAM(learner("--epochs=1"))
    task, images = toy.tasks()[0]
    during = method.begin(task)
    phase = method.train(task, images, during)
    phase.batches.rows = lambda i: torch.arange(2)
    draws = torch.tensor([float(phase.step(0)["perturbation"]) if i == 0 else draw(phase, i) for i in range(900)])
    for value in (-0.5, 0.0, 0.5):
        assert abs((draws == value).double().mean() - 1 / 3) < 0.06


def draw(phase, i):
    chance = torch.rand((), generator=phase.learner.generator("perturb", 0, i)).item()
    return 0.0 if chance < 1 / 3 else 0.5 if chance < 2 / 3 else -0.5


@pytest.mark.parametrize("rank", [0, 2])
def test_closed_form_equals_the_papers_sum_over_stored_models(learner, rank):
    """Compare with eq. 8 in float64 with all theta_i* and F_i stored, over 20 tasks; the kept bytes do not grow."""
    run = learner(f"--pam.rank={rank}", "--epochs=1")
    method, stored, merged, kept = PAM(run), [], None, set()
    for number in range(20):
        task, images = toy.tasks()[number % toy.TASKS]
        task = dataclasses.replace(task, index=number)
        during = method.begin(task)
        before = during["previous"].double()
        toy.work(method.train(task, images, during))
        star = during["trained"].double()
        phase = method.merge(task, images, during)
        values = [phase.step(i) for i in range(phase.steps)]
        stored.append((star, phase.fisher.double()))
        step = star - before
        first = sum(((before - s) * f * step).sum() for s, f in stored)
        second = sum((step * f * step).sum() for _, f in stored)
        alpha = float(-first / second)
        assert float(values[-1]["alpha_formula"]) == pytest.approx(alpha, rel=1e-4)
        merged = before + min(1, max(0, alpha)) * step
        torch.testing.assert_close(method.adapted().double(), merged, rtol=1e-5, atol=1e-6)
        phase.finish()
        kept.add(kept_bytes(run, method))
        if task.index == 0:
            assert alpha == pytest.approx(1, rel=1e-4)
    head = sum(x.nbytes for x in run.head.state_dict().values())
    assert kept == {4 * (run.theta.numel() + 3 * len(star)) + head} and alpha < 1


def test_twenty_tasks_of_the_closed_form():
    """Compare S and M from the fp32 ops with the sums over all stored theta_i* and F_i."""
    import fastmerge_kernels as fk

    g = torch.Generator().manual_seed(0)
    n = 5000
    initial = torch.randn(n, generator=g)
    merged, total, moment, stored = initial.clone(), torch.zeros(n), torch.zeros(n), []
    exact = initial.double()
    for _ in range(20):
        star = merged + 0.05 * torch.randn(n, generator=g)
        fisher = torch.rand(n, generator=g) ** 4
        stored.append((star.double(), fisher.double()))
        fk.pam_accumulate_(total, moment, fisher, star, initial)
        first, second = fk.pam_coefficient(total, moment, merged, star, initial).tolist()
        step = star.double() - merged.double()
        a = sum(((merged.double() - s) * f * step).sum() for s, f in stored)
        b = sum((step * f * step).sum() for _, f in stored)
        assert first / second == pytest.approx(float(a / b), rel=1e-4)
        alpha = -first / second
        exact = merged.double() + float(-a / b) * step
        merged = fk.lerp(merged, star, alpha)
        torch.testing.assert_close(merged.double(), exact, rtol=1e-4, atol=1e-5)


def test_alpha_without_information_and_outside_of_0_and_1(learner):
    run = learner()
    method = PAM(run)
    (first, images), (second, its) = toy.tasks()[:2]
    during = method.begin(first)
    toy.work(method.train(first, images, during))
    toy.work(method.merge(first, images, during))
    during = method.begin(second)
    toy.work(method.train(second, its, during))
    phase = method.merge(second, its, during)
    method.total.zero_(), method.moment.zero_()  # <S D, D> = 0: alpha = 1 / t
    values = phase.step(phase.steps - 1)
    assert float(values["alpha"]) == float(values["alpha_formula"]) == 0.5
    method.total.fill_(1.0)
    method.moment.copy_(during["trained"] + 9 * (during["trained"] - during["previous"]) - method.initial)
    values = phase.step(phase.steps - 1)
    assert float(values["alpha_formula"]) > 5 and float(values["alpha"]) == 1.0
    assert torch.equal(method.adapted(), during["trained"])


def test_lora_for_methods_that_train_as_usual(learner):
    run = learner("--lora-rank=2")
    task, images = toy.tasks()[0]
    before = run.theta.clone()
    phase = Train(run, task, images)
    toy.work(phase)
    changed = (run.theta != before).nonzero()[:, 0]
    places = torch.cat([torch.arange(b.place, b.place + b.rows * b.columns) for b in phase.trainable.blocks])
    assert len(changed) and torch.isin(changed, places).all()
    delta = (run.theta - before)[places[:64]].view(8, 8)
    assert torch.linalg.matrix_rank(delta, tol=1e-5) == 2


@pytest.mark.parametrize("rule", ["cofima", "fisher"])
def test_fisher_rules_on_lora_equal_the_formula_over_all_weights(learner, tmp_path, rule):
    """The rules' Fisher covers the adapted weights only; the slow one covers all weights, one image at a time."""
    run = learner("--lora-rank=2", "--fisher.labels=data", "--epochs=1")
    method, initial, seen = PostHoc(run, toy.nowhere(tmp_path), rule, "strict"), run.theta.clone(), []
    for number, (task, images) in enumerate(toy.tasks()):
        during = method.begin(task)
        before = run.theta.double()
        toy.work(method.train(task, images, during))
        trained, fisher = run.theta.double(), torch.zeros_like(before)
        for k in range(len(images)):
            pixels, labels = images.batch(torch.tensor([k]))
            run.flat.zero_grad()
            logits = run.head(run.backbone(run.plain(pixels)), torch.tensor(task.classes))
            F.cross_entropy(logits, torch.tensor([task.classes.index(int(labels))])).backward()
            fisher += run.flat.gradient.double().square() / len(images)
        run.flat.zero_grad()
        seen.append(fisher)
        toy.work(method.merge(task, images, during))
        if number:
            lam = 1 / (number + 1) if rule == "fisher" else getattr(run.config, rule).lam
            old = torch.stack(seen[:-1]).mean(0) if rule == "fisher" else seen[-2]
            w = torch.nan_to_num(lam * fisher / ((1 - lam) * old + lam * fisher), nan=lam)
            torch.testing.assert_close(run.theta.double(), before + w * (trained - before), rtol=1e-4, atol=1e-6)
    assert (run.theta != initial).any()


def test_state_comes_back_in_the_middle_of_a_task(learner):
    run = learner(head="linear")
    method, (task, images) = PAM(run), toy.tasks()[0]
    run.grow_head(task, images)
    during = method.begin(task)
    phase = method.train(task, images, during)
    phase.step(0)
    saved = [{k: v.clone() for k, v in x.items()} for x in (method.state_dict(), run.state_dict(), phase.tensors())]
    for i in range(1, phase.steps):
        phase.step(i)
    phase.finish()
    toy.work(method.merge(task, images, during))
    other = learner(head="linear")
    other.load_state_dict(saved[1])
    again = PAM(other)
    again.load_state_dict(saved[0])
    resumed = again.train(task, images, during)
    resumed.load(saved[2])
    for i in range(1, resumed.steps):
        resumed.step(i)
    resumed.finish()
    toy.work(again.merge(task, images, during))
    assert torch.equal(other.theta, run.theta)
