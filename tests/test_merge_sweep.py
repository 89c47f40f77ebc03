"""`fastmerge merge --sweep --evaluate`: every score against a plain merge and a plain loop over the held-out images."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from image_trees import image_folder
from safetensors.torch import load_file, save_file
from test_commands import train

import fastmerge
from fastmerge.__main__ import main
from fastmerge.checkpoint import load_tensors, save_tensors
from fastmerge.data import load_dataset
from fastmerge.files.plan import Options
from fastmerge.files.recipe import read_recipe
from fastmerge.files.sweep import read_grid
from fastmerge.models import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images") / "swept", classes=5, train=8, test=3)


def noisy(tensors, seed, size):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: x + size * x.std() * torch.randn(x.shape, generator=generator)
        if x.is_floating_point() and x.ndim > 1
        else x
        for name, x in tensors.items()
    }


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    """Files of a run's model and of two with noise on its backbone."""
    folder = tmp_path_factory.mktemp("models")
    flags = ["--tasks", 2, "--method", "finetune", "--model", "tiny", "--head", "text", "--validation", 0.25]
    train(folder / "r", data, *flags)
    tensors, about = load_tensors(folder / "r" / "finetune-seed0" / "model.safetensors")
    backbone = {name: x for name, x in tensors.items() if name.startswith("backbone.")}
    for k, size in enumerate((0.0, 0.3, 1.5)):
        save_tensors(folder / f"m{k}.safetensors", tensors | noisy(backbone, k, size), about)
    return [str(folder / f"m{k}.safetensors") for k in range(3)]


def rows(path):
    return list(csv.DictReader(open(path)))


def held_out(data, share):
    """Pixels `[n, 3, 32, 32]` and labels of the images that a plain count per class holds out."""
    split = load_dataset("folder", str(data)).held_out(share).test
    assert len(split) == 5 * round(8 * share)
    return split.read(np.arange(len(split)), 32, torch.device("cpu"))[0], torch.from_numpy(split.labels)


def test_every_score_is_that_of_a_plain_merge(data, models, tmp_path, capsys):
    words = ["--models", *models[:2], "--base", models[2], "--data-root", str(data), "--evaluate"]
    grid = ["--sweep", "scale=0.2:1:0.2", "weights.2=0,1"]
    assert main(["merge", "task-arithmetic", *words, *grid, "--out", str(tmp_path / "best.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "10 merges are scored on 10 held-out training images of swept, which no model has seen in training" in said
    pixels, labels = held_out(data, 0.25)
    one, two, base = (load_tensors(path)[0] for path in models)
    scores = []
    for scale in (0.2, 0.4, 0.6, 0.8, 1):
        for weight in (0, 1):
            merged = {
                n: x.double() + scale * ((one[n] - x).double() + weight * (two[n] - x).double())
                for n, x in base.items()
            }
            model = fastmerge.load(models[0])
            model.backbone.load_state_dict(
                {n.removeprefix("backbone."): x for n, x in merged.items() if "backbone." in n}
            )
            with torch.no_grad():
                scores.append(100 * float((model(pixels).argmax(1) == labels).double().mean()))
    table = rows(tmp_path / "best-sweep.csv")
    assert [(row["scale"], row["weights.2"]) for row in table][:3] == [("0.2", "0"), ("0.2", "1"), ("0.4", "0")]
    assert [float(row["accuracy"]) for row in table] == pytest.approx(scores, abs=1e-3) and len(set(scores)) > 2
    assert (tmp_path / "best-sweep.png").stat().st_size > 10_000
    best = table[scores.index(max(scores))]
    assert f"best: scale={best['scale']} weights.2={best['weights.2']}, accuracy {max(scores):.2f} %" in said
    recipe = read_recipe(tmp_path / "best.safetensors")
    assert recipe["chosen"]["point"] == {"scale": best["scale"], "weights.2": best["weights.2"]}
    assert main(["merge", "--recipe", str(tmp_path / "best.safetensors")]) == 0
    found = fastmerge.merge(
        models[:2],
        "task-arithmetic",
        base=models[2],
        settings={"scale": float(best["scale"])},
        weights=[1, float(best["weights.2"])],
    )
    assert all(torch.equal(x, found[name]) for name, x in load_file(tmp_path / "best.safetensors").items())


def test_of_equal_scores_the_first_wins_and_the_split_is_said(data, models, tmp_path, capsys):
    """2 and 2.0 are the same merge."""
    words = ["merge", "average", "--models", *models[:2], "--evaluate", "--data-root", str(data)]
    assert main([*words, "--sweep", "weights.1=2,2.0", "--out", str(tmp_path / "a")]) == 0
    assert "best: weights.1=2, accuracy" in capsys.readouterr().out
    for flags, message in {
        ("--validation", "0.5"): "20 held-out training images of swept, which models may have seen",
        ("--validation", "0"): r"15 test images of swept \(--validation 0\)",
        ("--validation", "0.01"): "40 training images of swept are too few",
        ("--validation", "1"): "--validation 1.0: expected",
    }.items():
        main([*words, "--sweep", "weights.1=2,2.0", "--dry-run", *flags])
        said = capsys.readouterr()
        assert re.search(message, said.out + said.err), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a-sweep.csv", "a-sweep.pdf", "a-sweep.png"]


def test_state_dicts_with_a_text_tower(data, tmp_path):
    """The text tower is merged too: the head of every point is made of it."""
    start = tiny.load_tiny().state_dict()
    paths = [str(tmp_path / f"{k}.safetensors") for k in range(2)]
    for k, path in enumerate(paths):
        save_file({f"module.{name}": x.contiguous() for name, x in noisy(start, k, 0.6 * k).items()}, path)
    words = ["merge", "slerp", "--models", *paths, "--sweep", "weights.2=0.2,1,5", "--evaluate", "folder"]
    words += ["--data-root", str(data), "--model", "tiny", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    pixels, labels = held_out(data, 0.2)
    images = (pixels / 255 - 0.5) / 0.3
    scores = []
    for weight in (0.2, 1, 5):
        merged = fastmerge.merge(paths, "slerp", weights=[1, weight])
        clip = tiny.create_tiny().eval()
        clip.load_state_dict({name.removeprefix("module."): x for name, x in merged.items()})
        with torch.no_grad():
            texts = clip.encode_text(tiny.tokenize([f"a photo of a colour {c}." for c in range(5)]), normalize=True)
            guessed = (clip.encode_image(images, normalize=True) @ texts.T).argmax(1)
        scores.append(100 * float((guessed == labels).double().mean()))
    found = [float(row["accuracy"]) for row in rows(tmp_path / "out-sweep.csv")]
    assert found == pytest.approx(scores, abs=1e-3) and len(set(scores)) > 1


def test_state_dicts_without_a_text_tower(data, tmp_path):
    """Classes are the means of the merged model's features on the images that are not held out."""
    torch.manual_seed(0)
    start = timm.create_model("test_vit", num_classes=7)
    paths = [str(tmp_path / f"{k}.pt") for k in range(2)]
    for k, path in enumerate(paths):
        torch.save({"state_dict": noisy(start.state_dict(), k, 2.0 * k)}, path)
    words = ["merge", "average", "--models", *paths, "--sweep", "weights.1=0,1", "--evaluate", "folder"]
    assert main([*words, "--data-root", str(data), "--model", "test_vit", "--out", str(tmp_path / "out")]) == 0
    dataset = load_dataset("folder", str(data)).held_out(0.2)
    size = start.pretrained_cfg["input_size"][-1]
    mean, std = (torch.tensor(start.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    parts = [part.read(np.arange(len(part)), size, torch.device("cpu"))[0] for part in (dataset.train, dataset.test)]
    scores = []
    for weight in (0, 1):
        model = timm.create_model("test_vit", num_classes=0).eval()
        state = fastmerge.merge(paths, "average", weights=[weight, 1])
        model.load_state_dict({n: x for n, x in state.items() if not n.startswith("head.")})
        with torch.no_grad():
            known, new = (F.normalize(model((part / 255 - mean) / std), dim=1) for part in parts)
        means = torch.stack([known[torch.from_numpy(dataset.train.labels) == c].mean(0) for c in range(5)])
        guessed = (new @ F.normalize(means, dim=1).T).argmax(1)
        scores.append(100 * float((guessed == torch.from_numpy(dataset.test.labels)).double().mean()))
    assert [float(row["accuracy"]) for row in rows(tmp_path / "out-sweep.csv")] == pytest.approx(scores, abs=1e-3)


def test_values_of_a_sweep():
    options = Options("ties", ["a", "b"])
    values = [point["scale"] for point in read_grid(["scale=0.1:0.5:0.1"], options)]
    assert values == ["0.1", "0.2", "0.3", "0.4", "0.5"]
    assert [p["weights.2"] for p in read_grid(["weights.2=1:2:0.4"], options)] == ["1", "1.4", "1.8"]
    assert read_grid(["zero=majority,positive", "keep=exactly,at least"], options)[1] == {
        "zero": "majority",
        "keep": "at least",
    }


def test_the_command_of_the_page(data, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(fastmerge.__file__).parent.parent / "docs" / "MERGE.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("    python") and "--sweep" in line]
    for k in range(2):
        folder = tmp_path / "runs" / "a" / f"finetune-seed{k}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(models[k])
    assert main([*shlex.split(line)[3:], "--dry-run"]) == 0
    assert "10 merges are scored on 10 held-out training images" in capsys.readouterr().out


def test_what_cannot_be_swept_is_one_line(data, models, tmp_path, capsys):
    save_file(load_tensors(models[0])[0], tmp_path / "bare.safetensors")
    tensors, about = load_tensors(models[0])
    save_tensors(tmp_path / "other.safetensors", tensors, about | {"class_names": [*about["class_names"][1:], "x"]})
    before = sorted(tmp_path.iterdir())
    ties = ["ties", "--models", *models[:2], "--base", models[2], "--data-root", str(data)]
    average = ["average", "--models", *models[:2], "--data-root", str(data)]
    bare = ["average", "--models", str(tmp_path / "bare.safetensors"), "--data-root", str(data)]
    for message, words in {
        "densty: ties has no such setting. Did you mean: density": [*ties, "--sweep", "densty=0.1,0.2"],
        "weights.3: ties has no such setting": [*ties, "--sweep", "weights.3=1,2"],
        "average has no such setting. .can be swept: weights.1, weights.2": [*average, "--sweep", "scale=1,2"],
        "'density': expected NAME=FROM:TO:STEP or": [*ties, "--sweep", "density"],
        "expected three numbers FROM:TO:STEP": [*ties, "--sweep", "density=0:1"],
        "a STEP above 0": [*ties, "--sweep", "density=1:0:0.1"],
        "at most 1000": [*ties, "--sweep", "density=0:1:1e-9"],
        "1600 merges; at most 1000": [*ties, "--sweep", "weights.1=1:40:1", "weights.2=1:40:1"],
        "density 2.0: expected": [*ties, "--sweep", "density=0.5,2"],
        "zero=some: expected": [*ties, "--sweep", "zero=some,majority"],
        "weights.1=-1: .*ties needs weights of at least 0": [*ties, "--sweep", "weights.1=-1:1:0.5"],
        "weights.1=x: expected a number": [*average, "--sweep", "weights.1=x"],
        "add up to 0": [*average, "--sweep", "weights.1=-1,1"],
        "3 settings; sweep one, or two": [*ties, "--sweep", "density=1", "zero=majority", "weights.1=1"],
        "density is named twice": [*ties, "--sweep", "density=0.1", "density=0.2"],
        "a value is named twice": [*ties, "--sweep", "density=0.1,0.1"],
        "bare.safetensors is no model of a run": [*bare, "--sweep", "weights.1=1,2"],
        "name the data set": [*bare, "--model", "tiny", "--sweep", "weights.1=1,2"],
        "which know their own; leave it out": [*average, "--model", "tiny", "--sweep", "weights.1=1,2"],
        "have different classes": [*average, str(tmp_path / "other.safetensors"), "--sweep", "weights.1=1,2"],
        "--batch-size 0: expected": [*average, "--sweep", "weights.1=1", "--batch-size", "0"],
        "--device gpu": [*average, "--sweep", "weights.1=1", "--device", "gpu"],
    }.items():
        if "other.safetensors" in words[-3]:
            words = ["average", "--models", models[0], *words[-3:]]
        end = ["--evaluate"]
        assert main(["merge", *words, *end, "--out", str(tmp_path / "out")]) == 2, message
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, (message, error)
    for message, words in {
        "--sweep and --evaluate need each other": [*average[:-2], "--sweep", "weights.1=1"],
        "--data-root needs --evaluate": average,
    }.items():
        assert main(["merge", *words, "--out", str(tmp_path / "out")]) == 2
        assert re.search(message, capsys.readouterr().err)
    words = ["merge", *average, "--sweep", "weights.1=1", "--evaluate", "--out", str(tmp_path / "bare.safetensors")]
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    words = [
        *bare,
        "--sweep",
        "weights.1=1,2",
        "--evaluate",
        "folder",
        "--model",
        "test_vit",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["merge", *words]) == 2 and "cannot be loaded into" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
