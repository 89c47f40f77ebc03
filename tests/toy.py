"""A small model and a few tasks of random images, for tests that compare a method with a slow version."""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.flags import parse
from fastmerge.methods.trajectory import Trajectory
from fastmerge.models.heads import Head, LinearHead, PrototypeHead, TextHead
from fastmerge.models.precision import computing
from fastmerge.models.timm_vit import TimmBackbone
from fastmerge.training import Learner

CLASSES, TASKS, IMAGES = 6, 3, 20
_folder = tempfile.TemporaryDirectory()
CONCEPTS = Path(_folder.name) / "concepts.json"  # of the toy's classes, and of those of image_trees
CONCEPTS.write_text(
    json.dumps(
        {f"{kind} {c}": [f"{kind} {c} part {i}" for i in range(4)] for kind in ("class", "colour") for c in range(8)}
    )
)


class Backbone(nn.Module):
    name, family, weights = "toy", "toy", "random"
    precision, recompute = "fp32", False
    image_size, mean, std, feature_dim, has_class_token = 4, (0.5,) * 3, (0.5,) * 3, 5, False

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(48, 7), nn.Linear(7, 5, bias=False)
        self.fixed = nn.Parameter(torch.ones(5), requires_grad=False)
        self.attn = nn.Module()  # a fused matrix of query, key and value, as LoRA finds it
        self.attn.qkv = nn.Linear(48, 21)

    def last_projection(self):
        return ["outer.weight"]

    def forward(self, images):
        with computing(self.precision):
            flat = images.flatten(1).to(self.inner.weight)
            query, key, value = self.attn.qkv(flat).chunk(3, dim=1)
            return self.outer(torch.tanh(self.inner(flat)) + query + torch.tanh(key) * value) * self.fixed


class Transformer(TimmBackbone):
    """For methods that need attention: a ViT with 4 patches and 4 blocks."""

    def __init__(self):
        vit = VisionTransformer(4, 2, embed_dim=5, depth=4, num_heads=1, mlp_ratio=2, num_classes=0)
        vit.pretrained_cfg = {"input_size": (3, 4, 4), "mean": self.values, "std": self.values}
        for p in vit.parameters():
            nn.init.normal_(p, std=0.5)
        super().__init__("toy", vit, weights="random")

    values = (0.5,) * 3


ATTENTION = ("l2p", "dualprompt", "coda", "hide", "maple")  # methods that need it


def backbone(method: str = "") -> nn.Module:
    return Transformer() if method in ATTENTION else Backbone()


def learner(*flags: str, head: str = "text", seed: int = 0, method: str = "") -> Learner:
    """method: the name of the one that it is for."""
    torch.manual_seed(0)
    config = parse(
        ["--model=tiny", "--ranpac.projection=50", "--epochs=2", "--batch-size=8", "--lr=1e-2", "--device=cpu", *flags]
    )
    made = TextHead(torch.randn(CLASSES, 5), 3.0) if head == "text" else LinearHead(5, CLASSES)
    its = Learner(backbone(method), made, config, seed, torch.device("cpu"))
    its.text = Text()
    return its


class Text:
    """In place of `ClassPrompts`: rows that depend on the context and the class."""

    width, blocks = 6, (0, 1, 2)
    names = tuple(f"class {c}" for c in range(CLASSES))

    def __init__(self, device: torch.device | str = "cpu"):
        g = torch.Generator().manual_seed(5)
        self.of_class = torch.randn(CLASSES + 1, 6, generator=g).to(device)  # the last one is nameless
        self.projection = torch.randn(6, 5, generator=g).to(device)

    def starting(self, words, count):
        return self, self.of_class[:count] / 10

    def encode(self, texts):
        """A row for every text, which depends on it alone."""
        rows = [torch.randn(5, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) for text in texts]
        return nn.functional.normalize(torch.stack(rows).to(self.projection), dim=1)

    def rows(self, context, classes, of=None, deep=()):
        context = context if of is None else context[of]
        mixed = torch.tanh(10 * context.mean(-2) + self.of_class[classes])
        for own in deep:
            mixed = torch.tanh(mixed + own.mean(0))
        return nn.functional.normalize(mixed @ self.projection, dim=1)


def head(kind: str | None, made: Head) -> Head:
    """The head that a method needs (`Method.head`): `made`, or another kind."""
    others = {"prototype": PrototypeHead, "linear": LinearHead}
    return others[kind](5, CLASSES) if kind in others else made


def tasks() -> list[tuple[Task, TaskImages]]:
    g = torch.Generator().manual_seed(1)
    found = []
    for t in range(TASKS):
        classes = (2 * t, 2 * t + 1)
        images = torch.randint(0, 256, (IMAGES, 3, 4, 4), dtype=torch.uint8, generator=g)
        labels = torch.randint(0, 2, (IMAGES,), generator=g) + 2 * t
        task = Task(t, f"task {t + 1}", classes, np.arange(IMAGES), np.arange(0))
        found.append((task, TaskImages(images, labels, 0)))
    return found


def work(phase) -> None:
    """Run all steps of a phase."""
    if phase is not None:
        for i in range(phase.steps):
            phase.step(i)
        phase.finish()


def drive(learner: Learner, method) -> list[torch.Tensor]:
    """Run a method as the training loop does; return the model after every task."""
    after = []
    for task, images in tasks():
        learner.grow_head(task, images)
        during = method.begin(task)
        work(method.train(task, images, during))
        work(method.merge(task, images, during))
        after.append(learner.theta.clone())
    return after


def nowhere(tmp_path: Path) -> Trajectory:
    """Return a trajectory that shares no training."""
    return Trajectory(tmp_path / "trajectory", ())
