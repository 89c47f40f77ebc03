"""Sinks get the rows of metrics.jsonl, also over a stop; nothing is imported without its flag."""

import json
import subprocess
import sys
import types

import pytest
from image_trees import image_folder

from fastmerge import sinks
from fastmerge.__main__ import main
from fastmerge.runfolder import Interrupted, Record, StopRequest

FLAGS = (
    "--dataset folder --model tiny --pretrained none --head prototype --tasks 2 --epochs 2 --batch-size 8 --lr 1e-3"
    " --device cpu --method finetune --no-nearest-mean --quiet --save-every 1e9"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=8, test=4)


class FakeRun:
    def __init__(self, **about):
        self.about, self.rows, self.finished = about, [], False

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name that keeps what it gets."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.runs = []
    module.init = lambda **about: module.runs.append(FakeRun(**about)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_wandb_gets_every_row_also_of_a_run_that_was_stopped(data, tmp_path, wandb, monkeypatch):
    flags = [*FLAGS, "--wandb", "--data-root", str(data), "--run-dir", str(tmp_path / "r")]
    save = Record.save

    def stop_at_the_second_task(self, state, tensors):
        save(self, state, tensors)
        if state.task == 1:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Record, "save", stop_at_the_second_task)
        assert main(flags) == 130
    StopRequest.signal = None
    assert main(flags) == 0
    first, second = wandb.runs
    assert first.finished and second.finished
    about = dict(first.about)
    assert about == second.about and (about["name"], about["group"], about["resume"]) == (
        "finetune-seed0",
        "r",
        "allow",
    )
    assert about["config"]["training"]["lr"] == 1e-3
    told, written = dict(first.rows) | dict(second.rows), rows(tmp_path / "r" / "finetune-seed0")
    assert sorted(told) == list(range(len(written))) and len(first.rows) < len(written)
    for number, row in enumerate(written):
        assert told[number]["task"] == row["task"] + 1
        if row["phase"] == "train":
            assert told[number]["train/loss"] == row["loss"]
        else:
            assert told[number]["evaluate/seen_accuracy"] == row["seen_accuracy"]
            assert told[number]["evaluate/accuracy/task 1"] == row["accuracy"][0]
    assert main([*flags[:-1], str(tmp_path / "other")]) == 0
    assert wandb.runs[2].about["id"] != about["id"]  # another folder is another run


def test_a_sink_that_fails_does_not_end_the_run(data, tmp_path, wandb, capsys):
    flags = [*FLAGS, "--wandb", "--data-root", str(data), "--run-dir", str(tmp_path / "r")]

    def refuse(**about):
        raise RuntimeError("no login")

    made, wandb.init = wandb.init, refuse
    assert main(flags) == 2
    assert "--wandb: cannot begin (no login)" in capsys.readouterr().err
    wandb.init = made
    FakeRun.log, log = lambda *_, **__: 1 / 0, FakeRun.log
    try:
        assert main(flags) == 0
    finally:
        FakeRun.log = log
    assert capsys.readouterr().err.count("warning: --wandb stopped (division by zero); the run goes on") == 1


def test_tensorboard_has_the_scalars(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*FLAGS, "--tensorboard", "--data-root", str(data), "--run-dir", str(tmp_path / "r")]) == 0
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard" / "finetune-seed0")).Reload()
    written = rows(tmp_path / "r" / "finetune-seed0")
    losses = {number: row["loss"] for number, row in enumerate(written) if row["phase"] == "train"}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses)
    assert [e.value for e in events.Scalars("evaluate/seen_accuracy")] == pytest.approx(
        [row["seen_accuracy"] for row in written if row["phase"] == "evaluate"]
    )


@pytest.mark.parametrize("name", sinks.SINKS)
def test_a_package_that_is_missing_is_named_before_the_run(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda package: None)
    assert main([f"--{name}", "--run-dir", str(tmp_path / "r")]) == 2
    assert f"--{name}: the package {name} is not installed; pip install 'fastmerge[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_nothing_is_imported_without_its_flag():
    code = (
        "import sys, fastmerge.sinks, fastmerge.runfolder; print(sorted({'wandb', 'tensorboard'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
