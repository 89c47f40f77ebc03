"""A training step as usual, against one in the tangent space (CMM) and one of the per-image Fisher pass.

speedup_tangent, speedup_fisher say how many times longer those take than the usual step; memory_tangent, memory_fisher how
many times more memory they take beyond the model (peak growth in a step; meaningless for tiny on a CPU).
"""

from __future__ import annotations

import pytest
from measure import Case, Clock
from models import MODELS, chosen, start

from fastmerge.fisher import FisherPass
from fastmerge.methods.cmm import CMM
from fastmerge.training import Train


@pytest.mark.parametrize("model", MODELS)
def test_training(bench, model, request, device):
    batch = chosen(model, request, device)
    phases = {"usual": Train(*start(model, batch, device))}
    learner, task, images = start(model, batch, device)
    method = CMM(learner)
    method.begin(task)
    phases["tangent"] = method.train(task, images)
    phases["fisher"] = FisherPass(*start(model, batch, device))
    steps = {name: (lambda p=p: p.step(0)) for name, p in phases.items()}
    growth = {}
    for name, step in steps.items():
        step()  # the optimiser's state
        growth[name] = Clock(device).extra_bytes(step)
    info = bench.row(Case(steps.pop("usual"), peers=steps))
    info |= {"model": model, "batch": batch}
    for name in steps:
        known = growth["usual"] and growth[name] is not None
        info[f"memory_{name}"] = round(growth[name] / growth["usual"], 2) if known else None
