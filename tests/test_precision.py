"""`--precision bf16` compared with fp32: every method, both families of backbones, every kind of derivative."""

import pytest
import torch
import torch.nn.functional as F
import toy
from test_methods import CASES, build, one_task

from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.identity import differences
from fastmerge.methods.trm import TRM, Search
from fastmerge.models import load_backbone, precision
from fastmerge.models.per_image import served
from fastmerge.models.saved import Model
from fastmerge.setup import Setup
from fastmerge.training import Learner, Train

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_every_method(name, protocol, tmp_path):
    """Two tasks end near those in fp32, and all that is kept has at least fp32."""
    ends = []
    for kind in ("fp32", "bf16"):
        learner, method = build(name, protocol, tmp_path, f"--precision={kind}")
        start = learner.theta.clone()
        for task, images in toy.tasks()[:2]:
            one_task(learner, method, task, images)
        kept = learner.state_dict() | method.state_dict()
        fine = (torch.float32, torch.float64)
        assert all(x.dtype in fine for n, x in kept.items() if x.is_floating_point() and "optimiser" not in n)
        features = method.features()(learner.plain(toy.tasks()[0][1].images))
        assert features.dtype == torch.float32
        ends.append((features.detach(), learner.theta - start))
    (wanted, moved), (found, its_moved) = ends
    assert not torch.equal(found, wanted)  # products were rounded
    assert (found - wanted).norm() < 0.08 * wanted.norm()
    assert (its_moved - moved).norm() <= 0.4 * moved.norm()  # rules that trim choose other entries


def tower(name, weights, *flags):
    torch.manual_seed(0)
    backbone, _ = load_backbone(name, weights)
    head = toy.TextHead(F.normalize(torch.randn(6, backbone.feature_dim), dim=1), 10.0)
    return Learner(backbone, head, toy.parse(["--model=tiny", "--device=cpu", *flags]), 0, CPU)


def images_for(learner, n=4):
    size, generator = learner.backbone.image_size, torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return toy.TaskImages(pixels, torch.arange(n) % 2, 0)


@pytest.mark.parametrize(("name", "weights"), [("tiny", "glyphs"), ("test_vit", "none")])
def test_features_tokens_gradients_and_fishers_of_a_vit(name, weights):
    found = []
    for kind in ("fp32", "bf16"):
        learner = tower(name, weights, f"--precision={kind}", "--batch-size=4", "--clip=0")
        images, task = images_for(learner), toy.tasks()[0][0]
        x = learner.plain(images.images)
        features, tokens = learner.backbone.class_tokens(x)
        with torch.no_grad():  # nn.MultiheadAttention takes another path
            plain = learner.backbone(x)
        train = Train(learner, task, images)
        train.optimiser.step = lambda: None
        train.step(0)
        gradient = train.gradient.clone()
        fisher = FisherPass(learner, task, images, labels="data")
        fisher.step(0)
        found.append([features.detach(), plain, tokens.detach(), gradient, fisher.result()])
        assert all(t.dtype == torch.float32 for t in found[-1])
    for part, wanted, its in zip(("features", "plain", "tokens", "gradient", "fisher"), *found, strict=True):
        assert 0 < (its - wanted).norm() < (0.03 if part != "fisher" else 0.1) * wanted.norm(), part


@pytest.mark.parametrize("hardware", [True, False])
def test_products_without_bf16_instructions_are_rounded_alike(hardware, monkeypatch):
    """The features in hardware bf16 and in rounded fp32 are as far from fp32, with and without autograd
    (nn.MultiheadAttention takes two paths), and the Fisher of all weights still comes from factors."""
    learner = tower("tiny", "glyphs", "--precision=bf16")
    x = learner.plain(images_for(learner, 8).images)
    monkeypatch.setattr(precision, "in_hardware", lambda device: True)
    wanted = learner.backbone(x).detach()
    monkeypatch.setattr(precision, "in_hardware", lambda device: hardware)
    named = learner.flat.as_dict(learner.theta)
    parts = {name: [(..., torch.zeros_like(weight))] for name, weight in named.items()}
    assert set(served(learner.flat.module, named, parts, x[:1])) == set(named)
    found = learner.backbone(x).detach()
    with torch.no_grad():
        plain = learner.backbone(x)
    learner.backbone.precision = "fp32"
    exact = learner.backbone(x).detach()
    for its in (found, plain):
        assert 0.6 < (its - exact).norm() / (wanted - exact).norm() < 1.6


def test_one_rounded_product_has_the_bits_of_a_bf16_product():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 64, generator=g).bfloat16() for _ in range(2))
    found = precision.rounded(F.linear, x, w)
    assert found.dtype == torch.bfloat16
    assert (found == F.linear(x, w)).float().mean() > 0.99  # sums in another order may round to a neighbour


def test_slopes_of_the_exact_product():
    """The Hessian-vector product runs in bf16. Its slope along the task vector of a trained model moves by a few per cent."""
    setup = Setup(toy.parse(["--batch-size=32", "--epochs=1", "--merge-epochs=1", "--device=cpu"]))
    task = setup.scenario.tasks[1]
    images = setup.cache.get(setup.dataset.train, task.train[:320])
    learner = setup.learner(0)
    previous = learner.theta.clone()
    toy.work(Train(learner, task, images))
    search = Search(TRM(learner), task, images, previous)
    search.aim(0)
    search.place()
    pixels, labels = images.batch(torch.arange(64))
    x = learner.plain(pixels)
    g, products = search.objective._task_gradient(x, labels, [(slice(0, 64), 1.0)]).clone(), []
    for kind in ("fp32", "bf16"):
        learner.backbone.precision = kind
        products.append(search.objective.hessian_product(x, labels, g).clone())
        assert products[-1].dtype == torch.float32
    h, its_h = products
    d = search.current - previous
    assert 0 < abs((its_h - h) @ d) < 0.05 * abs(h @ d)
    assert (its_h - h).norm() < 0.15 * h.norm()


def test_a_saved_model_computes_as_its_run_did():
    learner = tower("tiny", "glyphs", "--precision=bf16")
    recipe = {"class_names": list("abcdef"), "candidates": [0, 1], "features": "backbone", "precision": "bf16"}
    x = images_for(learner).images
    want = learner.head(learner.backbone(learner.plain(x)), torch.arange(6))[:, :2]
    again, _ = load_backbone("tiny", "glyphs")
    assert torch.equal(Model(again, learner.head, {}, recipe)(x)[:, :2], want)
    older = {k: v for k, v in recipe.items() if k != "precision"}  # runs before this setting were in fp32
    assert not torch.equal(Model(again, learner.head, {}, older)(x)[:, :2], want)


def test_choice_and_identity(monkeypatch):
    cuda = torch.device("cuda")
    assert precision.choose(None, CPU) == "fp32" and precision.choose("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="--precision tf32: only NVIDIA GPUs since the A100 .* use --precision fp32"):
        precision.choose("tf32", CPU)
    for has, version, default in ((True, (9, 0), "bf16"), (False, (7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, version=version: version)
        assert precision.choose(None, cuda) == default
    with pytest.raises(UserError, match="tf32"):
        precision.choose("tf32", cuda)
    old = {"settings": {}, "contents": {}, "runs": {}}
    assert not differences(old, old | {"settings": {"training.precision": "fp32"}})
    assert differences(old, old | {"settings": {"training.precision": "bf16"}})


def test_tf32_of_a_run_does_not_reach_the_head():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with precision.tf32(True):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        with precision.tf32(False):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
