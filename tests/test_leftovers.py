"""A run folder that something happened to: it is repaired with a warning where nothing is lost, or refused in one line."""

import json
import os
import shutil
import stat

import pytest
import torch
from image_trees import image_folder
from safetensors.torch import load_file, save_file
from toy import CONCEPTS

from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.results import finished, folder_name, read_run
from fastmerge.runfolder import Record, RunFolder, StopRequest

FLAGS = (
    "--dataset folder --model tiny --pretrained none --head prototype --tasks 2 --method finetune --no-nearest-mean"
    " --epochs 2 --batch-size 4 --lr 1e-3 --device cpu"
).split()


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """An unusual umask."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=4, test=2)


def go(data, run_dir, *flags):
    return main([*FLAGS, "--data-root", str(data), "--run-dir", str(run_dir), *flags])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A finished run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert go(data, run_dir) == 0
    return run_dir


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run that a signal stopped in its second task, with two checkpoints."""
    run_dir, original = tmp_path_factory.mktemp("stopped") / "run", Record.log

    def log(self, about, terms):
        original(self, about, terms)
        if (about["task"], about["step"]) == (1, 2):
            StopRequest.signal = 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "log", log)
        assert go(data, run_dir, "--save-every", "0") == 130
    return run_dir


def model(run_dir):
    return {k: v.numpy().tobytes() for k, v in load_file(run_dir / "finetune-seed0" / "model.safetensors").items()}


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "finetune-seed0" / "metrics.jsonl").read_text().splitlines()]


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one bit": flip_last_byte,
    "another program's": lambda path: save_file({"x": torch.ones(2)}, path),
    "another run's": lambda path: save_file(load_file(path), path, {"about": '{"run": "x", "state": {}}'}),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(kind, data, whole, stopped, tmp_path, capsys):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    newest = run_dir / "finetune-seed0" / "checkpoint.safetensors"
    DAMAGE[kind](newest)
    assert go(data, run_dir) == 0
    out = capsys.readouterr().out
    assert "continues at task 2, step 2" in out  # the newest one was at step 3
    if kind != "gone":  # as a kill between two renames leaves it: not a fault
        assert "continues from the checkpoint before it" in " ".join(out.split())
        assert newest.with_name("checkpoint.safetensors.damaged").exists()
    assert model(run_dir) == model(whole) and lines(run_dir) == lines(whole)
    assert not list(run_dir.glob("*/checkpoint*.safetensors"))


def test_two_damaged_checkpoints(data, stopped, tmp_path, capsys):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    both = sorted((run_dir / "finetune-seed0").glob("checkpoint*"))
    assert len(both) == 2
    for path in both:
        os.truncate(path, 1000)
    assert go(data, run_dir) == 2
    error = capsys.readouterr().err
    assert all(str(path) in error for path in both) and "Delete" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("left", [0, 1, 100, None], ids=str)
def test_cut_metrics(left, data, whole, stopped, tmp_path, capsys):
    """The lost lines are said, never filled with NUL bytes, and the run goes on."""
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    path = run_dir / "finetune-seed0" / "metrics.jsonl"
    before = path.read_bytes()
    path.unlink() if left is None else os.truncate(path, left)
    assert go(data, run_dir) == 0
    assert f"of {len(before)} bytes are left" in " ".join(capsys.readouterr().out.split())
    kept = before[: left or 0].count(b"\n")
    assert lines(run_dir) == lines(whole)[:kept] + lines(whole)[before.count(b"\n") :]
    assert model(run_dir) == model(whole)


@pytest.mark.parametrize("name", "config.json environment.json manifest.json results.json".split())
def test_a_folder_where_a_file_should_be(name, data, stopped, tmp_path, capsys):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).mkdir()
    assert go(data, run_dir) == 2
    assert f"{run_dir / name} is a folder; expected a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", "metrics.jsonl accuracy.csv model result checkpoint checkpoint-before".split())
def test_a_folder_in_a_run(name, tmp_path):
    suffix = "" if "." in name else ".json" if name == "result" else ".safetensors"
    (tmp_path / (name + suffix)).mkdir()
    with pytest.raises(UserError, match=rf"{name + suffix} is a folder; expected a file"):
        Record(tmp_path, 60, "", print)


@pytest.mark.parametrize("name", ["finetune-seed0", "trajectory-seed0", "plots"])
def test_a_file_where_a_folder_should_be(name, data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    assert go(data, tmp_path / "run") == 2
    assert f"{tmp_path / 'run' / name} is a file; expected a folder" in capsys.readouterr().err


SHAPES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "NUL bytes": lambda text: "\0" * len(text),
    "list": lambda text: "[]",
    "object": lambda text: "{}",
    "other name": lambda text: text.replace("final_accuracy", "final"),
    "text": lambda text: text.replace('"plasticity": ', '"plasticity": "x", "p": '),
    "other kind": lambda text: text.replace('"kept_bytes": [', '"kept_bytes": [null], "k": ['),
    "flat": lambda text: text.replace('"accuracy_matrix": [', '"accuracy_matrix": [1, 2], "a": ['),
    "no matrix": lambda text: text.replace('"accuracy_matrix": [', '"accuracy_matrix": [], "a": ['),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_results_of_another_shape(shape, whole, tmp_path):
    old = (whole / "finetune-seed0" / "result.json").read_text()
    (tmp_path / "finetune-seed0").mkdir()
    path = tmp_path / "finetune-seed0" / "result.json"
    path.write_text(SHAPES[shape](old))
    with pytest.raises(UserError, match=r"finetune-seed0.result\.json") as raised:
        Record(path.parent, 60, "", print).finished()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("shape", ["half", "list", "object"])
def test_a_manifest_of_another_shape(shape, data, whole, tmp_path, capsys):
    path = shutil.copytree(whole, tmp_path / "run") / "manifest.json"
    path.write_text(SHAPES[shape](path.read_text()))
    assert go(data, tmp_path / "run") == 2
    assert str(path) in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


def test_a_result_without_its_model_is_kept(data, whole, tmp_path, capsys):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    (run_dir / "finetune-seed0" / "model.safetensors").unlink()
    assert go(data, run_dir) == 0
    assert "has results, but no model.safetensors" in " ".join(capsys.readouterr().out.split())
    assert finished(run_dir) == finished(whole)


def test_results_cover_the_folder(data, whole, tmp_path, capsys):
    """A later command with another method and seed: its results are joined with those of the earlier one."""
    run_dir = shutil.copytree(whole, tmp_path / "run")
    assert go(data, run_dir, "--method", "average", "--seeds", "1") == 0
    first, second = read_run(run_dir)[0], read_run(whole)[0]
    assert list(first) == ["average-strict", "finetune"] and first["finetune"] == second["finetune"]
    joined = json.loads((run_dir / "results.json").read_text())
    assert {m: set(seeds) for m, seeds in joined["methods"].items()} == {"average-strict": {"1"}, "finetune": {"0"}}
    assert set(joined["summary"]) == set(joined["methods"])
    markdown, table = (run_dir / "results.md").read_text(), capsys.readouterr().out
    assert all("average-strict" in text and "finetune" in text for text in (markdown, table))
    assert (
        first["average-strict"]["1"]["bytes_written"]
        > (run_dir / "average-strict-seed1/model.safetensors").stat().st_size
    )
    (run_dir / "notes-seed0").mkdir()
    (run_dir / "average-strict-seed1" / "result.json").write_text("[]")
    with pytest.raises(UserError, match=r"average-strict-seed1.result\.json: expected an object"):
        finished(run_dir)
    assert go(data, run_dir) == 2  # told before anything is trained, also where this command does not name the run


def opened(folder, lr, weight=1.0):
    """The folder as a command with these settings opens it."""
    versions = {"fastmerge": "1", "gpu": None, "cuda": None, "versions": {}}
    runs = {f"trm-seed{seed}": {"trm.weight": weight} for seed in (0, 1)}
    determined = {"settings": {"training.lr": lr}, "contents": {"images": "x"}, "runs": runs}
    return RunFolder(parse(["--run-dir", str(folder)]), versions, {}, determined, print)


@pytest.mark.parametrize("settings", [(0.2, 1.0), (0.1, 2.0)], ids=["of all runs", "of the method"])
def test_a_command_that_another_one_overtook(settings, tmp_path):
    """Both opened a new folder; the manifest is the second one's, so the first may not train under it."""
    first, second = opened(tmp_path, 0.1), opened(tmp_path, *settings)
    with pytest.raises(UserError, match=r"another one began there with other settings:\n.*(lr: 0.2|weight: 2.0)"):
        first.claim("trm-seed0")
    assert not (tmp_path / "trm-seed0").exists() and second.claim("trm-seed0") == "claimed"
    (tmp_path / "trm-seed1").mkdir()
    (tmp_path / "trm-seed1" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="other settings"):
        first.claim("trm-seed1")  # its results are not the first one's
    third = opened(tmp_path, *settings)
    assert third.claim("trm-seed1") == "finished" and third.claim("trm-seed0") == "busy"
    second.leave()


def test_any_label_names_a_folder():
    """Names are different, are possible everywhere, and give the label back."""
    labels = ["trm", "a/b", "a%2Fb", "a\\b", "a:b*", "a\nb", "e" * 400, "e" * 401, "\u00e9" * 300, "x/" * 300, "\udcff"]
    names = [folder_name(label, 3) for label in labels]
    assert names[0] == "trm-seed3" and len(set(names)) == len(names)
    for name in names:
        assert not set(name) & set('/\\:*?"<>|\n') and len(os.fsencode(name)) < 230


def test_a_setting_with_slashes(data, tmp_path, capsys):
    """Its value is in the tables as it is, also in those of later commands, and the folder has none."""
    (tmp_path / "texts").mkdir()
    concepts = tmp_path / "texts" / "c.json"
    concepts.write_bytes(CONCEPTS.read_bytes())
    flags = [word for word in FLAGS if word not in ("--head", "prototype")]
    spec = f"clg-cbm:concepts={concepts}"
    words = [*flags, "--data-root", str(data), "--run-dir", str(tmp_path / "run"), "--method", spec]
    label = f"clg-cbm(concepts={concepts})"
    assert main(words) == 0 and "already finished" not in capsys.readouterr().out
    assert main(words) == 0 and "already finished" in capsys.readouterr().out
    assert list(read_run(tmp_path / "run")[0]) == [label]
    assert [p.name for p in (tmp_path / "run").glob("clg-cbm*")] == [folder_name(label, 0)]
    assert main(["evaluate", str(tmp_path / "run" / folder_name(label, 0))]) == 0
    assert main([*words, "--method", "finetune", "--continue-from", str(tmp_path / "run"), "--dry-run"]) == 2
    assert f"no finished run finetune-seed0 there; there are: {folder_name(label, 0)}" in capsys.readouterr().err


def test_files_have_the_mode_of_the_umask(whole, stopped):
    modes = {p: stat.S_IMODE(p.stat().st_mode) for run in (whole, stopped) for p in run.rglob("*") if p.is_file()}
    assert len(modes) > 12 and set(modes.values()) == {0o640}


def test_traffic_of_short_tasks(data, whole, stopped, tmp_path):
    """Tasks that are sooner repeated than saved leave no checkpoints, and each number is stored once."""
    folder = whole / "finetune-seed0"
    size = (folder / "model.safetensors").stat().st_size
    assert size < read_run(whole)[0]["finetune"]["0"]["bytes_written"] < 1.1 * size
    rows = [line for line in lines(whole) if line["phase"] == "evaluate"]
    assert [set(row) for row in rows] == [{"task", "phase", "seen_accuracy"}] * 2

    run_dir = shutil.copytree(stopped, tmp_path / "run")
    checkpoint = (run_dir / "finetune-seed0" / "checkpoint.safetensors").stat().st_size
    assert go(data, run_dir) == 0
    saved = 4 + 2 + 1 + 3  # --save-every 0: after the steps, phases and evaluation of task 1, and three steps of task 2
    assert read_run(run_dir)[0]["finetune"]["0"]["bytes_written"] > 0.5 * saved * checkpoint  # some are smaller
