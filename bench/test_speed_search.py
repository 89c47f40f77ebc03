"""TRM's search step: the exact Hessian-vector product against a symmetric difference of gradients, and against no curvature.

Measured is the step with `--trm.curvature difference`; speedup_exact says how many times longer the exact step takes,
speedup_none (below 1) what is left without the curvature term. h_error: relative difference of the two products.
"""

from __future__ import annotations

import pytest
import torch
from measure import Case

from fastmerge.config import parse
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.trm import TRM
from fastmerge.models import load_backbone
from fastmerge.models.heads import LinearHead
from fastmerge.training import Learner

CLASSES = 10
MODELS = {"tiny": "tiny", "22M": "vit_small_patch16_224", "86M": "vit_base_patch16_224"}


def search(model: str, batch: int, device: torch.device, *flags: str):
    """A search between two models, ready to step, on random images (the tiny model has its trained weights)."""
    torch.manual_seed(0)
    config = parse([f"--batch-size={batch}", f"--device={device.type}", "--merge-epochs=1000", *flags])
    backbone, _ = load_backbone(MODELS[model], "glyphs" if model == "tiny" else "none", download=False)
    head = LinearHead(backbone.feature_dim, CLASSES)
    head.grow(range(CLASSES), torch.Generator())
    torch.nn.init.normal_(head.weight, std=0.1)
    learner = Learner(backbone, head, config, seed=0, device=device)
    pixels = (batch, 3, backbone.image_size, backbone.image_size)
    images = torch.randint(0, 256, pixels, dtype=torch.uint8).to(device)
    images = TaskImages(images, torch.randint(0, CLASSES, (batch,)).to(device), 0)
    task = Task(1, "task", tuple(range(CLASSES)), None, None)
    method = TRM(learner)
    method.begin(task)
    learner.theta.add_(0.01 * learner.theta * torch.randn_like(learner.theta))
    return method.merge(task, images)


@pytest.mark.parametrize("model", MODELS)
def test_search(bench, model, request, device):
    if model != "tiny" and device.type == "cpu" and model not in request.config.getoption("--sizes").split(","):
        pytest.skip("not among --sizes")
    if model != "tiny" and request.config.getoption("--quick"):
        pytest.skip("--quick")
    batch = 128 if device.type == "cuda" else 32 if model == "tiny" else 4
    flags = {"difference": ["--trm.curvature=difference"], "exact": [], "none": ["--trm.lambda2=0"]}
    searches = {name: search(model, batch, device, *flag) for name, flag in flags.items()}
    steps = {name: (lambda s=s: s.step(0)) for name, s in searches.items()}
    for step in steps.values():
        step()  # the teacher's class tokens are computed in the first step
    info = bench.row(Case(steps.pop("difference"), peers=steps))

    one = searches["exact"]
    images, labels = one.images.batch(torch.arange(batch))
    g = one.learner.flat.gradient.detach().clone()
    h = one.curvature_gradient(one.learner.plain(images), labels, g)
    one.settings = searches["difference"].settings
    other = one.curvature_gradient(one.learner.plain(images), labels, g)
    info |= {"model": model, "batch": batch, "h_error": float(((other - h).norm() / h.norm()).detach())}
    assert 0 < info["h_error"] < 1  # the two solve the same problem; tests bound the error
