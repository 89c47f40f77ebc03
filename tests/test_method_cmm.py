"""Compare CMM's three stages with slow versions: a full Jacobian, and the merge and the alignment by hand."""

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn
from torch.func import functional_call, jacrev

from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.methods.cmm import CMM
from fastmerge.models import load_backbone
from fastmerge.models.linearised import Linearised, check_linearisable

FLAGS = ["--clip=0", "--cmm.lam=0.3", "--cmm.align-lr=1e-2", "--cmm.align-epochs=2"]


def images(n=6):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def doubled():
    """Return a float64 toy model whose theta differs from theta_0, and theta_0."""
    torch.manual_seed(1)
    flat = FlatModel(toy.Backbone().double(), dtype=torch.float64)
    start = flat.theta.detach().clone()
    with torch.no_grad():
        for view in flat.views(flat.theta):
            view += 0.3 * torch.randn(view.shape, dtype=torch.float64)
    return flat, start


def slow(flat, start, theta, x):
    """Compute f(x; theta_0) + J (theta - theta_0) with the full Jacobian."""

    def f(theta):
        return functional_call(flat.module, flat.as_dict(theta), (x,))

    return f(start) + jacrev(f)(start) @ (theta - start)


def test_linearised_is_the_first_order_expansion():
    flat, start = doubled()
    x, linearised = images().double(), Linearised(flat, start)
    features = linearised(x)
    torch.testing.assert_close(features, slow(flat, start, flat.theta, x), rtol=1e-10, atol=1e-10)

    flat.zero_grad()
    features.square().sum().backward()  # the gradients are equal too
    theta = flat.theta.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(slow(flat, start, theta, x).square().sum(), theta)
    torch.testing.assert_close(flat.gradient, wanted, rtol=1e-9, atol=1e-10)

    step, shift = 1e-6, flat.theta.detach() - start
    value = functional_call(flat.module, flat.as_dict(start), (x,))
    ahead, behind = (functional_call(flat.module, flat.as_dict(start + s * shift), (x,)) for s in (step, -step))
    torch.testing.assert_close(features.detach(), value + (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "weights"), [("tiny", "glyphs"), ("test_vit", "none")])
def test_linearised_serves_both_families(name, weights):
    torch.manual_seed(0)
    backbone, _ = load_backbone(name, weights, download=False)
    flat = FlatModel(backbone.eval())
    check_linearisable(flat, backbone.image_size)
    start, x = flat.theta.detach().clone(), torch.randn(2, 3, backbone.image_size, backbone.image_size)
    linearised = Linearised(flat, start)
    torch.testing.assert_close(linearised(x), backbone(x), rtol=1e-4, atol=1e-5)  # at theta_0 the two agree
    with torch.no_grad():
        flat.theta *= 1 + 1e-4
        features, moved = linearised(x), backbone(x)
        flat.theta.copy_(start)
        first, second = (features - backbone(x)).norm(), (moved - features).norm()
    assert 0 < second < 0.02 * first  # the remainder is of second order
    linearised(x).sum().backward()
    assert flat.gradient.isfinite().all() and flat.gradient.norm() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert linearised(x).isfinite().all()
    names = backbone.last_projection()
    assert names == (
        ["tower.proj"] if name == "tiny" else ["tower.blocks.5.mlp.fc2.weight", "tower.blocks.5.mlp.fc2.bias"]
    )


@pytest.mark.slow
def test_linearised_compiles():
    backbone, _ = load_backbone("tiny", "glyphs", download=False)
    flat = FlatModel(backbone.eval())
    linearised = Linearised(flat, flat.theta.detach() * 0.99)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(linearised)(x), linearised(x), rtol=1e-4, atol=1e-5)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Odd(nn.Module):
    def forward(self, x):
        return NoForwardMode.apply(x)


def test_models_without_tangent_space_are_refused_with_the_layer():
    inner = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), Odd())
    with pytest.raises(UserError, match=r"layer 2 \(Odd\) has no forward-mode derivative"):
        check_linearisable(FlatModel(inner), 4)
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    with pytest.raises(UserError, match=r"layer 1 \(BatchNorm2d\) is in training mode"):
        check_linearisable(FlatModel(normed.train()), 4)
    check_linearisable(FlatModel(normed.eval()), 4)
    assert not normed[0]._forward_hooks and not normed[0]._forward_pre_hooks


def two_tasks(*flags):
    """Train and merge task 1, then train task 2 without merging it."""
    learner = toy.learner(*FLAGS, *flags)
    learner.backbone.last_projection = lambda: ["outer.weight"]
    start = learner.theta.clone()
    method = CMM(learner)
    (first, its_images), (second, images) = toy.tasks()[:2]
    during = method.begin(first)
    toy.work(method.train(first, its_images, during))
    toy.work(method.merge(first, its_images, during))
    previous, fisher = learner.theta.clone(), None if method.fisher is None else method.fisher.clone()
    during = method.begin(second)
    toy.work(method.train(second, images, during))
    return learner, method, during, second, images, start, previous, fisher


@pytest.mark.parametrize("kind", ["adam", "adam-raw"])
def test_training_in_the_tangent_space_and_its_fisher(kind):
    learner = toy.learner(*FLAGS, f"--cmm.fisher={kind}", "--weight-decay=0.1")
    learner.backbone.last_projection = lambda: ["outer.weight"]
    start, (task, data) = learner.theta.clone(), toy.tasks()[0]
    theta = start.clone().requires_grad_()
    method = CMM(learner)
    during = method.begin(task)
    phase = method.train(task, data, during)
    m = v = torch.zeros_like(start)
    for i in range(phase.steps):
        pixels, labels = data.batch(phase.batches.rows(i))
        x = learner.augmented(pixels, learner.generator("augment", task.index, i))
        logits = learner.head(slow(learner.flat, start, theta, x), phase.classes)
        (g,) = torch.autograd.grad(F.cross_entropy(logits, labels), theta)
        rate = 1e-2 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / phase.steps)).item())
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        with torch.no_grad():
            theta *= 1 - rate * 0.1
            theta -= rate * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
    toy.work(phase)
    torch.testing.assert_close(learner.theta, theta.detach(), rtol=1e-3, atol=1e-5)
    wanted = v if kind == "adam-raw" else v / (1 - 0.999**phase.steps)
    torch.testing.assert_close(during["fisher_t"], wanted, rtol=1e-2, atol=1e-8)
    assert torch.equal(method.initial, start)


def test_merge_is_equation_4_and_leaves_theta_0_alone():
    learner, method, during, task, images, start, previous, fisher = two_tasks("--cmm.align-epochs=0")
    new, fisher_t = learner.theta.double(), during["fisher_t"].double()
    fisher_t[:5] = 0
    during["fisher_t"][:5] = 0
    method.fisher[:5] = fisher[:5] = 0  # 0 / 0 gives plain interpolation here, NaN in the released code
    toy.work(method.merge(task, images, during))
    total = 0.3 * fisher_t + 0.7 * fisher
    wanted = (0.3 * fisher_t * new + 0.7 * fisher * previous) / total
    wanted = torch.where(total == 0, 0.3 * new + 0.7 * previous, wanted)
    torch.testing.assert_close(learner.theta, wanted.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.fisher, total.float())
    assert torch.equal(method.initial, start) and learner.theta.isfinite().all()
    assert set(method.state_dict()) == {"initial", "fisher"}  # constant: no state of the task remains


def test_merge_by_plain_interpolation_or_not_at_all():
    align = "--cmm.align-epochs=0"
    learner, method, during, task, images, _, previous, _ = two_tasks("--cmm.merge=average", align)
    new = learner.theta.clone()
    toy.work(method.merge(task, images, during))
    torch.testing.assert_close(learner.theta, 0.7 * previous + 0.3 * new)
    learner, method, during, task, images, _, previous, _ = two_tasks("--cmm.merge=none", align)
    new = learner.theta.clone()
    toy.work(method.merge(task, images, during))
    assert torch.equal(learner.theta, new) and set(method.state_dict()) == {"initial"}


@pytest.mark.parametrize(("loss", "tangent"), [("l1", True), ("l2", True), ("l2", False)])
def test_alignment_trains_the_projection_alone(loss, tangent):
    learner, method, during, task, images, start, previous, _ = two_tasks(
        f"--cmm.align-loss={loss}", "--cmm.tangent" if tangent else "--cmm.no-tangent"
    )
    phase = method.merge(task, images, during)
    phase.merge()
    merged = learner.theta.clone()

    def features(theta, x):
        if tangent:
            return slow(learner.flat, start, theta, x)
        return functional_call(learner.flat.module, learner.flat.as_dict(theta), (x,))

    names = learner.flat.names
    where = learner.flat.offsets[names.index("outer.weight")]
    inside = torch.zeros_like(merged)
    inside[where : where + 35] = 1
    theta = merged.clone().requires_grad_()
    optimiser = torch.optim.AdamW([theta], lr=1e-2, weight_decay=0)
    for i in range(phase.steps):
        pixels, _ = images.batch(phase.batches.rows(i))
        x = learner.plain(pixels)
        gap = features(theta, x) - features(previous, x)
        (theta.grad,) = torch.autograd.grad(gap.abs().mean() if loss == "l1" else gap.square().mean(), theta)
        theta.grad *= inside
        with torch.no_grad():
            theta -= 1e-2 * 0.01 * theta * inside
        optimiser.step()
    toy.work(phase)
    assert phase.steps == 6 and not torch.equal(learner.theta, merged)
    assert torch.equal(learner.theta * (1 - inside), merged * (1 - inside))
    torch.testing.assert_close(learner.theta, theta.detach(), rtol=1e-3, atol=1e-4)


def test_alignment_brings_the_features_back():
    learner, method, during, task, images, _, previous, _ = two_tasks("--cmm.align-epochs=20")
    x = learner.plain(images.images)
    phase = method.merge(task, images, during)
    first = phase.step(0)["loss"]
    for i in range(1, phase.steps):
        phase.step(i)
    with torch.no_grad():
        wanted = phase.features(previous, x)
        after = F.mse_loss(phase.features(learner.theta, x), wanted)
    assert after < 0.7 * first


def test_inference_in_both_ways():
    learner, method, during, task, images, _, _, _ = two_tasks("--cmm.inference=plain")
    toy.work(method.merge(task, images, during))
    assert method.features().kind == "backbone" and list(method.also_evaluated()) == ["linearised"]
    learner, method, during, task, images, _, _, _ = two_tasks()
    toy.work(method.merge(task, images, during))
    assert method.features().function is method.tangent and list(method.also_evaluated()) == ["plain"]
    assert CMM(toy.learner("--cmm.no-tangent")).also_evaluated() == {}
