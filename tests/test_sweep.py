"""`train --sweep`: what is tried, what is chosen, and that both stages are the ordinary runs that a user would start."""

import csv
import json

import pytest

from fastmerge.__main__ import main
from fastmerge.commands.sweep import read_grid, table_of
from fastmerge.errors import UserError
from fastmerge.flags import parse

FAST = ["--tasks", "2", "--epochs", "1", "--top-classes", "4", "--device", "cpu", "--quiet", "--no-nearest-mean"]


def grid(*words, methods=("trm",), more=()):
    return read_grid(parse(["--method", *methods, "--sweep", *words, *more]))


def test_the_grid_is_the_product_of_what_each_method_reads():
    found = grid("trm.lambda1=0.01,1", "lr=1e-4,1e-3", methods=["trm:merge_epochs=2", "average", "nearest-mean"])
    assert [c.spec for c in found["trm:merge_epochs=2"]] == [
        "trm:merge_epochs=2,lambda1=0.01,training.lr=1e-4",
        "trm:merge_epochs=2,lambda1=0.01,training.lr=1e-3",
        "trm:merge_epochs=2,lambda1=1,training.lr=1e-4",
        "trm:merge_epochs=2,lambda1=1,training.lr=1e-3",
    ]  # trm has an lr of its own
    assert [(c.spec, c.label) for c in found["average"]] == [
        ("average:lr=1e-4", "average-strict(lr=1e-4)"),
        ("average:lr=1e-3", "average-strict(lr=1e-3)"),
    ]
    (alone,) = found["nearest-mean"]
    assert (alone.spec, alone.point) == ("nearest-mean", {})
    assert found["average"][1].point == {"training.lr": "1e-3"}


@pytest.mark.parametrize(
    ("words", "methods", "message"),
    [
        (["trm.lambda1"], ["trm"], r"--sweep 'trm.lambda1': expected SETTING=VALUE,VALUE"),
        (["trm.lambda1=0.1,"], ["trm"], "expected SETTING=VALUE,VALUE"),
        (["trm.lamda1=0.1,1"], ["trm"], "--sweep trm.lamda1: no such setting. Did you mean: trm.lambda1"),
        (["trm.lambda1=0.1,much"], ["trm"], "trm.lambda1 much: expected a number"),
        (["trm.replace=none,anchord"], ["trm"], "expected anchored .* Did you mean: anchored"),
        (["ties.density=0.1,2"], ["ties"], "--ties.density 2.0: expected above 0"),
        (["ties.density=0.1,0.2"], ["trm"], "--sweep ties.density: none of trm reads it"),
        (["trm.lambda1=0.1,0.1"], ["trm"], "0.1 is given twice"),
        (["trm.lambda1=0.1,1", "trm.lambda1=2,3"], ["trm"], "trm.lambda1 is given twice"),
        (["trm.lambda1=0.1,1"], ["trm:lambda1=2"], "lambda1 is given twice"),
        (["trm.lambda1=0.1"], ["trm"], "a single candidate; expected two values or more"),
        (["tasks=2,5"], ["trm"], "--sweep tasks: none of trm reads it"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(words, methods, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message):
        grid(*words, methods=methods)
    assert main(["--method", *methods, "--sweep", *words, "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--protocol", "full", "strict", "--method", "average"], "expected one --protocol"),
        (["--continue-from", "x", "--dataset", "glyphs"], "--continue-from"),
    ],
)
def test_what_a_sweep_cannot_be_combined_with(more, message, capsys):
    assert main(["--sweep", "lr=1e-4,1e-3", *more]) == 2
    assert message in capsys.readouterr().err


def test_the_best_on_held_out_images_is_the_first_of_equal_ones(tmp_path):
    config = parse(
        ["--method", "finetune", "trm", "--sweep", "lr=1,2,3", "--seeds", "0", "1", "--run-dir", str(tmp_path)]
    )
    found = read_grid(config)
    scores = {"finetune(lr=1)": (50, 60), "finetune(lr=2)": (58, 54), "finetune(lr=3)": (40, 72)}
    scores |= {"trm(training.lr=1)": (1, 2), "trm(training.lr=2)": (3, 4), "trm(training.lr=3)": (4, 3)}
    result = dict.fromkeys(("final_accuracy_macro", "aaa", "aaa_macro", "forgetting", "bwt", "plasticity"))
    result |= {"accuracy_matrix": [[1.0]], "test_counts": [1], "kept_bytes": [1], "peak_memory_bytes": 1}
    result["seconds"] = dict.fromkeys(("train", "merge", "evaluate"), 0.0)
    for label, values in scores.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"validation/{label}-seed{seed}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result | {"final_accuracy": value}))
    table, best = table_of(config, found)
    assert [c.spec for c in best] == ["finetune:lr=2", "trm:training.lr=2"]
    assert table[0] == ["method", "lr", "seeds", "held-out acc", "chosen"]
    assert table[1:4] == [
        ["finetune", "1", "2", "55.0 ± 7.1", ""],
        ["finetune", "2", "2", "56.0 ± 2.8", "best"],
        ["finetune", "3", "2", "56.0 ± 22.6", ""],
    ]
    assert [row[-1] for row in table[4:]] == ["", "best", ""]
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match=r"trm\(training.lr=3\) is not finished"):
        table_of(config, found)


def model(folder):
    return (folder / "model.safetensors").read_bytes()


def test_both_stages_are_runs_that_a_user_would_start(tmp_path, capsys):
    swept, plain = tmp_path / "swept", tmp_path / "plain"
    command = [*FAST, "--method", "average", "nearest-mean", "--sweep", "lr=1e-6,1e-2", "--run-dir", str(swept)]
    assert main([*command, "--dry-run"]) == 0 and not swept.exists()
    assert main(command) == 0
    out = capsys.readouterr().out
    rows = list(csv.reader((swept / "sweep.csv").open()))
    assert [row[:3] for row in rows] == [
        ["method", "lr", "seeds"], ["average-strict", "1e-6", "1"], ["average-strict", "1e-2", "1"],
    ]  # fmt: skip
    assert [row[-1] for row in rows].count("best") == 1
    (chosen,) = [row[1] for row in rows if row[-1] == "best"]
    assert "held-out acc" in out and "final acc" in out

    assert main([*FAST, "--method", f"average:lr={chosen}", "--run-dir", str(plain)]) == 0
    name = f"average-strict(lr={chosen})-seed0"
    assert (
        json.loads((swept / name / "result.json").read_text())["accuracy_matrix"]
        == (json.loads((plain / name / "result.json").read_text())["accuracy_matrix"])
    )
    assert {path.name for path in swept.glob("*-seed*")} == {name, "nearest-mean-seed0"}
    held = {path.name for path in (swept / "validation").glob("*-seed*")}
    assert held == {"average-strict(lr=1e-6)-seed0", "average-strict(lr=1e-2)-seed0"}
    used = json.loads((swept / "validation/config.json").read_text())
    assert used["scenario"]["validation"] == 0.2 and used["run"]["sweep"] == []
    assert json.loads((swept / "config.json").read_text())["scenario"]["validation"] == 0.0


def test_a_folder_of_other_runs_is_refused_before_the_first_stage(tmp_path, capsys):
    folder = ["--run-dir", str(tmp_path)]
    assert main([*FAST, "--method", "finetune", "--validation", "0.5", *folder]) == 0
    assert main([*FAST, "--method", "finetune", "--sweep", "lr=1e-6,1e-2", *folder]) == 2
    assert "scenario.validation: 0.5 -> 0.0" in capsys.readouterr().err
    assert not (tmp_path / "validation").exists()
    assert main([*FAST, "--method", "finetune", "--dry-run", *folder]) == 2  # that is why


def test_a_stopped_sweep_goes_on(tmp_path, monkeypatch):
    import fastmerge.loop
    from fastmerge.runfolder import StopRequest

    folder = ["--run-dir", str(tmp_path)]
    command = [*FAST, "--method", "finetune", "--sweep", "lr=1e-6,1e-2", "--validation", "0.3", *folder]
    real, calls = fastmerge.loop.Images.train, []

    def stopping(self, task):
        calls.append(task.index)
        if len(calls) in (3, 6):  # in the second candidate, and in the second stage
            StopRequest.signal = 2
        return real(self, task)

    monkeypatch.setattr(fastmerge.loop.Images, "train", stopping)
    assert main(command) == 130 and not (tmp_path / "sweep.csv").exists()
    assert main(command) == 130 and (tmp_path / "sweep.csv").exists()
    assert main(command) == 0
    assert len(list(tmp_path.glob("finetune*-seed0/model.safetensors"))) == 1
    assert json.loads((tmp_path / "validation/config.json").read_text())["scenario"]["validation"] == 0.3
