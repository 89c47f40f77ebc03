"""Test the contract of a method (methods/method.py) for all methods and, for merge rules, all protocols."""

import copy
import io
import re
from types import SimpleNamespace

import pytest
import torch
import toy

from fastmerge import console
from fastmerge.checkpoint import joined, load_tensors, resident, save_tensors, select
from fastmerge.config import Config
from fastmerge.loop import kept_bytes
from fastmerge.methods import METHODS
from fastmerge.models.features import restore
from fastmerge.plan import Run
from fastmerge.runfolder import State
from fastmerge.training import PHASES

# the toy backbone has no class tokens
FLAGS = (
    "--epochs=1", "--merge-epochs=1", "--trm.lambda1=0", "--protocol", "full", "running", "strict",
    "--pam.rank=0",
    "--inflora.rank=2", "--sdlora.rank=2",
    f"--clg-cbm.concepts={toy.CONCEPTS}", "--clg-cbm.per-class=2", "--clg-cbm.gate-epochs=2", "--clg-cbm.epochs=2",
)  # fmt: skip
CASES = [(name, protocol) for name, kind in METHODS.items() for protocol in kind.protocols(toy.parse(list(FLAGS)))]


def build(name, protocol, tmp_path, *flags):
    kind = METHODS[name]
    learner = toy.learner(*flags, *FLAGS, method=name)
    learner.head = toy.head(kind.head, learner.head)
    return learner, kind.build(learner, toy.nowhere(tmp_path), protocol)


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_what_is_kept_is_enough_to_go_on(name, protocol, tmp_path):
    """A fresh learner and method that load the states after two tasks end the third task with the same bits."""
    learner, method = build(name, protocol, tmp_path)
    *before, last = toy.tasks()
    for task, images in before:
        one_task(learner, method, task, images)
    saved = [{k: v.clone() for k, v in x.state_dict().items()} for x in (learner, method)]
    other, again = build(name, protocol, tmp_path)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for run in ((learner, method), (other, again)):
        one_task(*run, *last)
    assert torch.equal(other.theta, learner.theta)
    x = learner.plain(last[1].images)
    assert torch.equal(again.features()(x), method.features()(x))


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_the_model_is_charged_once(name, protocol, tmp_path):
    """Kept bytes always include the learner's model, and no method returns it a second time."""
    learner, method = build(name, protocol, tmp_path)
    for task, images in toy.tasks()[:2]:
        one_task(learner, method, task, images)
    state = method.state_dict()
    assert kept_bytes(learner, method) == resident(learner.state_dict()) + resident(state) >= learner.theta.nbytes
    own = learner.theta.data_ptr()
    assert all(tensor.data_ptr() != own for tensor in state.values() if tensor.numel())


@pytest.mark.parametrize("name", METHODS)
def test_facts(name, tmp_path):
    kind = METHODS[name]
    config = Config()
    assert all(hasattr(config, group) for group in kind.groups)
    assert kind.merge_epochs(config) >= 0
    for protocol in kind.protocols(config):
        assert kind.trajectory(config, protocol) in (None, "sequential", "independent")
        learner, method = build(name, protocol, tmp_path)
        task, images = toy.tasks()[0]
        learner.grow_head(task, images)
        start, during = learner.theta.clone(), method.begin(task)
        made = []
        for make in (method.train, method.merge):
            made.append(make(task, images, during))
            toy.work(made[-1])
        assert [phase.name for phase in made if phase is not None] == [
            n for n, p in zip(PHASES, made, strict=True) if p
        ]
        assert (made[0] is not None) == kind.trains
        assert torch.equal(learner.theta, start) == kind.frozen
        features = method.features()
        same = restore(
            features.kind, copy.deepcopy(learner.backbone), {k: v.clone() for k, v in features.tensors.items()}
        )
        x = learner.plain(images.images)
        torch.testing.assert_close(same(x), features(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_inside_a_phase_is_a_file(name, tmp_path):
    """No two of its tensors share their memory, which safetensors refuses, and a phase that loads it has the same ones."""
    learner, method = build(name, METHODS[name].protocols(Config())[0], tmp_path)
    for task, images in toy.tasks()[:2]:
        learner.grow_head(task, images)
        during = method.begin(task)
        for make in (method.train, method.merge):
            phase = make(task, images, during)
            for i in range(phase.steps if phase else 0):
                phase.step(i)
                if i not in (0, phase.steps // 2, phase.steps - 1):
                    continue
                parts = {"learner": learner.state_dict(), "method": method.state_dict(), "during": during}
                saved = joined(**parts, phase=phase.tensors())
                save_tensors(tmp_path / "checkpoint", saved, {})
                loaded, _ = load_tensors(tmp_path / "checkpoint")
                assert loaded.keys() == saved.keys()
                again = make(task, images, dict(during))
                again.load(select(loaded, "phase"))
                assert again.tensors().keys() == phase.tensors().keys()
            if phase:
                phase.finish()


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_progress_counts_epochs_to_their_number(name, protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    screen = console.Console(file=out)
    learner, method = build(name, protocol, tmp_path)
    tasks = toy.tasks()
    scenario = SimpleNamespace(kind="cil", tasks=[task for task, _ in tasks])
    epochs = {"train": METHODS[name].train_epochs(learner.config), "merge": METHODS[name].merge_epochs(learner.config)}
    screen.start([Run(name, name, protocol, 0, learner.config, scenario, epochs, None)])
    screen.next_run(0)
    screen.begin(State())
    steps = 0
    for task, images in tasks:
        learner.grow_head(task, images)
        during = method.begin(task)
        for phase_name, make in zip(PHASES, (method.train, method.merge), strict=True):
            phase = make(task, images, during)
            for i in range(phase.steps if phase else 0):
                screen.step(task, phase_name, i, phase, phase.step(i))
                steps += 1
            if phase:
                phase.finish()
    shown = re.findall(r"(train|merge) epoch (\d+)/(\d+)", out.getvalue())
    assert len(shown) == steps and all(1 <= int(epoch) <= int(of) == epochs[kind] for kind, epoch, of in shown)


def one_task(learner, method, task, images):
    learner.grow_head(task, images)
    during = method.begin(task)
    toy.work(method.train(task, images, during))
    toy.work(method.merge(task, images, during))
