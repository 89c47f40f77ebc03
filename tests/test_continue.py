"""`--continue-from`: a finished sequence goes on with new tasks."""

import csv
import json
import shutil
from argparse import Namespace

import pytest
import torch
from image_trees import image_folder, truncate, write_tree
from toy import CONCEPTS

import fastmerge
from fastmerge.__main__ import main
from fastmerge.checkpoint import load_tensors
from fastmerge.commands.evaluate import data_set
from fastmerge.flags import as_flags, read_flags, resolve
from fastmerge.methods import METHODS
from fastmerge.setup import prepared

QUICK = (
    "--epochs 1 --merge-epochs 1 --batch-size 16 --lr 1e-3 --device cpu --quiet --dataset folder --model tiny "
    "--class-order natural"
).split()
CONTINUE = ["--dataset", "folder", "--device", "cpu", "--quiet"]


def run(*flags):
    return main([*map(str, flags)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four classes, and the first and the last two of them."""
    root = tmp_path_factory.mktemp("data")
    every = image_folder(root / "every", classes=4, train=2, test=3)
    for part in ("train", "test"):
        for c in range(4):
            shutil.copytree(every / part / f"colour_{c}", root / ("old" if c < 2 else "new") / part / f"colour_{c}")
    return root


def text_rows(encoder, class_names, templates, key, **about):
    """A row for every class that depends on its name alone; the text tower's last bits depend on the whole batch."""
    rows = []
    for name in class_names:
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-7:], "little"))
        rows.append(torch.randn(128, generator=generator))
    return torch.nn.functional.normalize(torch.stack(rows))


def results(folder):
    return json.loads((folder / "results.json").read_text())


CASES = {
    "every method": (
        [m for m in METHODS if m != "joint"],
        ["--head", "text", "--protocol", "full", "running", "strict", "--clg-cbm.concepts", str(CONCEPTS)],
    ),
    "text": (["cmm", "pam", "ties"], ["--head", "text", "--protocol", "full"]),
    "prompts": (["coda", "dualprompt", "hide", "magmax:prompt_length=2"], ["--head", "text"]),
    "linear": (
        ["trm", "lwf", "magmax", "ranpac"],
        ["--head", "linear", "--protocol", "running", "--no-nearest-mean", "--ranpac.projection", "40"],
    ),
    "prototype": (["trm"], ["--head", "prototype"]),
    "input spaces": (["became", "inflora"], ["--head", "text"]),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "every method")) for c in CASES])
def test_two_runs_are_one(case, data, tmp_path, monkeypatch):
    """A run over two tasks, and one task and then another: the same bits and results, for all methods."""
    monkeypatch.setattr("fastmerge.models.heads.text_weights", text_rows)
    methods, own = CASES[case]
    flags = [*QUICK, "--method", *methods, *own]
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    assert run(*flags, "--tasks", 2, "--data-root", data / "every", "--run-dir", whole) == 0
    assert run(*flags, "--tasks", 1, "--data-root", data / "old", "--run-dir", first) == 0
    assert run("--continue-from", first, *CONTINUE, "--data-root", data / "new", "--run-dir", second) == 0
    one, two = results(whole), results(second)
    assert one["methods"].keys() == two["methods"].keys() and len(one["methods"]) >= len(methods)
    for label, seeds in one["methods"].items():
        name = f"{label}-seed0"
        expected, found = seeds["0"], two["methods"][label]["0"]
        for part in ("accuracy_matrix", "test_counts", "final_accuracy", "aaa", "forgetting"):
            assert found[part] == expected[part], (label, part)
        assert found["kept_bytes"][1] == expected["kept_bytes"][1]
        a, b = (load_tensors(folder / name / "model.safetensors")[0] for folder in (whole, second))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=0, msg=f"{label} {key}")
        assert fastmerge.load(second / name).class_names == fastmerge.load(whole / name).class_names
    assert one["zero_shot"] == two["zero_shot"]


@pytest.mark.parametrize("others", [[], ["finetune"]])
def test_learned_class_rows_do_not_become_the_text_head(others, data, tmp_path, monkeypatch):
    """The model before training has the rows of the templates, also where the first run by name learned its own."""
    monkeypatch.setattr("fastmerge.models.heads.text_weights", text_rows)
    flags = [*QUICK, "--head", "text", "--no-nearest-mean", "--method", "coop", *others, "--coop.tokens", 2]
    first = tmp_path / "first"
    assert run(*flags, "--tasks", 1, "--data-root", data / "old", "--run-dir", first) == 0
    setups, make = [], fastmerge.setup.Setup
    monkeypatch.setattr(fastmerge.setup, "Setup", lambda *a, **k: setups.append(make(*a, **k)) or setups[-1])
    assert run("--continue-from", first, *CONTINUE[:-1], "--data-root", data / "new", "--dry-run") == 0
    expected = text_rows(None, [f"colour {c}" for c in range(4)], (), "")
    torch.testing.assert_close(setups[0].head.weight, expected, rtol=0, atol=0)
    learned = load_tensors(first / "coop-seed0" / "model.safetensors")[0]["head.weight"]
    assert not torch.allclose(learned[:2], expected[:2], atol=0.1)


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """A finished run over the first two classes."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    flags = [*QUICK, "--head", "linear", "--method", "magmax", "--no-nearest-mean", "--tasks", 1]
    assert run(*flags, "--data-root", data / "old", "--run-dir", folder) == 0
    return folder


def test_a_chain_of_runs(first, data, tmp_path, capsys):
    """Months later again: three runs; a class that returns is the same class; the folder is named after what it continues."""
    second, third = tmp_path / "second", tmp_path / "third"
    ask = ["--continue-from", first, "--data-root", data / "new", "--device", "cpu", "--dry-run", "--epochs", 3]
    assert run(*ask, "--run-dir", second) == 0 and not second.exists()
    assert "to do: 12 training images in 3 steps" in capsys.readouterr().out  # of the new task alone
    assert run("--continue-from", first, *CONTINUE, "--data-root", data / "new", "--run-dir", second) == 0
    assert run("--continue-from", second, *CONTINUE, "--data-root", data / "every", "--run-dir", third) == 0
    result = results(third)["methods"]["magmax-strict"]["0"]
    assert [[value is not None for value in row] for row in result["accuracy_matrix"]] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert result["accuracy_matrix"][0][:1] == results(first)["methods"]["magmax-strict"]["0"]["accuracy_matrix"][0]
    assert result["test_counts"] == [6, 6, 12] and len(result["kept_bytes"]) == 3
    model = fastmerge.load(third / "magmax-strict-seed0")
    assert model.class_names == [f"colour {c}" for c in range(4)] and len(model.recipe["tasks"]) == 3
    config = json.loads((third / "config.json").read_text())
    assert config["training"]["lr"] == 1e-3 and config["scenario"]["tasks"] == 1
    capsys.readouterr()
    assert run("--config", third / "config.json") == 0  # the same command again: finished
    assert run("evaluate", third / "magmax-strict-seed0") == 0
    assert "24 test images" in capsys.readouterr().out


def test_a_sequence_is_evaluated_like_other_runs(data, tmp_path, capsys):
    """On the test images, also after --validation; with the flags that say which images may be missing."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = [*QUICK, "--head", "text", "--method", "finetune", "--no-nearest-mean", "--tasks", 1, "--validation", 0.5]
    assert run(*flags, "--data-root", shutil.copytree(data / "old", tmp_path / "old"), "--run-dir", first) == 0
    new = shutil.copytree(data / "new", tmp_path / "new")
    assert run("--continue-from", first, *CONTINUE, "--data-root", new, "--run-dir", second) == 0
    model = second / "finetune-seed0"
    assert json.loads((model / "result.json").read_text())["test_counts"] == [2, 2]  # of 8 training images
    capsys.readouterr()
    assert run("evaluate", model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader(open(found["files"][0])))
    assert len(rows) == found["images"] == 12 and all("test/" in row["image"] for row in rows)
    assert list(found["per_task"]) == ["task 1", "task 2"]
    config = fastmerge.load(model).recipe["config"]
    nothing = dict.fromkeys("dataset data_root split_file test_part class_names".split())
    held = data_set(Namespace(**nothing, download=False, skip_bad_images=False), config, held_out=True)  # merge --sweep
    scored = prepared(resolve(read_flags(as_flags(config, "the run"))))[1].dataset
    assert list(held.test.ids) == list(scored.test.ids) and len(held.test) == len(held.train) == 4
    truncate(next((tmp_path / "old" / "test" / "colour_0").iterdir()))
    assert run("evaluate", model) == 2
    assert "--skip-bad-images" in capsys.readouterr().err
    assert run("evaluate", model, "--skip-bad-images", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["bad_images"]) == (11, 1)
    for flag in ("--split-file", "--test-part", "--class-names"):
        assert run("evaluate", model, flag, "x") == 2
        assert f"error: {flag}: the model's run continues another" in capsys.readouterr().err


def test_a_stopped_run_goes_on(first, data, tmp_path, monkeypatch):
    flags = ["--continue-from", first, *CONTINUE, "--data-root", data / "new", "--save-every", 0]
    assert run(*flags, "--run-dir", tmp_path / "whole") == 0
    finish = fastmerge.training.Train.finish

    def fail(phase):
        finish(phase)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fastmerge.training.Train, "finish", fail)
        assert run(*flags, "--run-dir", tmp_path / "r") == 130
    assert run(*flags, "--run-dir", tmp_path / "r") == 0
    a, b = (load_tensors(tmp_path / r / "magmax-strict-seed0" / "model.safetensors")[0] for r in ("whole", "r"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=0)


def test_domains(tmp_path):
    """A new domain follows; a domain of the same name gets a number, and a class that is new there a row."""
    flags = [*QUICK[:-2], "--scenario", "dil", "--head", "linear", "--method", "finetune", "--no-nearest-mean"]
    for part in ("train", "test"):
        write_tree(tmp_path / "old" / part, "paint/cat", "paint/dog", "photo/cat", "photo/dog")
        write_tree(tmp_path / "new" / part, "photo/cat", "photo/owl")
    assert run(*flags, "--data-root", tmp_path / "old", "--run-dir", tmp_path / "first") == 0
    then = ["--continue-from", tmp_path / "first", *CONTINUE, "--data-root", tmp_path / "new"]
    assert run(*then, "--run-dir", tmp_path / "second") == 0
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert [task["name"] for task in manifest["tasks"]] == ["paint", "photo", "photo 2"]
    assert manifest["tasks"][2]["classes"] == ["cat", "dog", "owl"]
    matrix = results(tmp_path / "second")["methods"]["finetune"]["0"]["accuracy_matrix"]
    assert [[value is not None for value in row] for row in matrix] == [[True, True, False]] * 2 + [[True] * 3]


def test_refusals(first, data, tmp_path, capsys):
    """Every refusal is one line, and leaves no folder."""

    def error(*flags, source=first):
        capsys.readouterr()
        assert run("--continue-from", source, "--device", "cpu", "--run-dir", tmp_path / "r", *flags) == 2
        assert not (tmp_path / "r" / "manifest.json").exists()
        return capsys.readouterr().err

    new = ["--data-root", data / "new"]
    assert "say where the new tasks are" in error()
    assert "config.json of a run" in error(*new, source=tmp_path)
    assert "no finished run trm-seed0 there; there are: magmax-strict-seed0" in error(*new, "--method", "trm")
    assert "magmax-strict-seed1" in error(*new, "--seeds", 1)
    assert "joint trains all tasks at once" in error(*new, "--method", "joint")
    assert "model.head: 'linear' -> 'text'" in error(*new, "--head", "text")
    assert "magmax.scale: 0.5 -> 0.4" in error(*new, "--magmax.scale", 0.4)
    assert "has one kind of tasks" in error(*new, "--scenario", "dil")

    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    (copy / "magmax-strict-seed0" / "state.safetensors").unlink()
    assert "what the method continues with is missing" in error(*new, source=copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["data_root"] = str(data / "every")
    (copy / "config.json").write_text(json.dumps(config))
    assert "the data of its tasks changed" in error(*new, source=copy)
    config["data"]["data_root"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    assert "the accuracy on them is measured again" in error(*new, source=copy)
