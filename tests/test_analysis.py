"""The analyses on a small folder: what they write, and that the ends of a curve are the models themselves."""

import csv

import pytest
from image_trees import image_folder

from fastmerge.analysis.__main__ import main

FLAGS = (
    "--tasks 2 --model tiny --pretrained none --head prototype --epochs 1 --batch-size 16 --lr 1e-3 --device cpu"
    " --dataset folder"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=10, test=5)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_interpolate(data, tmp_path, capsys):
    assert main(["interpolate", "--points", "3", "--out", str(tmp_path / "f"), "--data-root", str(data), *FLAGS]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "f" / f"interpolate.{e}") for e in ("csv", "png")]
    rows = read(tmp_path / "f" / "interpolate.csv")
    assert len(rows) == 12 and {float(r["lambda"]) for r in rows} == {0.0, 0.5, 1.0}
    for row in rows:
        both = (float(row["accuracy_task1"]) + float(row["accuracy_task2"])) / 2  # as many images in both
        assert float(row["accuracy"]) == pytest.approx(both, abs=1e-3)
    for training in ("normal", "tangent"):  # at 0 and 1 there is nothing to weigh
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


def test_bad_input(data, tmp_path, capsys):
    assert main(["interpolate", "--data-root", str(data), *FLAGS, "--tasks", "1"]) == 2
    assert "choose at least 2" in capsys.readouterr().err
    assert main(["interpolate", "--points", "1", "--data-root", str(data), *FLAGS]) == 2
    (tmp_path / "file").write_text("")
    assert main(["interpolate", "--out", str(tmp_path / "file" / "x"), "--data-root", str(data), *FLAGS]) == 2
    assert "cannot write there" in capsys.readouterr().err
