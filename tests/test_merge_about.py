"""A merge of models of runs is one that `fastmerge evaluate` scores; otherwise the command says what is missing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge_sweep import data, models  # noqa: F401 (fixtures)

import fastmerge
from fastmerge.__main__ import main
from fastmerge.checkpoint import load_tensors, save_tensors
from fastmerge.models import saved


def scored(path, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_merged_model_is_scored_as_the_model_it_is(models, tmp_path, capsys):  # noqa: F811
    assert main(["merge", "average", "--models", *models[:2], "--weights", "3", "1", "--out", str(tmp_path / "o")]) == 0
    assert "cannot score" not in capsys.readouterr().out
    tensors, about = load_tensors(models[0])
    other = load_tensors(models[1])[0]
    mean = {
        n: ((3 * x.double() + other[n].double()) / 4).float() if x.is_floating_point() else x
        for n, x in tensors.items()
    }
    save_tensors(tmp_path / "by-hand.safetensors", mean, about)
    found, expected = (scored(tmp_path / name, capsys) for name in ("o", "by-hand.safetensors"))
    assert found["accuracy"] == expected["accuracy"] and found["per_task"] == expected["per_task"]
    assert found["accuracy"] > 100 / 5
    kept = saved.read(tmp_path / "o")[1]
    assert kept["method"] == "merge average" and kept["candidates"] == about["candidates"]
    assert "final_accuracy" not in kept and kept["class_names"] == about["class_names"]
    images = torch.rand(3, 3, 32, 32)
    hand = fastmerge.load(tmp_path / "by-hand.safetensors")(images)
    torch.testing.assert_close(fastmerge.load(tmp_path / "o")(images), hand, rtol=1e-4, atol=1e-4)


def test_half_precision_and_classes_of_all(models, tmp_path):  # noqa: F811
    """One model knows classes 0 and 1, another 1, 2 and 3: the merge knows them all."""
    paths = []
    for k, known in enumerate(([0, 1], [1, 2, 3])):
        tensors, about = load_tensors(models[k])
        tasks = [{"name": f"part {k}", "classes": known}]
        paths.append(tmp_path / f"{k}.safetensors")
        save_tensors(paths[-1], tensors, about | {"candidates": known, "tasks": tasks})
    fastmerge.merge(paths, "average", out=tmp_path / "o.safetensors", dtype="bf16")
    model = fastmerge.load(tmp_path / "o.safetensors")
    assert model.known.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert model.recipe["tasks"] == [{"name": "part 1", "classes": [1, 2, 3]}]
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.dtype == torch.float32 and logits[:, :4].isfinite().all() and logits[:, 4].isinf().all()


@pytest.mark.parametrize("case", ["other", "classes", "shards", "renamed", "no run"])
def test_what_keeps_it_from_being_scored(case, models, tmp_path, capsys):  # noqa: F811
    tensors, about = load_tensors(models[0])
    second, flags = str(tmp_path / "second.safetensors"), []
    save_tensors(tmp_path / "second.safetensors", tensors, about)
    if case == "other":
        save_file(tensors, second)
        why = f"{second} is no model of a run"
    if case == "classes":
        save_tensors(tmp_path / "second.safetensors", tensors, about | {"class_names": list("abcde")})
        why = f"{second} and {models[1]} have different classes"
    if case == "shards":
        flags, why = ["--shard", "1MB"], "it has several files; leave --shard away"
    if case == "renamed":
        save_file(
            {n.removeprefix("backbone."): x for n, x in tensors.items() if n.startswith("backbone.")},
            tmp_path / "b.safetensors",
        )
        flags = ["--base", str(tmp_path / "b.safetensors"), "--missing", "skip"]
        why = "it has no backbone."
    if case == "no run":
        save_file(tensors, second)
        models, why = [None, str(tmp_path / "first.safetensors")], None
        save_file(tensors, models[1])
    assert main(["merge", "average", "--models", models[1], second, *flags, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"`fastmerge evaluate` cannot score it: {why}" in said if why else "cannot score" not in said
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    if case != "shards":
        assert load_file(tmp_path / "out" / "model.safetensors")
