"""Compare squared per-image gradients from one backward pass with one backward pass per image."""

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn

from fastmerge.data.cache import TaskImages
from fastmerge.fisher_pass import FisherPass
from fastmerge.models import load_backbone, per_image
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


def run(learner, task, images, rank):
    """The Fisher, and the names of the weights that one backward pass serves, and of the others."""
    adapted = learner.adapted(rank)
    passed = FisherPass(learner, task, images, labels="data", adapted=adapted)
    for i in range(passed.steps):
        passed.step(i)
    served = set(passed._served)
    return adapted, passed.result(), served, set(adapted.parts(passed.fisher)) - served


def assert_close(learner, found, want, names=None):
    """To 1e-5 of the norm of every weight's squares."""
    assert want.min() >= 0 and want.max() > 0
    views = (learner.flat.views(x) for x in (found, want)) if names is None else ([found], [want])
    for name, its_found, its_want in zip(names or learner.flat.names, *views, strict=True):
        assert (its_found - its_want).norm() <= 1e-5 * its_want.norm(), name


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("how", ["as usual", "class token", "tokens first", "twice", "no linear map"])
def test_every_use_of_a_projection(monkeypatch, how, rank):
    monkeypatch.setattr(toy, "Backbone", lambda: Odd(how))
    learner = toy.learner("--clip=0")
    task, images = toy.tasks()[0]
    adapted, found, served, rest = run(learner, task, images, rank)
    k, v = {"k_proj.weight", "k_proj.bias"}, {"v_proj.weight"}
    unserved = {"twice": k, "no linear map": v, "tokens first": k | v}.get(how, set())
    assert rest == (unserved & {"k_proj.weight", "v_proj.weight"} if rank else unserved)
    assert served and not served & rest or how == "tokens first"
    want = by_hand(learner, adapted, task, images)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-9)


class Broadcasts(toy.Backbone):
    """Weights that enter by sums and products, one by a convolution with overlap, one by nothing that is served."""

    def __init__(self):
        nn.Module.__init__(self)
        self.tokens = nn.Conv2d(3, 8, 2, stride=2)
        self.overlap = nn.Conv2d(8, 8, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(1, 4, 1))
        self.power, self.token = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.last = nn.LayerNorm(8), nn.Parameter(torch.randn(8, 5))

    def forward(self, images):
        x = self.tokens(images)
        x = (x + self.overlap(x)).flatten(2).mT  # [b, 4, 8]
        x = torch.cat([self.token.expand(len(x), -1, -1), (self.shift + x) * self.scale], 1)
        return self.norm(x).sigmoid().pow(self.power).mean(1) @ self.last


def test_every_kind_of_weight(monkeypatch):
    monkeypatch.setattr(toy, "Backbone", Broadcasts)
    learner = toy.learner("--clip=0")
    task, images = toy.tasks()[0]
    adapted, found, served, rest = run(learner, task, images, 0)
    assert rest == {"power", "overlap.weight", "overlap.bias"} and len(served) == 8
    assert_close(learner, found, by_hand(learner, adapted, task, images))


SMALL = 3 * 64 * 64 * 4  # room for three images at a time, or one


@pytest.mark.parametrize(
    ("name", "weights", "rank", "room"),
    [
        ("tiny", "glyphs", 2, 1 << 22),  # an open_clip tower
        ("tiny", "glyphs", 0, SMALL),
        ("test_vit", "none", 2, SMALL),
        ("test_vit", "none", 0, 1 << 22),
        ("test_vit3", "none", 0, 1 << 22),  # layer scale, pooling by attention
    ],
)
def test_both_families(monkeypatch, name, weights, rank, room):
    monkeypatch.setitem(per_image.ROOM, "cpu", room)
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
    adapted, found, _, rest = run(learner, task, images, rank)
    want = by_hand(learner, adapted, task, images)
    assert not rest
    assert_close(learner, found, want, ["projections"] if rank else None)
    assert torch.equal(learner.theta, before) and not learner.flat.gradient.any()
