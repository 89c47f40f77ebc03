"""The figures of TRM's Section 3.2 against the models that runs keep: their projections, losses and class tokens in float64,
by plain formulas and hooks on the blocks."""

import csv

import numpy as np
import pytest
import torch
from image_trees import image_folder

import fastmerge
from fastmerge.__main__ import main as train
from fastmerge.analysis.__main__ import main
from fastmerge.analysis.merges import NAMES
from fastmerge.analysis.stages import work
from fastmerge.data import load_dataset
from fastmerge.flags import parse
from fastmerge.setup import Setup
from fastmerge.training import Train

FLAGS = (
    "--tasks 3 --model tiny --pretrained none --head prototype --epochs 1 --batch-size 8 --lr 3e-3 --device cpu"
    " --dataset folder --trm.lr 0.1"
).split()
CHOSEN = ["magmax:scale=0.7", "dare", "regmean", "trm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=6, train=8, test=2)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The models that `--protocol strict` keeps after every task."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    flags = [*FLAGS, "--data-root", str(data), "--run-dir", str(folder), "--quiet", "--no-nearest-mean"]
    assert train([*flags, "--keep-models", "--method", "finetune", *CHOSEN]) == 0
    return folder


def model_of(run, name, task):
    (folder,) = run.glob(f"{name.partition(':')[0]}*-seed0")
    return fastmerge.load(folder / "models" / f"task-{task}.safetensors").double()


def vector(model):
    return np.concatenate([p.detach().numpy().ravel() for _, p in sorted(model.backbone.named_parameters())])


def images_of(model, data, task):
    """Training images of a task, normalised, and their classes."""
    split = load_dataset("folder", str(data)).train
    rows = np.flatnonzero(np.isin(split.labels, model.recipe["tasks"][task]["classes"]))
    pixels, _ = split.read(rows, model.backbone.image_size, torch.device("cpu"))
    shape = (1, 3, 1, 1)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(shape) for x in (model.backbone.mean, model.backbone.std))
    return (pixels.double() / 255 - mean) / std, split.labels[rows]


@torch.no_grad()
def loss_of(model, data):
    """Mean -log p of the second task's training images among its classes, by hand."""
    images, labels = images_of(model, data, 1)
    classes = model.recipe["tasks"][1]["classes"]
    logits = model.head(model.backbone(images), torch.tensor(classes)).numpy()
    right = logits[np.arange(len(labels)), [classes.index(label) for label in labels]]
    return np.mean(np.log(np.exp(logits).sum(1)) - right)


def analyse(data, out, what, *flags):
    assert main([what, *flags, "--out", str(out), "--data-root", str(data), *FLAGS]) == 0
    with open(out / f"{what}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for kind in ("png", "pdf"):
        assert (out / f"{what}.{kind}").stat().st_size > 1000
    return rows


def test_trajectory(data, run, tmp_path):
    rows = analyse(data, tmp_path, "trajectory", "--points", "5", "--method", *CHOSEN)
    first, second = (vector(model_of(run, "finetune", task)) for task in (1, 2))
    model = model_of(run, "finetune", 2)
    line = [row for row in rows if row["part"] == "line"]
    assert [float(row["x"]) for row in line] == [0, 0.25, 0.5, 0.75, 1]
    for row in line:
        parameters, start = dict(model.backbone.named_parameters()), 0
        weights = torch.from_numpy(first + float(row["x"]) * (second - first))
        for name in sorted(parameters):
            size = parameters[name].numel()
            parameters[name].data.copy_(weights[start : start + size].view(parameters[name].shape))
            start += size
        assert float(row["loss"]) == pytest.approx(loss_of(model, data), rel=1e-4)
    merges = [row for row in rows if row["part"] == "merge"]
    assert [row["merge"] for row in merges] == CHOSEN
    d, found = second - first, set()
    for row in merges:
        its = model_of(run, row["merge"], 2)
        moved = vector(its) - first
        x = moved @ d / (d @ d)
        assert float(row["x"]) == pytest.approx(x, rel=1e-4)
        off = np.linalg.norm(moved - x * d) / np.linalg.norm(d)
        assert float(row["off_line"]) == pytest.approx(off, rel=1e-3, abs=1e-6)
        assert float(row["loss"]) == pytest.approx(loss_of(its, data), rel=1e-4)
        found.add(round(x, 4))
    assert len(found) == len(CHOSEN)


def test_drift(data, run, tmp_path):
    rows = analyse(data, tmp_path, "drift", "--method", *CHOSEN)
    layers = model_of(run, "trm", 2).backbone.layers
    assert [(row["merge"], int(row["layer"])) for row in rows] == [(c, k + 1) for c in CHOSEN for k in range(layers)]

    @torch.no_grad()
    def tokens(model):
        seen = []
        hooks = [
            block.register_forward_hook(lambda _, given, out: seen.append(out[:, 0]))
            for block in model.backbone.tower.transformer.resblocks
        ]
        model.backbone(images_of(model, data, 1)[0])
        for hook in hooks:
            hook.remove()
        return torch.stack(seen).numpy()

    wanted = tokens(model_of(run, "finetune", 2))
    for row in rows:
        layer = int(row["layer"]) - 1
        far = tokens(model_of(run, row["merge"], 2))[layer] - wanted[layer]
        assert float(row["drift"]) == pytest.approx(np.mean(np.sqrt((far**2).sum(1))), rel=1e-4)
        assert float(row["norm"]) == pytest.approx(np.mean(np.sqrt((wanted[layer] ** 2).sum(1))), rel=1e-4)


def test_gradients(data, run, tmp_path):
    """The training of the third task from each start by the trainer's own phase; gradients in float64, an image at a time."""
    rows = analyse(data, tmp_path, "gradients", "--points", "3", "--method", "magmax:scale=0.7", "trm")
    starts = ["finetune", "magmax:scale=0.7", "trm"]
    assert [(row["start"], float(row["x"])) for row in rows] == [(s, x) for s in starts for x in (0, 0.5, 1)]
    setup = Setup(parse([*FLAGS, "--data-root", str(data)]))
    task = setup.scenario.tasks[2]
    found = {}
    for name in starts:
        learner, start = setup.learner(0), torch.from_numpy(vector(model_of(run, name, 2)))
        for known in setup.scenario.tasks:
            learner.grow_head(known, setup.cache.get(setup.dataset.train, known.train))
        flat = learner.flat
        for view, part in zip(flat.views(learner.theta), start.split(flat.sizes), strict=True):
            view.copy_(part.view(view.shape))
        work(Train(learner, task, setup.cache.get(setup.dataset.train, task.train)))
        end = torch.cat([view.double().flatten() for view in flat.views(learner.theta)])
        model = model_of(run, name, 3)
        found[name] = [gradient_of(model, data, start + x * (end - start)) for x in (0, 0.5, 1)]
    for row in rows:
        first, here = found[row["start"]][0], found[row["start"]][int(2 * float(row["x"]))]
        cosine = min(1.0, first @ here / np.sqrt((first @ first) * (here @ here)))
        assert float(row["angle"]) == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-3, abs=1e-3)
        assert float(row["norm"]) == pytest.approx(np.sqrt(here @ here), rel=1e-3)
    ends = [float(row["angle"]) for row in rows if float(row["x"]) == 1]
    assert min(ends) > 1 and len(set(ends)) == 3


def gradient_of(model, data, weights):
    """The gradient of the third task's mean loss in float64: the sum of every image's, divided by their number."""
    parameters = [p for _, p in sorted(model.backbone.named_parameters())]
    for parameter, part in zip(parameters, weights.split([p.numel() for p in parameters]), strict=True):
        parameter.data.copy_(part.view(parameter.shape))
    images, labels = images_of(model, data, 2)
    classes, total = model.recipe["tasks"][2]["classes"], 0
    for image, label in zip(images, labels, strict=True):
        logits = model.head(model.backbone(image[None]), torch.tensor(classes))[0]
        gradient = torch.autograd.grad(logits.logsumexp(0) - logits[classes.index(label)], parameters)
        total = total + np.concatenate([g.numpy().ravel() for g in gradient])
    return total / len(labels)


def test_every_rule_is_a_merge(data, tmp_path):
    """With a linear head and LoRA, where a rule merges the adapted weights alone."""
    rows = analyse(data, tmp_path, "trajectory", "--points", "2", "--head", "linear", "--lora-rank", "2")
    assert [row["merge"] for row in rows if row["part"] == "merge"] == list(NAMES)
    by_name = {row["merge"]: row for row in rows}
    assert float(by_name["average"]["x"]) == pytest.approx(0.5) and float(by_name["average"]["off_line"]) < 1e-3
    assert all(float(row["off_line"]) > 1e-3 for name, row in by_name.items() if name in ("magmax", "dare", "trm"))


def test_bad_merges(data, tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--data-root", str(data), *FLAGS]
    for methods, message in (
        ("magmux", "--method magmux: expected one of trm, average"),
        ("finetune", "--method finetune: expected one of trm, average"),
        ("magmax:scael=1", "Did you mean: scale"),
        ("magmax:lr=1e-3", "give --lr to the command instead"),
        ("magmax magmax", "expected each merge once"),
        ("trm:layer_b=9", "--trm.layer-b 9"),
    ):
        assert main(["trajectory", "--method", *methods.split(), *flags]) == 2, methods
        assert message in capsys.readouterr().err
    assert main(["drift", *flags, "--tasks", "1"]) == 2
    assert "--tasks 1: drift compares the models of 2 tasks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
