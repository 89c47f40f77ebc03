"""The analyses on a small folder: the files they write; the ends of a curve are the models themselves."""

import csv
import json

import pytest
from image_trees import image_folder
from PIL import Image

from fastmerge.__main__ import main as train
from fastmerge.analysis.__main__ import main
from fastmerge.analysis.sweep import without
from fastmerge.results import METRICS

FLAGS = (
    "--tasks 2 --model tiny --pretrained none --head prototype --epochs 1 --batch-size 16 --lr 1e-3 --device cpu"
    " --dataset folder"
).split()

WORDS = ("perturb", "part")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=10, test=5)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_interpolate(data, tmp_path, capsys):
    assert (
        main(
            [
                "interpolate",
                "--points",
                "3",
                "--cmm.merge",
                "none",
                "--out",
                str(tmp_path / "f"),
                "--data-root",
                str(data),
                *FLAGS,
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.split() == [str(tmp_path / "f" / f"interpolate.{e}") for e in ("csv", "png", "pdf")]
    with Image.open(tmp_path / "f" / "interpolate.png") as image:
        assert image.text["Description"].startswith(
            "python -m fastmerge analyse interpolate --points 3 --cmm.merge none"
        )
    rows = read(tmp_path / "f" / "interpolate.csv")
    assert len(rows) == 12 and {float(r["lambda"]) for r in rows} == {0.0, 0.5, 1.0}
    for row in rows:
        both = (float(row["accuracy_task1"]) + float(row["accuracy_task2"])) / 2  # equal numbers of images
        assert float(row["accuracy"]) == pytest.approx(both, abs=1e-3)
    for training in ("normal", "tangent"):  # at 0 and 1 both rules give the same model
        for end in ("0", "1"):
            losses = [float(r["loss"]) for r in rows if r["training"] == training and r["lambda"] == end]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    ends = {(r["training"], r["lambda"]): float(r["loss"]) for r in rows}
    assert ends["normal", "1"] != ends["tangent", "1"] and ends["normal", "0"] != ends["normal", "1"]


def test_embeddings(data, tmp_path):
    flags = ["--classes", "2", "--out", str(tmp_path), "--data-root", str(data), *FLAGS, "--cmm.align-lr", "1e-2"]
    assert main(["embeddings", *flags, "--cmm.align-epochs", "10"]) == 0
    rows = read(tmp_path / "embeddings.csv")
    assert len(rows) == 3 * 10 and (tmp_path / "embeddings.png").stat().st_size > 1000
    far = {m: sum(float(r["distance"]) for r in rows if r["model"] == m) for m in ("previous", "merged", "aligned")}
    assert far["previous"] == 0 < far["aligned"] < far["merged"]


def test_landscape_holds_the_run_itself(data, tmp_path):
    """The ends are the two models, and the chosen point is the final model of a run."""
    flags = ["--data-root", str(data), *FLAGS, "--head", "linear", "--lr", "1e-2", "--pam.lr", "3e-2"]
    assert main(["landscape", "--points", "6", "--out", str(tmp_path), *flags]) == 0
    rows = [{k: v if k in WORDS else float(v) for k, v in r.items()} for r in read(tmp_path / "landscape.csv")]
    assert [r["part"] for r in rows] == ["plane"] * 36 + ["path"] * 6 + ["chosen"]
    plane = {(r["alpha"], r["beta"]): r for r in rows if r["part"] == "plane"}
    path = {r["alpha"]: r for r in rows if r["part"] == "path"}
    for end in (0.0, 1.0):
        for column in ("loss", "loss_own", "accuracy"):
            assert plane[end, 1 - end][column] == pytest.approx(path[end][column], rel=1e-5)
    assert all(r["loss_own"] < r["loss"] for r in rows)  # fewer wrong classes to choose from
    chosen = rows[-1]
    assert 0 <= chosen["alpha"] <= 1 and chosen["alpha"] + chosen["beta"] == pytest.approx(1)
    assert train([*flags, "--method", "pam", "--run-dir", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "pam-seed0" / "result.json").read_text())
    assert chosen["accuracy"] == pytest.approx(result["final_accuracy"], abs=1e-3)
    with open(tmp_path / "run" / "pam-seed0" / "metrics.jsonl") as file:
        alphas = [line["alpha"] for line in map(json.loads, file) if "alpha" in line]
    assert chosen["alpha"] == pytest.approx(alphas[-1], rel=1e-5)


def test_landscapes_of_several_merges(tmp_path):
    """The panels of two tasks, with perturbation and without, are those of each alone."""
    data = image_folder(tmp_path / "data", classes=6, train=4, test=2)
    flags = ["--data-root", str(data), *FLAGS, "--head", "linear", "--pam.lr", "3e-2", "--points", "2"]
    flags += ["--tasks", "3", "--batch-size", "4"]

    def found(name, *more):
        assert main(["landscape", *flags, "--out", str(tmp_path / name), *more]) == 0
        return [list(row.values()) for row in read(tmp_path / name / "landscape.csv")]

    rows = found("together", "--after", "3", "2", "--both")
    assert len(rows) == 2 * 2 * (4 + 2 + 1)
    for perturb, after in (("task", "2"), ("none", "3")):
        alone = found(perturb, "--after", after, "--pam.perturb", perturb)
        assert [row for row in rows if row[:2] == [perturb, after]] == alone
    assert len({row[3] for row in rows if row[2] == "chosen"}) == 4  # four alphas


def test_bars_of_finished_runs(tmp_path):
    def result(final, forgetting, plasticity):
        values = dict.fromkeys(METRICS) | {"final_accuracy": final, "forgetting": forgetting, "plasticity": plasticity}
        counts = {"accuracy_matrix": [[final]], "test_counts": [1], "kept_bytes": [1], "peak_memory_bytes": 1}
        return values | counts | {"seconds": {"train": 0, "merge": 0, "evaluate": 0}}

    a = {
        "pam-seed0": result(80.0, 2.0, 90.0),
        "pam-seed1": result(84.0, 4.0, 90.0),
        "joint-seed0": result(95.0, None, 95.0),
    }
    for name, values in a.items():
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "result.json").write_text(json.dumps(values))
    (tmp_path / "b" / "a").mkdir(parents=True)
    alone = tmp_path / "b" / "a" / "results.json"  # without its folder, and called like the other
    alone.write_text(json.dumps({"methods": {"pam": {"0": result(50.0, 1.0, 60.0)}}}))
    assert main(["bars", str(tmp_path / "a"), str(alone), "--out", str(tmp_path / "out")]) == 0
    rows = {(r["run"], r["method"], r["metric"]): r for r in read(tmp_path / "out" / "bars.csv")}
    here = f"{tmp_path.name}/a"
    assert len(rows) == 8 and (here, "joint", "forgetting") not in rows
    first = rows[here, "pam", "final_accuracy"]
    assert (float(first["mean"]), first["seeds"]) == (82.0, "2")
    assert float(first["deviation"]) == pytest.approx(8**0.5, rel=1e-5)
    assert float(rows["b/a", "pam", "plasticity"]["deviation"]) == 0
    assert (tmp_path / "out" / "bars.png").stat().st_size > 1000


def test_accuracy_over_the_tasks(tmp_path):
    """Over the images of the tasks seen, by hand: 10, 30 and 60 test images."""

    def result(*rows):
        matrix = [[*row, *[None] * (len(rows) - len(row))] for row in rows]
        values = dict.fromkeys(METRICS) | {"final_accuracy": 1.0, "accuracy_matrix": matrix}
        counts = {"test_counts": [10, 30, 60][: len(rows)], "kept_bytes": [1], "peak_memory_bytes": 1}
        return values | counts | {"seconds": {"train": 0, "merge": 0, "evaluate": 0}}

    a = {
        "trm": {"0": result([90.0], [80.0, 60.0], [70.0, 50.0, 20.0]), "3": result([80.0], [80.0, 80.0], [0.0] * 3)},
        "joint": {"0": result([95.0])},
    }
    start = result([40.0], [40.0, 20.0], [40.0, 20.0, 10.0])
    for name, methods in {"a": a, "b": {"trm": {"0": a["trm"]["3"]}}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"methods": methods, "zero_shot": start}))
    files = [str(tmp_path / name / "results.json") for name in "ab"]

    def found(*runs):
        assert main(["accuracy", *runs, "--out", str(tmp_path / "out")]) == 0
        for kind in ("png", "pdf"):
            assert (tmp_path / "out" / f"accuracy.{kind}").stat().st_size > 1000
        columns = ("mean", "least", "largest", "seeds")
        rows = read(tmp_path / "out" / "accuracy.csv")
        return {(row["line"], row["tasks"]): [float(row[column]) for column in columns] for row in rows}

    rows = found(files[0])
    assert rows["trm", "1"] == [85, 80, 90, 2]
    assert rows["trm", "2"] == [72.5, 65, 80, 2]  # (10 * 80 + 30 * 60) / 40
    assert rows["trm", "3"] == [17, 0, 34, 2]
    assert rows["joint", "all"] == [95, 95, 95, 1] and rows["zero-shot", "3"] == [16, 16, 16, 1]
    assert len(rows) == 3 + 3 + 1
    both = found(*files)
    assert both["b: trm", "2"] == [80, 80, 80, 1] and both["a: trm", "2"] == rows["trm", "2"]
    assert len(both) == 3 + 3 + 1 + 3 and ("b: zero-shot", "1") not in both


def test_bars_of_something_else(tmp_path, capsys):
    assert main(["bars", str(tmp_path)]) == 2 and "contains no finished run" in capsys.readouterr().err
    assert main(["bars", str(tmp_path), "--tasks", "2"]) == 2 and "not --tasks 2" in capsys.readouterr().err
    assert main(["accuracy", str(tmp_path)]) == 2 and "contains no finished run" in capsys.readouterr().err


def test_bad_input(data, tmp_path, capsys):
    assert main(["interpolate", "--data-root", str(data), *FLAGS, "--tasks", "1"]) == 2
    assert "choose at least 2" in capsys.readouterr().err
    assert main(["interpolate", "--points", "1", "--data-root", str(data), *FLAGS]) == 2
    for wrong in ("--after 3", "--after 2 3", "--after 1", "--pam.no-merge", "--both --pam.perturb none"):
        assert main(["landscape", "--data-root", str(data), *FLAGS, *wrong.split()]) == 2
        assert wrong.split(" -")[0].replace("2 3", "3") in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["interpolate", "--out", str(tmp_path / "file" / "x"), "--data-root", str(data), *FLAGS]) == 2
    assert "cannot write there" in capsys.readouterr().err


def test_a_setting_against_a_metric(data, tmp_path, capsys):
    """The rows of one command; the value that no label names is the default's."""
    rows = ["magmax", "magmax:scale=0.9", "magmax:scale=0.1,lr=1e-4", "magmax:scale=0.9,lr=1e-4", "finetune"]
    rows += ["magmax:scale=0.9,epochs=2"]  # alone in its line
    rows += ["magmax:scale=0.5"]  # the default once more: not another seed
    flags = [*FLAGS, "--quiet", "--no-nearest-mean", "--data-root", str(data), "--run-dir", str(tmp_path / "r")]
    assert train([*flags, "--method", *rows, "--seeds", "0", "1"]) == 0
    results = json.loads((tmp_path / "r" / "results.json").read_text())["methods"]
    out = tmp_path / "out"
    assert main(["sweep", str(tmp_path / "r"), "--x", "magmax.scale", "--metric", "aaa", "--out", str(out)]) == 0
    found = {(row["line"], float(row["x"])): row for row in read(out / "sweep.csv")}
    labels = {"magmax-strict": [0.5, 0.9], "magmax-strict(lr=1e-4)": [0.1, 0.9]}
    assert list(found) == [(line, x) for line, values in labels.items() for x in values]
    seeds = results["magmax-strict(scale=0.9)"]
    values = [seeds[seed]["aaa"] for seed in "01"]
    assert found["magmax-strict", 0.5]["seeds"] == "2"
    row = found["magmax-strict", 0.9]
    assert float(row["mean"]) == pytest.approx(sum(values) / 2, rel=1e-5) and row["seeds"] == "2"
    assert (float(row["least"]), float(row["largest"])) == pytest.approx((min(values), max(values)), rel=1e-5)
    assert (out / "sweep.png").stat().st_size > 1000

    two = ["--x", "lr", "--lines", "magmax.scale", "--out", str(out)]
    assert main(["sweep", str(tmp_path / "r"), *two]) == 0
    places = {
        ("magmax-strict", "0.1", "0.0001"): "magmax-strict(scale=0.1,lr=1e-4)",
        ("magmax-strict", "0.5", "0.001"): "magmax-strict",
        ("magmax-strict", "0.9", "0.0001"): "magmax-strict(scale=0.9,lr=1e-4)",
        ("magmax-strict", "0.9", "0.001"): "magmax-strict(scale=0.9)",
    }
    rows = read(out / "sweep.csv")
    assert [(row["line"], row["second"], row["x"]) for row in rows] == list(places)
    for row, label in zip(rows, places.values(), strict=True):
        values = [results[label][seed]["final_accuracy"] for seed in "01"]
        assert float(row["mean"]) == pytest.approx(sum(values) / 2, rel=1e-5)
    both = ["magmax-strict", "magmax-strict(scale=0.9)"]
    some = ["--x", "magmax.scale", "--out", str(tmp_path / "some"), "--rows", *both]
    assert main(["sweep", str(tmp_path / "r"), *some]) == 0
    shown = {(row["line"], row["x"]): row["seeds"] for row in read(tmp_path / "some" / "sweep.csv")}
    assert shown == {("magmax-strict", "0.5"): "2", ("magmax-strict", "0.9"): "2"}
    for x, message in (
        ("magmax.scale --rows magmax-strikt", "Did you mean: magmax-strict"),
        ("magmax.skale", "Did you mean: magmax.scale"),
        ("batch-size", "all have 16; expected runs with different values"),
        ("trm.alpha", "no finished run has it"),
        ("lr --lines lr", "--lines lr: is --x already"),
        ("lr --lines magmax.skale", "--lines magmax.skale: no such setting"),
        ("lr --lines trm.alpha", "--x lr: no finished run has it"),
        ("lr --lines batch-size", "--lines batch-size: all have 16"),
    ):
        assert main(["sweep", str(tmp_path / "r"), "--x", *x.split()]) == 2 and message in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "r"), "--x", "lr", "--metric", "acc"]) == 2
    assert "--metric acc: expected one of final_accuracy" in capsys.readouterr().err


def test_search_epochs_of_rows_and_of_folders(data, tmp_path):
    """Rows of one command and the flag of another are points of one line; methods that search nothing have none."""
    flags = [*FLAGS, "--quiet", "--data-root", str(data)]
    a, b = ([*flags, "--run-dir", str(tmp_path / name)] for name in "ab")
    assert train([*a, "--method", "trm", "trm:merge_epochs=3", "finetune", "--merge-epochs", "1"]) == 0
    assert train([*b, "--method", "trm", "finetune", "--merge-epochs", "2"]) == 0
    runs = [str(tmp_path / name) for name in "ab"]
    assert main(["sweep", *runs, "--x", "merge-epochs", "--out", str(tmp_path / "out")]) == 0
    found = {row["x"]: row for row in read(tmp_path / "out" / "sweep.csv")}
    assert list(found) == ["1", "2", "3"] and {row["line"] for row in found.values()} == {"trm"}
    for x, (folder, label) in {"1": ("a", "trm"), "2": ("b", "trm"), "3": ("a", "trm(merge_epochs=3)")}.items():
        result = json.loads((tmp_path / folder / f"{label}-seed0" / "result.json").read_text())
        assert float(found[x]["mean"]) == pytest.approx(result["final_accuracy"], rel=1e-5)


def test_the_label_of_a_run_without_a_setting():
    """trm has a setting lr of its own beside that of training."""
    label = "trm(lr=0.1,training.lr=1e-4,beta=0)"
    assert without(label, ("trm", "lr")) == "trm(training.lr=1e-4,beta=0)"
    assert without(label, ("training", "lr")) == "trm(lr=0.1,beta=0)"
    assert without("finetune(lr=1e-4)", ("training", "lr")) == "finetune"
    assert without("dare-ties-strict(density=0.5)", ("dare", "density")) == "dare-ties-strict(density=0.5)"
    assert without("of-old(a.b=1,c=2)", ("a", "b")) == "of-old(c=2)"
