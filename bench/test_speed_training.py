"""A usual training step, a step in the tangent space (CMM), a step of the per-image Fisher pass; P&M's Fisher pass.

test_training times the usual step. speedup_tangent and speedup_fisher say how many times longer the other two take,
memory_tangent and memory_fisher how many times more their peak memory grows in a step (meaningless for tiny on a CPU).
test_fisher times a step of the Fisher pass over LoRA's projections. speedup_vmap, speedup_loop and speedup_lora say how
many times longer vmap, one backward pass per image, and a LoRA training step take; memory_fisher is the pass's memory
divided by that of the LoRA step.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import pytest
import torch
from measure import Case, Clock
from models import MODELS, chosen, start

from fastmerge.fisher_pass import FisherPass
from fastmerge.methods.cmm import CMM
from fastmerge.methods.pam import PAM
from fastmerge.training import Train, positions


@pytest.mark.parametrize("model", MODELS)
def test_training(bench, model, request, device):
    batch = chosen(model, request, device)
    phases = {"usual": Train(*start(model, batch, device))}
    learner, task, images = start(model, batch, device)
    method = CMM(learner)
    during = method.begin(task)
    phases["tangent"] = method.train(task, images, during)
    phases["fisher"] = FisherPass(*start(model, batch, device))
    steps = {name: (lambda p=p: p.step(0)) for name, p in phases.items()}
    growth = {}
    for name, step in steps.items():
        step()  # creates the optimiser's state
        growth[name] = Clock(device).extra_bytes(step)
    info = bench.row(Case(steps.pop("usual"), peers=steps))
    info |= {"model": model, "batch": batch}
    for name in steps:
        known = growth["usual"] and growth[name] is not None
        info[f"memory_{name}"] = round(growth[name] / growth["usual"], 2) if known else None


@pytest.mark.parametrize("model", MODELS)
def test_fisher(bench, model, request, device):
    batch = chosen(model, request, device)
    learner, task, images = start(model, batch, device)
    method = PAM(learner)
    during = method.begin(task)
    lora = method.train(task, images, during)
    one, other = (FisherPass(learner, task, images, labels="data", adapted=lora.trainable) for _ in range(2))
    other._served = []  # all weights by vmap
    pixels, labels = images.batch(torch.arange(batch))
    batch_of_one = list(zip(learner.plain(pixels).split(1), positions(labels, one.classes).split(1), strict=True))

    def loop():
        weights, total = one.weights.clone().requires_grad_(), torch.zeros_like(one.weights)
        for image, label in batch_of_one:
            (gradient,) = torch.autograd.grad(one.loss(weights, image, label), weights)
            fk.fisher_accumulate_(total, gradient, 1 / batch)
        return total

    one.step(0), other.step(0)
    assert one._served
    for found in (other.fisher, loop()):
        assert (found - one.fisher).norm() < 1e-3 * one.fisher.norm()
    rivals = {"vmap": lambda: other.step(0), "loop": loop, "lora": lambda: lora.step(0)}
    lora.step(0)  # creates the optimiser's state
    growth = [Clock(device).extra_bytes(lambda p=p: p.step(0)) for p in (one, lora)]
    info = bench.row(Case(lambda: one.step(0), peers=rivals))
    info |= {"model": model, "batch": batch, "images/s": round(1e3 * batch / info["ms"], 1)}
    info["memory_fisher"] = round(growth[0] / growth[1], 2) if all(growth) else None
