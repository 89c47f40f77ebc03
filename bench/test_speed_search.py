"""TRM's search step with the exact Hessian-vector product, a symmetric difference of gradients, and no curvature term.

The op is the step with `--trm.curvature difference`; speedup_exact says how many times longer the exact step takes,
speedup_none the same (below 1) without the curvature term. h_error is the relative difference of the two products.
"""

from __future__ import annotations

import pytest
import torch
from measure import Case
from models import MODELS, chosen, start

from fastmerge.methods.trm import TRM


def search(model: str, batch: int, device: torch.device, *flags: str):
    """Return a search between two models, ready to step."""
    learner, task, images = start(model, batch, device, *flags)
    method = TRM(learner)
    during = method.begin(task)
    learner.theta.add_(0.01 * learner.theta * torch.randn_like(learner.theta))
    return method.merge(task, images, during)


@pytest.mark.parametrize("model", MODELS)
def test_search(bench, model, request, device):
    batch = chosen(model, request, device)
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
    assert 0 < info["h_error"] < 1  # both compute the same product; tests bound the error
