"""`--compile` against uncompiled passes, and how often something is compiled."""

import copy
import shutil

import pytest
import torch
import toy
from torch._dynamo.utils import counters

from fastmerge.fisher_pass import FisherPass
from fastmerge.methods.trm import TRM
from fastmerge.models import compiled
from fastmerge.setup import Setup
from fastmerge.training import Train

FLAGS = ("--batch-size=8", "--epochs=1", "--merge-epochs=1", "--device=cpu", "--head=linear", "--clip=0")


def graphs():
    return counters["stats"]["unique_graphs"]


def one_task(learner, task, images, rows, evaluated):
    """Train, search, take the Fisher and evaluate; return all that they give."""
    learner.grow_head(task, images)
    previous = learner.theta.clone()
    train = Train(learner, task, images)
    train.batches.rows = lambda i: rows
    train.step(0)
    gradient = train.gradient.clone()
    train.finish()
    search = TRM(learner).merge(task, images, {"previous": previous})
    if search is not None:
        search.batches.rows = lambda i: rows
        search.step(0)
    fisher = FisherPass(learner, task, images, labels="data")
    fisher.batches.rows = lambda i: rows
    fisher.step(0)
    return gradient, fisher.fisher, learner.without_gradient(learner.backbone, evaluated)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_nothing_is_compiled_from_task_to_task(monkeypatch, dynamo):
    """With dynamo's graphs and no compiler behind them. The head grows, sizes vary, and floats change."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    setup = Setup(toy.parse([*FLAGS, "--no-compile"]))
    found = []
    for on in ("--no-compile", "--compile"):
        learner, seen = setup.learner(0, config=toy.parse([*FLAGS, on, "--trm.lambda2=0"])), []
        for task in setup.scenario.tasks[:3]:
            images = setup.cache.get(setup.dataset.train, task.train[:16])
            for rows in (torch.arange(8), torch.arange(8, 13))[: 1 if task.index == 1 else 2]:
                seen += one_task(learner, task, images, rows, images.images[:8])
            if task.index == 1:
                before = graphs()
        found.append(seen)
        assert graphs() == before and (before > 0) == (on == "--compile")
        assert before <= 5  # features and class tokens, with and without gradients
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
    assert learner.backbone.compiled is not None and copy.deepcopy(learner.backbone).compiled is None


def test_a_missing_compiler_is_told_once(monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    setup = Setup(toy.parse([*FLAGS, "--compile"]))
    learner, said = setup.learner(0), []
    learner.parts.say = said.append
    images = setup.cache.get(setup.dataset.train, setup.scenario.tasks[0].train[:8]).images
    plain = copy.deepcopy(learner.backbone)(learner.plain(images))
    for _ in range(2):
        assert torch.equal(learner.backbone(learner.plain(images)), plain)
    assert said == ["warning: --compile does not work here (no C++ compiler); the run goes on uncompiled"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiler_gives_the_same_numbers(dynamo, precision):
    setup = Setup(toy.parse(list(FLAGS)))
    task, found = setup.scenario.tasks[0], []
    images = setup.cache.get(setup.dataset.train, task.train[:8])
    for on in ("--no-compile", "--compile"):
        learner = setup.learner(0, config=toy.parse([*FLAGS, on, f"--precision={precision}"]))
        found.append(one_task(learner, task, images, torch.arange(8), images.images))
    assert learner.backbone.compiled.compiled is not None and graphs()
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-4 if precision == "fp32" else 2e-2) * a.norm()
