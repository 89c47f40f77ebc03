"""TRM's search step with the exact Hessian-vector product, a difference of gradients, and no curvature term.

The op is the step with `--trm.curvature difference`; speedup_exact says how many times longer the exact step takes,
speedup_none the same (below 1) without the curvature term. slope_error is the relative
difference of the two products' slopes along d.
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
    searches = {name: search(model, batch, device, "--trm.lr=0", *flag) for name, flag in flags.items()}
    steps = {name: (lambda s=s: s.step(0)) for name, s in searches.items()}
    for step in steps.values():
        step()  # the teacher's class tokens are computed in the first step
    info = bench.row(Case(steps.pop("difference"), peers=steps))

    slopes = [searches[name].coefficients.grad[0] for name in ("difference", "exact", "none")]
    curvature = [slope - slopes[2] for slope in slopes[:2]]
    info |= {"model": model, "batch": batch, "slope_error": abs(float(curvature[0] / curvature[1]) - 1)}
    assert 0 < info["slope_error"] < 1  # both compute the same slope; tests bound the error
