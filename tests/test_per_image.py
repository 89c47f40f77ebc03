"""Compare squared per-image gradients from one backward pass with one backward pass per image."""

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn

from fastmerge.data.cache import TaskImages
from fastmerge.fisher_pass import FisherPass
from fastmerge.models import load_backbone
from fastmerge.models.heads import LinearHead
from fastmerge.training import Learner


class Odd(toy.Backbone):
    """One attention layer over 6 tokens of 8 numbers; `how` is the way its projections are used."""

    def __init__(self, how):
        nn.Module.__init__(self)
        self.how, self.outer = how, nn.Linear(8, 5, bias=False)
        self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, images):
        x = images.flatten(1).to(self.outer.weight).view(-1, 6, 8)
        if self.how == "tokens first":
            x = x.transpose(0, 1)
        k, v = (
            self.k_proj(x[:, :1].flatten(1))[:, None] if self.how == "class token" else self.k_proj(x),
            self.v_proj(x),
        )
        if self.how == "twice":
            k = k + self.k_proj(x.square())
        if self.how == "no linear map":
            v = x @ self.v_proj.weight.T
        return self.outer((k.softmax(-1) * v).sum(0 if self.how == "tokens first" else 1))


def by_hand(learner, adapted, task, images):
    """Run one forward and one backward per image through the model's own parameters."""
    total = torch.zeros_like(learner.theta)
    for k in range(len(images)):
        pixels, labels = images.batch(torch.tensor([k]))
        learner.flat.zero_grad()
        logits = learner.head(learner.backbone(learner.plain(pixels)), torch.tensor(task.classes))
        F.cross_entropy(logits, torch.tensor([task.classes.index(int(labels))])).backward()
        total += learner.flat.gradient.square() / len(images)
    learner.flat.zero_grad()
    return adapted.gather(total)


def run(learner, task, images, served):
    adapted = learner.adapted(2)
    passed = FisherPass(learner, task, images, labels="data", adapted=adapted)
    for i in range(passed.steps):
        passed.step(i)
    assert passed._served is served
    return adapted, passed.result()


@pytest.mark.parametrize("how", ["as usual", "class token", "tokens first", "twice", "no linear map"])
def test_every_use_of_a_projection(monkeypatch, how):
    monkeypatch.setattr(toy, "Backbone", lambda: Odd(how))
    learner = toy.learner("--clip=0")
    task, images = toy.tasks()[0]
    adapted, found = run(learner, task, images, served=how in ("as usual", "class token"))
    want = by_hand(learner, adapted, task, images)
    assert want.min() >= 0 and want.max() > 0
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("room", [1 << 28, 3 * 64 * 64 * 4])
@pytest.mark.parametrize(("name", "weights"), [("tiny", "glyphs"), ("test_vit", "none")])
def test_fused_projections_of_both_families(monkeypatch, name, weights, room):
    monkeypatch.setattr("fastmerge.models.per_image.ROOM", room)  # the second: three images at a time, or one
    torch.manual_seed(0)
    backbone, _ = load_backbone(name, weights, download=False)
    head = LinearHead(backbone.feature_dim, 6)
    head.grow(range(6), torch.Generator())
    nn.init.normal_(head.weight, std=0.3)
    config = toy.learner("--batch-size=5").config
    learner = Learner(backbone, head, config, 0, torch.device("cpu"))
    task, few = toy.tasks()[0]
    pixels = torch.randint(0, 256, (8, 3, backbone.image_size, backbone.image_size), dtype=torch.uint8)
    images = TaskImages(pixels, few.labels[:8], 0)
    before = learner.theta.clone()
    adapted, found = run(learner, task, images, served=True)
    torch.testing.assert_close(found, by_hand(learner, adapted, task, images), rtol=1e-3, atol=1e-9)
    assert torch.equal(learner.theta, before) and not learner.flat.gradient.any()
