"""Compare EWC and LwF with autograd on their written-out losses; test joint training, nearest mean, held-out images."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from image_trees import image_folder
from safetensors.torch import load_file

from fastmerge import console
from fastmerge.__main__ import main
from fastmerge.data import load_dataset
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import build_scenario
from fastmerge.methods import METHODS
from fastmerge.methods.ewc import EWC
from fastmerge.methods.lwf import LwF
from fastmerge.models.heads import PrototypeHead
from fastmerge.report import warmup_warning
from fastmerge.training import Train, learning_rate, positions


class Watch:
    """Record the flat gradient at every optimiser step (clipping is off)."""

    def __init__(self, phase):
        self.seen, inner = [], phase.optimiser.step
        flat = phase.learner.flat

        def step():
            self.seen.append((flat.theta.detach().clone(), flat.gradient.clone()))
            inner()

        phase.optimiser.step = step


def train_two_tasks(kind, *flags, head="text"):
    """Train and merge task 1 and begin task 2."""
    learner = toy.learner("--clip=0", *flags, head=head)
    method = kind(learner)
    (first, images), second = toy.tasks()[:2]
    learner.grow_head(first, images)
    during = method.begin(first)
    toy.work(method.train(first, images, during))
    toy.work(method.merge(first, images, during))
    learner.grow_head(*second)
    before = learner.theta.clone()
    during = method.begin(second[0])
    return learner, method, during, second, before


def batch(phase, i):
    learner = phase.learner
    pixels, labels = phase.images.batch(phase.batches.rows(i))
    return learner.augmented(pixels, learner.generator("augment", phase.task.index, i)), positions(
        labels, phase.classes
    )


def at(learner, theta, images):
    return torch.func.functional_call(learner.flat.module, learner.flat.as_dict(theta), (images,))


def test_ewc_is_its_loss_differentiated():
    learner, method, during, (task, images), before = train_two_tasks(EWC, "--ewc.lam=30")
    assert torch.equal(during["anchor"], before) and method.fisher.max() > 0
    phase = method.train(task, images, during)
    watch = Watch(phase)
    for i in range(3):
        phase.step(i)
    for i, (theta, gradient) in enumerate(watch.seen):
        x, y = batch(phase, i)
        theta = theta.requires_grad_()
        loss = F.cross_entropy(learner.head(at(learner, theta, x), phase.classes), y)
        loss = loss + 15 * (method.fisher * (theta - before) ** 2).sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, theta)[0], rtol=1e-4, atol=1e-6)
    old = method.fisher.clone()
    phase.finish()
    merge = method.merge(task, images, during)
    toy.work(merge)
    torch.testing.assert_close(method.fisher, old + merge.fisher)


def test_online_ewc_decays_the_older_fishers():
    learner, method, during, (task, images), _ = train_two_tasks(EWC, "--ewc.decay=0.25")
    old, merge = method.fisher.clone(), method.merge(task, images, during)
    toy.work(merge)
    torch.testing.assert_close(method.fisher, 0.25 * old + merge.fisher)


@pytest.mark.parametrize("name", ["lwf", "icarl"])
def test_a_known_class_without_an_image(name, tmp_path):
    """A prototype head gives it the logit -inf, in the teacher and in the model."""
    learner = toy.learner("--epochs=1", "--lwf.lam=1", "--icarl.exemplars=12")
    learner.head = PrototypeHead(5, toy.CLASSES)
    method, found = METHODS[name].build(learner, toy.nowhere(tmp_path), None), []
    for task, images in toy.tasks()[:2]:
        if not task.index:
            rows = images.labels != 1
            images = TaskImages(images.images[rows], images.labels[rows], 0)
        learner.grow_head(task, images)
        phase = method.train(task, images, method.begin(task))
        found += [phase.step(i)["loss"] for i in range(phase.steps)]
        phase.finish()
        toy.work(method.merge(task, images, {}))
    assert torch.stack(found).isfinite().all() and learner.theta.isfinite().all()


@pytest.mark.parametrize("head", ["text", "linear"])
def test_lwf_is_its_loss_differentiated(head):
    learner, method, during, (task, images), before = train_two_tasks(
        LwF, "--lwf.lam=0.7", "--lwf.temperature=2", head=head
    )
    teacher_rows = {k: v.clone() for k, v in learner.head.state_dict().items()}
    phase = method.train(task, images, during)
    watch = Watch(phase)
    heads = []
    for i in range(3):
        heads.append({k: v.clone() for k, v in learner.head.state_dict().items()})
        phase.step(i)
    known = torch.tensor(toy.tasks()[0][0].classes)
    for i, (theta, gradient) in enumerate(watch.seen):
        x, y = batch(phase, i)
        learner.head.load_state_dict(teacher_rows)
        p = (learner.head(at(learner, before, x), known) / 2).softmax(1).detach()
        learner.head.load_state_dict(heads[i])
        theta = theta.requires_grad_()
        features = at(learner, theta, x)
        kept = -(p * (learner.head(features, known) / 2).log_softmax(1)).sum(1).mean()
        loss = F.cross_entropy(learner.head(features, phase.classes), y) + 0.7 * kept
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, theta)[0], rtol=1e-4, atol=1e-6)
    toy.work(method.merge(task, images, during))
    assert method.known.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [EWC, LwF])
def test_state_comes_back_in_the_middle_of_a_task(kind):
    learner, method, during, (task, images), _ = train_two_tasks(kind, head="linear")
    phase = method.train(task, images, during)
    phase.step(0)
    saved = [{k: v.clone() for k, v in x.items()} for x in (method.state_dict(), learner.state_dict(), phase.tensors())]
    for i in range(1, phase.steps):
        phase.step(i)
    other = toy.learner("--clip=0", head="linear")
    other.load_state_dict(saved[1])
    again = kind(other)
    again.load_state_dict(saved[0])
    resumed = again.train(task, images, during)
    resumed.load(saved[2])
    for i in range(1, resumed.steps):
        resumed.step(i)
    assert torch.equal(other.theta, learner.theta)


def test_warmup_then_cosine():
    rates = [learning_rate(1.0, i, 10, warmup=4) for i in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[7] == pytest.approx(0.5)
    assert learning_rate(1.0, 2, 3, warmup=500) == pytest.approx(3 / 500)
    assert learning_rate(1.0, 0, 10) == 1.0

    short = [type("T", (), {"train": range(100)}), type("T", (), {"train": range(40)})]
    config = toy.parse(["--warmup-steps=500", "--batch-size=8", "--epochs=2", "--lr=1e-3"]).training
    assert "10 steps" in warmup_warning(short, config) and "2e-05" in warmup_warning(short, config)
    assert warmup_warning(short, toy.parse(["--batch-size=8"]).training) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=10, test=4)


def test_held_out_images_are_training_images(data):
    whole = load_dataset("folder", str(data), download=False, skip_bad_images=False, split_file=None)
    part = whole.held_out(0.3)
    assert sorted([*part.train.ids, *part.test.ids]) == sorted(whole.train.ids)
    assert np.bincount(part.test.labels).tolist() == [3] * 4  # three of every class
    pixels, _ = part.test.read(np.array([5]), 8, torch.device("cpu"))
    same = list(whole.train.ids).index(part.test.ids[5])
    assert torch.equal(pixels, whole.train.read(np.array([same]), 8, torch.device("cpu"))[0])
    assert "held out" in build_scenario(part, "cil", 2).manifest()["warnings"][0]


@pytest.mark.slow  # test_saved.py runs all methods in one command too
def test_all_kinds_of_methods_in_one_command(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)  # all progress lines
    flags = (
        f"--dataset folder --data-root {data} --tasks 2 --model tiny --pretrained none --head prototype --epochs 1"
        f" --batch-size 16 --lr 1e-3 --device cpu --run-dir {tmp_path / 'r'} --keep-trajectory"
    ).split()
    first = [
        "--method",
        "finetune",
        "joint",
        "nearest-mean",
        "lwf",
        "ewc",
        "magmax",
        "pam",
        "--protocol",
        "full",
        "strict",
    ]
    assert main([*flags, *first]) == 0
    out = capsys.readouterr().out
    epochs = re.findall(r"(\w+) epoch (\d+)/(\d+)", out)
    assert {kind for kind, *_ in epochs} == {"train", "merge"}
    assert all(1 <= int(epoch) <= int(of) for _, epoch, of in epochs)
    results = json.loads((tmp_path / "r" / "results.json").read_text())["methods"]
    assert list(results) == ["finetune", "joint", "nearest-mean", "lwf", "ewc", "magmax-full", "magmax-strict", "pam"]
    assert len(results["joint"]["0"]["accuracy_matrix"]) == 1 and results["joint"]["0"]["forgetting"] is None
    assert results["nearest-mean"]["0"]["seconds"]["train"] < 0.1
    kept = results["nearest-mean"]["0"]["kept_bytes"]
    assert (
        max(kept) < 1.1 * results["finetune"]["0"]["kept_bytes"][0] / 2
    )  # one model; the prototype head keeps theta_init
    assert "Θ(1)" in out and "magmax-full" in out

    def steps(run):
        lines = (tmp_path / "r" / f"{run}-seed0" / "metrics.jsonl").read_text().splitlines()
        return sum(json.loads(line)["phase"] == "train" for line in lines)

    assert steps("finetune") == steps("magmax-strict") > 0 and steps("magmax-full") == 0  # trained once
    shared = results["magmax-full"]["0"]["seconds"]["train"]
    assert shared == pytest.approx(results["finetune"]["0"]["seconds"]["train"], rel=0.5)  # and reports its time
    assert main([*flags, "--method", "average", "--protocol", "full"]) == 0  # a later command uses the kept models
    assert steps("average-full") == 0
    assert len(list((tmp_path / "r" / "trajectory-seed0").glob("*.safetensors"))) == 2
    assert main([*[f for f in flags if f != "--keep-trajectory"], "--method", "ties", "--protocol", "running"]) == 0
    assert steps("ties-running") == 0 and (tmp_path / "r" / "trajectory-seed0").exists()  # kept until a user deletes it


def test_rows_with_settings_of_training(data, tmp_path, capsys):
    """A row is the command with these settings; rows that train alike share one training; the same command repeats them."""
    flags = (
        f"--dataset folder --data-root {data} --tasks 2 --model tiny --pretrained none --head prototype --epochs 1"
        " --batch-size 16 --lr 1e-3 --device cpu --no-nearest-mean --quiet --protocol full --run-dir"
    ).split()
    rows = ["finetune", "finetune:epochs=2,lr=2e-3", "average:epochs=2,lr=2e-3"]
    assert main([*flags, str(tmp_path / "r"), "--method", *rows]) == 0
    assert main([*flags, str(tmp_path / "s"), "--epochs", "2", "--lr", "2e-3", "--method", "average"]) == 0
    alone = load_file(tmp_path / "s" / "average-full-seed0" / "model.safetensors")
    row = load_file(tmp_path / "r" / "average-full(epochs=2,lr=2e-3)-seed0" / "model.safetensors")
    assert all(torch.equal(row[name], alone[name]) for name in alone)
    steps = {
        path.parent.name: sum(json.loads(line)["phase"] == "train" for line in path.read_text().splitlines())
        for path in (tmp_path / "r").glob("*/metrics.jsonl")
    }
    assert steps["finetune(epochs=2,lr=2e-3)-seed0"] == 2 * steps["finetune-seed0"] > 0
    assert steps["average-full(epochs=2,lr=2e-3)-seed0"] == 0
    determines = json.loads((tmp_path / "r" / "manifest.json").read_text())["determines"]["runs"]
    assert determines["finetune(epochs=2,lr=2e-3)-seed0"] == {"training.epochs": 2, "training.lr": 0.002}
    assert main([*flags, str(tmp_path / "r"), "--method", *rows]) == 0
    assert not (tmp_path / "r" / "trajectory-seed0").exists()


def test_plain_training_is_unchanged_by_the_hooks():
    learner = toy.learner()
    task, images = toy.tasks()[0]
    learner.grow_head(task, images)
    phase = Train(learner, task, images)
    x, y = batch(phase, 0)
    torch.testing.assert_close(
        phase.loss(x, phase.images.batch(phase.batches.rows(0))[1]),
        F.cross_entropy(learner.head(learner.backbone(x), phase.classes), y),
    )
