"""The saved model is the model of the table: loading it gives the accuracy that the run reported."""

import copy
import io
import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from image_trees import image_folder
from PIL import Image
from toy import CONCEPTS

import fastmerge
from fastmerge.__main__ import main
from fastmerge.data import load_dataset
from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.merging import RULES
from fastmerge.methods import METHODS
from fastmerge.models import load_backbone
from fastmerge.models.adapter import ClipAdapter
from fastmerge.models.heads import TextHead
from fastmerge.models.prompt_pools import L2PPool
from fastmerge.models.saved import Model

QUICK = (
    "--epochs 1 --merge-epochs 1 --batch-size 16 --lr 1e-3 --device cpu --quiet --no-nearest-mean --dataset folder --tasks 2"
).split()
PROTOCOLS = ["--protocol", "full", "strict"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=2, test=5)


def run(folder, data, *flags):
    assert main([*QUICK, "--data-root", str(data), "--run-dir", str(folder), *map(str, flags)]) == 0
    return json.loads((folder / "results.json").read_text())["methods"]


def score(model, data, size):
    """Accuracy in percent on the test images, in batches of 16 as in the run."""
    test = load_dataset("folder", str(data), download=False, skip_bad_images=False, split_file=None).test
    pixels, _ = test.read(np.arange(len(test)), size, torch.device("cpu"))
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in pixels.split(16)])
    return 100 * float((predicted == torch.from_numpy(test.labels)).double().mean())


def check_all(folder, results, data):
    assert results
    for label, seeds in results.items():
        model = fastmerge.load(folder / f"{label}-seed0")
        reported = seeds["0"]["final_accuracy"]
        assert model.recipe["final_accuracy"] == reported
        assert score(model, data, model.backbone.image_size) == pytest.approx(reported, abs=1e-9), label


FEW = ["--clg-cbm.concepts", str(CONCEPTS), "--attriclip.bank", "5", "--attriclip.top", "2"]  # 120 sets take a minute
CASES = {  # which methods, with which flags
    "text": (list(METHODS), ["--model", "tiny", "--head", "text", *FEW]),
    "linear": (["cmm", "ewc"], ["--model", "tiny", "--head", "linear"]),
    "prototype": (["trm"], ["--model", "tiny", "--pretrained", "none", "--head", "prototype"]),
    "lora": (["magmax"], [*PROTOCOLS, "--model", "tiny", "--lora-rank", "2"]),
    "prefix": (["fisher", "finetune"], [*PROTOCOLS, "--model", "tiny", "--head", "text", "--prompt-length", "2"]),
    "timm": (["cmm", "pam"], ["--model", "test_vit", "--pretrained", "none", "--pam.rank", "2"]),
    "all classes": (["trm"], ["--model", "tiny", "--eval-classes", "all", "--head", "linear"]),
}


@pytest.mark.parametrize("case", [*CASES, pytest.param("protocols", marks=pytest.mark.slow)])
def test_the_loaded_model_scores_what_the_table_says(case, data, tmp_path):
    methods, flags = CASES[case] if case in CASES else (list(RULES), [*PROTOCOLS, "--model", "tiny", "--head", "text"])
    results = run(tmp_path / "r", data, "--method", *methods, *flags)
    check_all(tmp_path / "r", results, data)


def test_an_open_clip_model(data, tmp_path, monkeypatch):
    """With another mean and std than the architecture's, from a file."""
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
    (tmp_path / "mini.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "mini.json")
    flags = ["--model", "mini", "--pretrained", "none", "--head", "text", "--method", "trm", "cmm"]
    check_all(tmp_path / "r", run(tmp_path / "r", data, *flags), data)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r"
    run(folder, data, "--method", "trm", "cmm", "--model", "tiny", "--head", "text")
    return folder


def test_predictions(finished, data):
    model = fastmerge.load(finished / "trm-seed0")
    assert model.class_names == [f"colour {c}" for c in range(4)] and not model.training
    files = sorted((data / "test").rglob("*.jpg"))
    names, probabilities = model.predict([*files[:3], Image.open(files[3])], batch_size=3)
    assert probabilities.shape == (4, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    assert names == [model.class_names[i] for i in probabilities.argmax(1)]
    one, row = model.predict(str(files[0]))
    assert one == names[:1]
    torch.testing.assert_close(row, probabilities[:1], rtol=0, atol=1e-6)
    none, rows = model.predict([])
    assert none == [] and rows.shape == (0, 4)


@pytest.mark.parametrize("method", ["trm", "cmm"])
def test_images_of_every_kind(method, finished, data):
    model = fastmerge.load(finished / f"{method}-seed0")
    file = next((data / "test").rglob("*.jpg"))
    pixels = model.preprocess(file)[None]
    assert pixels.dtype == torch.uint8 and pixels.shape == (1, 3, 32, 32)
    logits = model(pixels)
    torch.testing.assert_close(model(pixels.float() / 255), logits)
    whole = torch.tensor(np.asarray(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]
    assert (model(whole).softmax(1) - logits.softmax(1)).abs().max() < 0.05  # resized here and not by Pillow
    wide = torch.cat([torch.zeros(1, 3, 32, 16), pixels / 255, torch.zeros(1, 3, 32, 16)], 3)
    torch.testing.assert_close(model(wide), logits)  # the centre square
    torch.testing.assert_close(model.double()(pixels.double() / 255), logits.double(), rtol=1e-4, atol=1e-4)
    for bad in (pixels[0], pixels[:, :2], pixels.int()):
        with pytest.raises(ValueError, match="images: expected"):
            model(bad)


def test_the_normalisation_of_the_run_is_used(finished, tmp_path):
    """The file's mean and std, whatever the architecture's own are."""
    from safetensors.torch import save_file

    tensors, about = fastmerge.models.saved.read(finished / "trm-seed0")
    about["input"]["mean"], about["input"]["std"] = [0.0, 0.1, 0.2], [1.0, 2.0, 4.0]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"about": json.dumps(about)})
    model = fastmerge.load(tmp_path)
    expected = torch.tensor([1.0, 0.45, 0.2])
    torch.testing.assert_close(model.normalised(torch.ones(1, 3, 32, 32))[0, :, 0, 0], expected)


def test_what_cannot_be_loaded(finished, data, tmp_path):
    with pytest.raises(UserError, match="has 2 models; choose one of .*cmm-seed0, .*trm-seed0"):
        fastmerge.load(finished)
    with pytest.raises(UserError, match="no model.safetensors there; expected the folder of a finished run"):
        fastmerge.load(tmp_path)
    for file in (data / "test" / "colour_0" / "0.jpg", finished / "config.json"):
        with pytest.raises(UserError, match="not the model of a finished run"):
            fastmerge.load(file)


def test_a_runs_model_starts_another_run(finished, data, tmp_path, capsys):
    """Before its first task the second run is the model of the first one: the zero-shot row says so."""
    before = json.loads((finished / "results.json").read_text())["methods"]
    for method, accuracy in (
        ("trm", before["trm"]["0"]["final_accuracy"]),
        ("cmm", before["cmm"]["0"]["also"]["plain"]["final_accuracy"]),  # a linearised model starts as a plain one
    ):
        start = ["--pretrained", finished / f"{method}-seed0", "--model", "tiny", "--method", "finetune"]
        run(tmp_path / method, data, *start)
        found = json.loads((tmp_path / method / "results.json").read_text())
        assert found["zero_shot"]["final_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    model = fastmerge.load(tmp_path / "trm" / "finetune-seed0")  # and the chain can be loaded and continued
    assert "trm-seed0" in model.recipe["starting_weights"]["source"]
    place = ["--data-root", str(data), "--run-dir", str(tmp_path / "r"), "--pretrained", str(finished / "trm-seed0")]
    assert main([*QUICK, *place, "--model", "test_vit"]) == 2
    assert "is a run of model tiny, not of test_vit: pass --model tiny" in capsys.readouterr().err


def test_a_folder_that_is_called_like_a_tag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glyphs").mkdir()
    assert not fastmerge.models.saved.is_run_model("glyphs")
    backbone, _ = load_backbone("tiny", "glyphs")
    assert backbone.weights == "embedded weights 'glyphs'"


def test_an_adapter_beside_the_backbone_starts_nothing(data, tmp_path, capsys):
    run(tmp_path / "a", data, "--method", "clip-adapter", "--model", "tiny")
    flags = ["--data-root", str(data), "--run-dir", str(tmp_path / "b"), "--pretrained", str(tmp_path / "a")]
    assert main([*QUICK, *flags, "--model", "tiny", "--method", "finetune"]) == 2
    assert "adds 'clip-adapter', which cannot start another run" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_models_of_every_task(data, tmp_path):
    """--keep-models and --keep-trajectory: every file loads, and scores its row of the accuracy matrix."""
    keep = ["--keep-models", "--keep-trajectory", "--model", "tiny", "--head", "linear"]
    results = run(tmp_path / "r", data, "--method", "average", "--protocol", "full", *keep)
    matrix = results["average-full"]["0"]["accuracy_matrix"]
    folder = tmp_path / "r" / "average-full-seed0"
    pixels = torch.rand(4, 3, 32, 32)
    last = fastmerge.load(folder)(pixels)
    first, second = (fastmerge.load(folder / "models" / f"task-{t}.safetensors") for t in (1, 2))
    assert torch.equal(second(pixels), last)
    learned = first.recipe["tasks"][0]["classes"]
    assert first.recipe["candidates"] == sorted(learned) and len(learned) == 2
    assert set(first(pixels).isfinite().any(0).nonzero().flatten().tolist()) == set(learned)
    test = load_dataset("folder", str(data), download=False, skip_bad_images=False, split_file=None).test
    rows = np.flatnonzero(np.isin(test.labels, learned))
    images, _ = test.read(rows, 32, torch.device("cpu"))
    hits = first(images).argmax(1).numpy() == test.labels[rows]
    assert 100 * hits.mean() == pytest.approx(matrix[0][0], abs=1e-9)
    trained = tmp_path / "r" / "trajectory-seed0"
    assert torch.equal(fastmerge.load(trained / "sequential-task-1.safetensors")(pixels), first(pixels))
    unmerged = fastmerge.load(trained / "sequential-task-2.safetensors")
    assert unmerged.recipe["method"] == "average-full, not merged"
    assert not torch.equal(unmerged(pixels), last)


def extra_tensors(kind, backbone):
    """What features of this kind need beside the backbone."""
    draw, d, width = torch.Generator().manual_seed(1), backbone.feature_dim, backbone.width
    if kind == "backbone":
        return {}
    if kind == "linearised":
        return {"initial": FlatModel(backbone).theta.detach() * 0.9}
    if kind == "clip-adapter":
        return dict(ClipAdapter(d, 4, 0.5, draw).state_dict())
    if kind == "linear-adapter":
        return {"weight": torch.randn(d, d, generator=draw)}
    if kind == "random-projection":
        return {"projection": torch.randn(d, 9, generator=draw)}
    if kind == "deep-tokens":
        return {"tokens": torch.randn(2, 3, width, generator=draw)}
    return dict(L2PPool.start(4, 2, width, d, 1, 0.1, False, draw).state_dict())


@pytest.mark.parametrize(
    "kind", ["backbone", "linearised", "clip-adapter", "linear-adapter", "random-projection", "deep-tokens", "l2p"]
)
def test_a_model_can_be_copied_pickled_and_given_other_weights(kind):
    """A copy has features of its own, computed with its own modules."""
    torch.manual_seed(0)
    backbone, _ = load_backbone("tiny", "glyphs")
    tensors = extra_tensors(kind, backbone)
    head = TextHead(torch.randn(3, 9 if kind == "random-projection" else backbone.feature_dim), 10.0)
    model = Model(backbone, head, tensors, {"class_names": list("abc"), "candidates": [0, 1, 2], "features": kind})
    images = torch.rand(2, 3, 32, 32)
    before = model(images).detach()
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    for other in (*copies, torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert torch.equal(other(images), before)
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.mul_(1.1) if tensor.is_floating_point() else None
        assert torch.equal(model(images), before)  # the copy shares nothing
        other._bind()  # from scratch
        wanted = other(images)
        assert not torch.allclose(wanted, before)
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(other.state_dict())
        torch.testing.assert_close(fresh(images), wanted)
        part = torch.nn.Sequential(copy.deepcopy(model))
        part.load_state_dict({f"0.{name}": tensor for name, tensor in other.state_dict().items()}, assign=True)
        torch.testing.assert_close(part(images), wanted)
