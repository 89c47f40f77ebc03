"""The command line end to end on small folders: the files that a run writes, and the errors for bad input."""

import gc
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_trees import image_folder, truncate, write_tree
from PIL import Image
from safetensors import safe_open

from fastmerge.__main__ import main
from fastmerge.evaluate import metrics

QUICK = (
    "--model tiny --pretrained none --epochs 1 --merge-epochs 1 --batch-size 16 --lr 1e-3 --device cpu --head prototype"
    " --no-nearest-mean"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=6, train=8, test=4)


def run(*flags):
    return main([*QUICK, *map(str, flags)])


def test_a_run_writes_everything(data, tmp_path, capsys, rendered):
    flags = ["--dataset", "folder", "--data-root", data, "--tasks", 3, "--method", "trm", "finetune", "--seeds", 0, 1]
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    assert run(*flags, "--nearest-mean", "--no-flip", "--run-dir", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert "class-incremental, 3 tasks with 3 x 2 classes" in out and "±" in out and "against plain fine-tuning" in out
    assert "against nearest-mean" in out and "flips off (--flip switches them on)" in out
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before  # user data never changes

    results = json.loads((tmp_path / "r" / "results.json").read_text())
    seeds = {method: list(its) for method, its in results["methods"].items()}
    assert seeds == {"trm": ["0", "1"], "finetune": ["0", "1"], "nearest-mean": ["0"]}
    for method, kept_models in (("trm", 1), ("finetune", 1)):
        for seed, result in results["methods"][method].items():
            matrix = result["accuracy_matrix"]
            assert [[r is not None for r in row] for row in matrix] == np.tri(3, dtype=bool).tolist()
            again = metrics(matrix, result["test_counts"])
            assert {k: result[k] for k in again} == again
            assert set(result["seconds"]) == {"train", "merge", "evaluate"} and result["seconds"]["train"] > 0
            assert len(result["kept_bytes"]) == 3 and result["peak_memory_bytes"] > 1e7
            folder = tmp_path / "r" / f"{method}-seed{seed}"
            assert not (folder / "checkpoint.safetensors").exists()
            with safe_open(folder / "model.safetensors", "pt") as file:
                recipe = json.loads(file.metadata()["about"])
                parameters = sum(file.get_tensor(k).numel() for k in file.keys() if k.startswith("backbone."))  # noqa: SIM118
            assert recipe["method"] == method and recipe["config"]["training"]["lr"] == 1e-3
            # theta and, for the prototype head, theta_init: kept bytes are constant over the tasks
            assert len(set(result["kept_bytes"])) == 1
            assert 0.9 < result["kept_bytes"][0] / (4 * parameters * (kept_models + 1)) < 1.1
            rows = (folder / "accuracy.csv").read_text().splitlines()
            assert len(rows) == 4 and rows[1].endswith(",,")
            steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert [s["task"] for s in steps if s["phase"] == "evaluate"] == [0, 1, 2]
            merges = [s for s in steps if s["phase"] == "merge"]
            assert bool(merges) == (method == "trm")
            assert all({"L_task", "L_pre", "gradient_energy", "alpha", "beta"} <= set(s) for s in merges)
    assert {p.name for p in (tmp_path / "r" / "plots").iterdir()} >= {"accuracy.png", "matrix-trm-seed0.png"}
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["tasks"]
    assert "fastmerge.load(" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "r" / "environment.json").read_text())[0]["versions"]["torch"]

    flags += ["--nearest-mean", "--no-flip", "--run-dir", tmp_path / "r", "--quiet"]
    assert run(*flags) == 0  # finished: shown again, nothing is trained
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == results
    text = capsys.readouterr().out
    assert "final acc" in text and "already finished" not in text


def test_same_seed_same_bits_other_seed_other_bits(data, tmp_path):
    def weights(name, seed):
        flags = ["--dataset", "folder", "--data-root", data, "--tasks", 2, "--method", "trm", "--quiet"]
        assert run(*flags, "--seeds", seed, "--run-dir", tmp_path / name) == 0
        with safe_open(tmp_path / name / f"trm-seed{seed}" / "model.safetensors", "pt") as file:
            return torch.cat([file.get_tensor(k).flatten().float() for k in sorted(file.keys())])

    a, b, c = weights("a", 0), weights("b", 0), weights("c", 1)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_domain_incremental(tmp_path):
    write_tree(
        tmp_path / "d", *(f"{d}/{p}/c{c}" for d in ("day", "night") for p in ("train", "test") for c in range(3))
    )
    flags = ["--dataset", "folder", "--data-root", tmp_path / "d", "--scenario", "dil", "--method", "trm"]
    assert run(*flags, "--run-dir", tmp_path / "r", "--quiet") == 0
    matrix = json.loads((tmp_path / "r" / "results.json").read_text())["methods"]["trm"]["0"]["accuracy_matrix"]
    assert np.array(matrix, dtype=float).shape == (2, 2)  # every domain is evaluated after every task


@pytest.mark.parametrize("head", ["linear", "text"])
def test_other_heads(data, tmp_path, head):
    flags = ["--dataset", "folder", "--data-root", data, "--tasks", 2, "--method", "trm", "--quiet"]
    assert main([*QUICK, "--head", head, *map(str, flags), "--run-dir", str(tmp_path / "r")]) == 0
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert (results["zero_shot"] is not None) == (head == "text")


def bad(capsys, *flags):
    """Run a command that must exit with code 2; return its error output."""
    assert run(*flags) == 2
    return capsys.readouterr().err


def test_bad_names(capsys, tmp_path):
    r = ("--run-dir", tmp_path / "r")
    assert "Did you mean: glyphs" in bad(capsys, "--dataset", "glyph", *r)
    assert "Did you mean: finetune" in bad(capsys, "--method", "fintune", *r)
    text = bad(capsys, "--model", "ViT-B-61", "--pretrained", "openai", *r)
    assert "ViT-B-61" in text and "ViT-B-16" in text
    text = bad(capsys, "--model", "ViT-B-16-quickgelu", "--pretrained", "openai", *r)
    assert "--download" in text and "--model tiny" in text
    assert not (tmp_path / "r").exists()  # no run folder is created


def test_bad_data(capsys, tmp_path, data):
    folder = ("--dataset", "folder", "--run-dir", tmp_path / "r", "--data-root")
    text = bad(capsys, *folder, tmp_path / "missing")
    assert str(tmp_path / "missing") in text and "--data-root" in text
    text = bad(capsys, *folder, data, "--tasks", 7)
    assert "--tasks 7" in text and "6 classes" in text
    empty = image_folder(tmp_path / "empty", classes=3, train=2, test=2)
    (empty / "train" / "colour_9").mkdir()
    assert "colour_9" in bad(capsys, *folder, empty, "--tasks", 2)


def test_bad_images(capsys, tmp_path):
    root = image_folder(tmp_path / "bad", classes=4, train=4, test=2)
    truncate(root / "train" / "colour_1" / "2.jpg")
    flags = ("--dataset", "folder", "--data-root", root, "--tasks", 2, "--method", "finetune", "--quiet")
    text = bad(capsys, *flags, "--run-dir", tmp_path / "r")
    assert "colour_1" in text and "2.jpg" in text and "--skip-bad-images" in text
    assert run(*flags, "--skip-bad-images", "--run-dir", tmp_path / "s") == 0
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert results["methods"]["finetune"]["0"]["bad_images"] == 1


def test_non_finite_loss(capsys, tmp_path, data):
    flags = ("--dataset", "folder", "--data-root", data, "--tasks", 2, "--method", "finetune", "--quiet")
    text = bad(capsys, *flags, "--lr", "1e30", "--clip", "0", "--epochs", 8, "--run-dir", tmp_path / "r")
    assert "loss became nan" in text and "task 0" in text and "step" in text and "checkpoint there is valid" in text
    assert not (tmp_path / "r" / "finetune-seed0" / "result.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_unwritable_run_folder(capsys, tmp_path, data):
    (tmp_path / "locked").mkdir(mode=0o500)
    text = bad(capsys, "--dataset", "folder", "--data-root", data, "--run-dir", tmp_path / "locked" / "r")
    assert "cannot write there" in text and "--run-dir" in text


def test_run_folder_that_is_a_file(capsys, tmp_path, data):
    (tmp_path / "file").write_text("")
    text = bad(capsys, "--dataset", "folder", "--data-root", data, "--tasks", 2, "--run-dir", tmp_path / "file")
    assert "cannot write there" in text and "--run-dir" in text


def test_other_settings_in_the_same_folder(capsys, tmp_path, data):
    flags = ("--dataset", "folder", "--data-root", data, "--tasks", 2, "--method", "finetune", "--quiet")
    assert run(*flags, "--run-dir", tmp_path / "r") == 0
    text = bad(capsys, *flags, "--run-dir", tmp_path / "r", "--lr", "0.5")
    assert "training.lr: 0.001 -> 0.5" in text
    assert run(*flags, "--run-dir", tmp_path / "r", "--method", "trm") == 0  # adding a method is allowed


def test_changed_images_are_noticed(capsys, tmp_path):
    root = image_folder(tmp_path / "d", classes=4, train=4, test=2)
    flags = ("--dataset", "folder", "--data-root", root, "--tasks", 2, "--method", "finetune", "--quiet")
    assert run(*flags, "--run-dir", tmp_path / "r") == 0
    Image.new("RGB", (24, 24)).save(root / "train" / "colour_0" / "new.png")
    assert "list of images: sha256" in bad(capsys, *flags, "--run-dir", tmp_path / "r")


def test_two_processes_in_one_folder(capsys, tmp_path, data):
    """A process leaves a run to the one that works on it, and makes the others; if nothing is left, that is an error."""
    import fcntl

    flags = ("--dataset", "folder", "--data-root", data, "--tasks", 2, "--run-dir", tmp_path / "r", "--no-nearest-mean")
    assert run(*flags, "--method", "finetune") == 0
    (tmp_path / "r" / "finetune-seed0" / "result.json").unlink()
    folder = tmp_path / "r" / "trm-seed0"
    folder.mkdir()
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "other processes work on all of these runs: trm-seed0" in bad(capsys, *flags, "--method", "trm")
        assert run(*flags, "--method", "trm", "finetune") == 0
        text = capsys.readouterr().out
        assert "trm seed 0: another process works on it" in text and "not in this table yet: trm-seed0" in text
        assert not (folder / "result.json").exists() and not (tmp_path / "r" / "finetune-seed0" / ".lock").exists()
        assert "trm-seed0" in json.loads((tmp_path / "r" / "manifest.json").read_text())["determines"]["runs"]
        changed = bad(capsys, *flags, "--method", "trm", "finetune", "--lr", 1)  # what determines the other run counts
        assert "training.lr" in changed
    assert run(*flags, "--method", "trm", "finetune", "--quiet") == 0
    assert (folder / "result.json").exists()


def test_full_disk_while_saving(capsys, tmp_path, data, monkeypatch):
    """If the second checkpoint fails, the first stays intact, the message says so, and the same command continues."""
    from fastmerge import checkpoint

    original, count = checkpoint.save_file, [0]

    def full(tensors, path, metadata):
        count[0] += 1
        if count[0] == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    flags = (
        "--dataset",
        "folder",
        "--data-root",
        data,
        "--tasks",
        2,
        "--method",
        "trm",
        "--quiet",
        "--run-dir",
        tmp_path / "r",
        "--save-every",
        0,
    )
    text = bad(capsys, *flags)
    assert "No space left on device" in text and "unharmed" in text and "same command" in text
    assert not list((tmp_path / "r" / "trm-seed0").glob("*.part"))
    checkpoint.load_tensors(tmp_path / "r" / "trm-seed0" / "checkpoint.safetensors")
    assert run(*flags) == 0


@pytest.mark.parametrize(("error", "code"), [(RuntimeError, 1), (torch.OutOfMemoryError, 2)])
def test_an_unexpected_error_says_where_the_run_is_and_how_to_report_it(
    capsys, tmp_path, data, monkeypatch, error, code
):
    from fastmerge import evaluate

    flags = ("--dataset", "folder", "--data-root", data, "--tasks", 2, "--method", "finetune", "--quiet")
    flags = (*flags, "--run-dir", tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "positions", lambda *_: (_ for _ in ()).throw(error("no room")))
        assert run(*flags) == code
    text = capsys.readouterr().err
    assert "no room" in text and f"The run is saved in {tmp_path / 'r'}" in text and "same command" in text
    assert ("Traceback" in text) == ("Please report it" in text) == (code == 1)
    gc.collect()  # the frames hold the folder's lock
    assert run(*flags) == 0


def command(tail, **environment):
    """The exit codes of the command and of what reads from it, and what both wrote."""
    line = f"set -o pipefail; {sys.executable} -m fastmerge {tail}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_output_that_cannot_be_written(data, tmp_path):
    """A run goes on; help and a finished run answer without a traceback."""
    flags = [*QUICK, "--dataset", "folder", "--data-root", data, "--tasks", 2, "--run-dir", tmp_path / "r"]
    flags = " ".join(map(str, [*flags, "--method", "finetune"]))
    code, out, err = command(f"{flags} | head -n 1", PYTHONIOENCODING="latin-1")
    assert (code, len(out.splitlines()), err) == (0, 1, "")
    assert (tmp_path / "r" / "results.md").exists()
    code, _, err = command(f"{flags} > /dev/full")
    assert code == 2 and err.count("\n") == 1 and "No space left" in err and str(tmp_path / "r") in err
    assert command("--help-all | true")[::2] == (0, "")
    code, _, err = command("--help > /dev/full")
    assert code == 2 and err.count("\n") == 1 and "No space left" in err
