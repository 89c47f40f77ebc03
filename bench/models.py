"""Learners on random images, for rows that time a training or merging step."""

from __future__ import annotations

import pytest
import torch

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.flags import parse
from fastmerge.models import load_backbone
from fastmerge.models.heads import LinearHead
from fastmerge.training import Learner

CLASSES = 10
MODELS = {"tiny": "tiny", "22M": "vit_small_patch16_224", "86M": "vit_base_patch16_224"}


def chosen(model: str, request, device: torch.device) -> int:
    """Return the batch size for this row; skip the test if the options leave the model out (tiny always runs)."""
    if model != "tiny" and device.type == "cpu" and model not in request.config.getoption("--sizes").split(","):
        pytest.skip("not among --sizes")
    if model != "tiny" and request.config.getoption("--quick"):
        pytest.skip("--quick")
    return 128 if device.type == "cuda" else 32 if model == "tiny" else 4


def start(model: str, batch: int, device: torch.device, *flags: str) -> tuple[Learner, Task, TaskImages]:
    """Return a learner and one batch of images (the tiny model has its trained weights)."""
    torch.manual_seed(0)
    config = parse([f"--batch-size={batch}", f"--device={device.type}", "--epochs=1000", "--merge-epochs=1000", *flags])
    backbone, _ = load_backbone(MODELS[model], "glyphs" if model == "tiny" else "none", download=False)
    head = LinearHead(backbone.feature_dim, CLASSES)
    head.grow(range(CLASSES), torch.Generator())
    torch.nn.init.normal_(head.weight, std=0.1)
    learner = Learner(backbone, head, config, seed=0, device=device)
    pixels = (batch, 3, backbone.image_size, backbone.image_size)
    images = torch.randint(0, 256, pixels, dtype=torch.uint8).to(device)
    images = TaskImages(images, torch.randint(0, CLASSES, (batch,)).to(device), 0)
    return learner, Task(1, "task", tuple(range(CLASSES)), None, None), images
