"""The commands on finished runs: their files and numbers, and the exported files in the libraries they are for."""

import csv
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from image_trees import image_folder, truncate, write_tree
from PIL import Image
from toy import CONCEPTS

import fastmerge
from fastmerge.__main__ import main
from fastmerge.commands import COMMANDS
from fastmerge.models import tiny

FEW = ["--clg-cbm.concepts", str(CONCEPTS), "--attriclip.bank", "5", "--attriclip.top", "2"]
TRAIN = "--epochs 1 --merge-epochs 1 --batch-size 16 --lr 1e-3 --device cpu --quiet --no-nearest-mean".split()


def train(folder, data, *flags):
    place = ["--dataset", "folder", "--data-root", str(data), "--run-dir", str(folder)]
    assert main(["train", *TRAIN, *place, *map(str, flags)]) == 0
    return json.loads((folder / "results.json").read_text())["methods"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=3, test=5)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r"
    train(folder, data, "--tasks", 2, "--method", "finetune", "cmm", "--model", "tiny", "--head", "text")
    return folder


def evaluated(capsys, *args):
    assert main(["evaluate", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["finetune", "cmm"])
def test_evaluate_gives_the_numbers_of_the_run(method, runs, data, capsys):
    capsys.readouterr()
    result = json.loads((runs / "results.json").read_text())["methods"][method]["0"]
    found = evaluated(capsys, runs / f"{method}-seed0")
    assert found["accuracy"] == pytest.approx(result["final_accuracy"], abs=1e-9)
    assert list(found["per_task"].values()) == pytest.approx(result["accuracy_matrix"][-1], abs=1e-9)
    assert found["images"] == 20 and found["bad_images"] == 0
    assert {file.rsplit("/", 1)[1] for file in found["files"]} == {"predictions.csv", "confusion.csv", "confusion.png"}
    folder = Path(found["files"][0]).parent
    assert folder.parent == runs / f"{method}-seed0"
    rows = list(csv.DictReader(open(folder / "predictions.csv")))
    assert len(rows) == 20 and all((data / row["image"]).is_file() for row in rows)
    hits = [row["class"] == row["predicted"] for row in rows]
    assert 100 * np.mean(hits) == pytest.approx(found["accuracy"])
    model = fastmerge.load(runs / f"{method}-seed0")
    names, probabilities = model.predict([data / row["image"] for row in rows])
    assert names == [row["predicted"] for row in rows]
    shown = [float(row["probability"]) for row in rows]
    assert probabilities.max(1).values.tolist() == pytest.approx(shown, abs=1e-4)
    matrix = [list(map(int, row[1:])) for row in list(csv.reader(open(folder / "confusion.csv")))[1:]]
    assert np.sum(matrix) == 20 and np.trace(matrix) == sum(hits) and np.sum(matrix, 1).tolist() == [5] * 4
    assert Image.open(folder / "confusion.png").width > 100


def test_evaluate_elsewhere(runs, data, tmp_path, capsys):
    """On some of the classes, in another order of folders, with an unreadable image."""
    write_tree(tmp_path / "d", *(f"{part}/{name}" for part in ("train", "test") for name in ("colour_3", "colour_1")))
    bad = truncate(tmp_path / "d" / "test" / "colour_1" / "0.png")
    place = ["--dataset", "folder", "--data-root", tmp_path / "d", "--out", tmp_path / "out"]
    assert main(["evaluate", str(runs / "finetune-seed0"), *map(str, place)]) == 2
    error = capsys.readouterr().err
    assert str(bad) in error and "--skip-bad-images" in error and not (tmp_path / "out").exists()
    found = evaluated(capsys, runs / "finetune-seed0", *place, "--skip-bad-images")
    assert (found["images"], found["bad_images"]) == (3, 1)
    assert set(found["per_class"]) == {"colour 1", "colour 3"}
    text = (
        main(["evaluate", str(runs / "finetune-seed0"), *map(str, place), "--skip-bad-images"]),
        capsys.readouterr().out,
    )
    assert text[0] == 0 and "3 test images, 1 unreadable one skipped" in text[1]


def test_evaluate_on_unknown_classes(runs, tmp_path, capsys):
    write_tree(tmp_path / "d", *(f"{part}/{name}" for part in ("train", "test") for name in ("colour_1", "colour_9")))
    assert main(["evaluate", str(runs / "finetune-seed0"), "--data-root", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert "1 class that the model does not know, such as 'colour 9'" in error and "Traceback" not in error


def test_domains_are_tasks(tmp_path, capsys):
    folders = [f"{d}/{p}/c{c}" for d in ("day", "night") for p in ("train", "test") for c in range(3)]
    write_tree(tmp_path / "d", *folders)
    results = train(tmp_path / "r", tmp_path / "d", "--scenario", "dil", "--method", "finetune", "--model", "tiny")
    capsys.readouterr()
    found = evaluated(capsys, tmp_path / "r")  # the only model of the folder
    assert list(found["per_task"]) == ["day", "night"]
    assert list(found["per_task"].values()) == pytest.approx(results["finetune"]["0"]["accuracy_matrix"][-1], abs=1e-9)


def exported(capsys, model, kind, out, *flags):
    assert main(["export", str(model), "--format", kind, "--out", str(out), *flags]) == 0
    return capsys.readouterr().out


def test_export_to_open_clip(runs, tmp_path, capsys):
    """Both towers, by open_clip's own loader; the logits are those of the run."""
    said = exported(capsys, runs / "finetune-seed0", "open_clip", tmp_path / "clip")
    assert f'create_model_and_transforms("local-dir:{tmp_path / "clip"}")' in said
    clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    clip = clip.eval()
    model = fastmerge.load(runs / "finetune-seed0")
    x = torch.rand(3, 3, 32, 32)
    normalised = model.normalised(x)
    assert [t for t in transform.transforms if hasattr(t, "mean")][0].mean == pytest.approx(model.backbone.mean)
    with torch.no_grad():
        texts = clip.encode_text(tiny.tokenize([f"a photo of a {n}." for n in model.class_names]), normalize=True)
        logits = clip.logit_scale.exp() * clip.encode_image(normalised, normalize=True) @ texts.T
        torch.testing.assert_close(logits, model(x), rtol=1e-5, atol=1e-5)
    about = json.loads((tmp_path / "clip" / "classes.json").read_text())
    assert about["class_names"] == model.class_names and about["templates"] == ["a photo of a {}."]


@pytest.fixture(scope="module")
def vit(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "r"
    flags = ["--tasks", 2, "--method", "finetune", "--model", "test_vit", "--pretrained", "none", "--head", "linear"]
    train(folder, data, *flags)
    return folder / "finetune-seed0"


def test_export_to_timm(vit, tmp_path, capsys):
    said = exported(capsys, vit, "timm", tmp_path / "timm")
    assert (
        f'timm.create_model("test_vit", checkpoint_path="{tmp_path / "timm" / "model.safetensors"}", num_classes=4)'
        in said
    )
    theirs = timm.create_model("test_vit", checkpoint_path=str(tmp_path / "timm" / "model.safetensors"), num_classes=4)
    model, x = fastmerge.load(vit), torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(model.normalised(x)), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["open_clip", "timm"])
def test_export_to_transformers(family, runs, vit, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    place, kind = {
        "open_clip": (runs / "finetune-seed0", "CLIPVisionModelWithProjection"),
        "timm": (vit, "ViTModel"),
    }[family]
    said = exported(capsys, place, "hf", tmp_path / "hf")
    assert f'transformers.{kind}.from_pretrained("{tmp_path / "hf"}")' in said
    options = {} if family == "open_clip" else {"add_pooling_layer": False}
    theirs, loading = getattr(transformers, kind).from_pretrained(tmp_path / "hf", output_loading_info=True, **options)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = fastmerge.load(place)
    x = model.normalised(torch.rand(2, 3, model.backbone.image_size, model.backbone.image_size))
    with torch.no_grad():
        out = theirs.eval()(x)
        features = out.image_embeds if family == "open_clip" else out.last_hidden_state[:, 0]
        torch.testing.assert_close(features, model.features(x), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def more_than_weights(data, tmp_path_factory):
    """What the function has besides the weights, in a word -> the run. Their towers have the starting weights."""
    folder, heads = tmp_path_factory.mktemp("more") / "r", {"attributes": "attriclip", "fusion": "proof"}
    methods = {"prefix": "finetune:prompt_length=2", **heads, "concepts": "clg-cbm"}
    train(folder, data, "--tasks", 2, "--model", "tiny", "--head", "text", *FEW, "--method", *methods.values())
    return {kind: next(folder.glob(f"{name.partition(':')[0]}*")) for kind, name in methods.items()}


@pytest.mark.parametrize("kind", ["prefix", "attributes", "fusion", "concepts"])
def test_a_model_that_is_more_than_its_weights(kind, more_than_weights, tmp_path, capsys):
    """No file of another library holds it, its weights are not its own to start from, and only prefixes have statistics."""
    run = more_than_weights[kind]
    capsys.readouterr()
    assert main(["export", str(run), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"computes {kind!r} besides the weights" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    start = ["--pretrained", str(run), "--model", "tiny", "--dry-run", "--run-dir", str(tmp_path / "r")]
    assert main(["train", *TRAIN, *start]) == 2
    assert f"adds {kind!r}, which cannot start another run" in capsys.readouterr().err
    if kind != "prefix":
        assert main(["statistics", "fisher", str(run), "--out", str(tmp_path / "f.safetensors")]) == 2
        assert f"computes {kind!r} besides the weights" in capsys.readouterr().err


def test_what_cannot_be_exported(runs, vit, tmp_path, capsys):
    cases = [
        (runs / "cmm-seed0", "open_clip", "computes 'linearised' besides the weights"),
        (runs / "finetune-seed0", "timm", "use --format open_clip"),
        (vit, "open_clip", "use --format timm"),
        (tmp_path, "hf", "no model.safetensors there"),
    ]
    for model, kind, message in cases:
        assert main(["export", str(model), "--format", kind, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["timm", "hf", "open_clip"])
def test_export_replaces_nothing(kind, runs, vit, tmp_path, capsys):
    """Neither the files of a run nor those of an earlier export; nothing is written then."""
    source, out = {
        "timm": (vit, vit),  # has a model.safetensors
        "hf": (vit, vit.parent),  # has a config.json
        "open_clip": (runs / "finetune-seed0", tmp_path),
    }[kind]
    folder = tmp_path if kind == "open_clip" else vit.parent
    if kind == "open_clip":
        exported(capsys, source, kind, out)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["export", str(source), "--format", kind, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "exists already; choose another folder" in error and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_commands_are_listed_and_named(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in text
        assert main([command, "--help"]) == 0
        assert "usage: fastmerge" in capsys.readouterr().out
    assert main(["evalute", "x"]) == 2
    assert "unknown command 'evalute'. Did you mean: evaluate?" in capsys.readouterr().err
