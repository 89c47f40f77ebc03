"""`--extract-lora` against peft, which must compute the merged model with it, and against numpy's decomposition."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.__main__ import main


class Toy(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(5, 6)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.head = torch.nn.Linear(6, 3)
        self.scale = torch.nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """base, low (rank-2 updates of three weights), full (noise on all tensors)."""
    monkeypatch.chdir(tmp_path)
    base = Toy(0).state_dict()
    generator = torch.Generator().manual_seed(1)
    low = {name: x.clone() for name, x in base.items()}
    for name in ("blocks.0.weight", "blocks.1.weight", "head.weight"):
        rows, columns = low[name].shape
        low[name] += torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    full = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
    for name, tensors in (("base", base), ("low", low), ("full", full)):
        save_file(tensors, f"{name}.safetensors")
    return tmp_path


def extract(*words, models=("low",), rule="average"):
    paths = [f"{name}.safetensors" for name in models]
    return main(["merge", rule, "--models", *paths, "--base", "base.safetensors", *words])


def test_peft_computes_the_merged_model_with_it(place, capsys):
    peft = pytest.importorskip("peft")
    assert extract("--extract-lora", "4", "--out", "adapter") == 0
    assert "rank 4 for 3 tensors keeps 100.0 % of the norm" in capsys.readouterr().out
    tuned = Toy(1)
    tuned.load_state_dict(load_file("low.safetensors"))
    x = torch.randn(7, 6)
    base = Toy(0)
    before = base(x)
    adapted = peft.PeftModel.from_pretrained(base, "adapter")
    torch.testing.assert_close(adapted(x), tuned(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, tuned(x), atol=0.1)
    back = fastmerge.merge(["adapter"], "average", base="base.safetensors")
    for name, tensor in load_file("low.safetensors").items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-5)


def test_shares_are_those_of_the_singular_values(place, capsys):
    assert extract("--extract-lora", "2", "--dtype", "bf16", "--out", "a", models=("low", "full")) == 0
    said = capsys.readouterr().out
    delta = {
        name: (x.double() + load_file("full.safetensors")[name].double()) / 2
        - load_file("base.safetensors")[name].double()
        for name, x in load_file("low.safetensors").items()
    }
    rows = {row["tensor"]: row for row in csv.DictReader(open("a/extracted.csv"))}
    assert rows.keys() == delta.keys()
    kept = 0.0
    for name, row in rows.items():
        assert float(row["norm"]) == pytest.approx(float(delta[name].norm()), rel=1e-4)
        if row["why it was left out"]:
            assert float(row["kept"]) == 0
            continue
        values = np.linalg.svd(delta[name].numpy(), compute_uv=False)
        share = float(np.linalg.norm(values[:2]) / np.linalg.norm(values))
        assert float(row["kept"]) == pytest.approx(share, abs=1e-5) and share < 1
        kept += float((values[:2] ** 2).sum())
    total = sum(float(d.square().sum()) for d in delta.values())
    assert f"keeps {100 * (kept / total) ** 0.5:.1f} % of the norm" in said
    assert {name: row["why it was left out"] for name, row in rows.items() if row["why it was left out"]} == {
        "blocks.0.bias": "1 dimension",
        "blocks.1.bias": "1 dimension",
        "embed.weight": "an embedding",
        "head.bias": "1 dimension",
        "scale": "not the weight of a module",
    }
    assert "left out: blocks.0.bias, blocks.1.bias, embed.weight, head.bias and 1 more, with " in said
    config = json.loads((place / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["blocks.0", "blocks.1", "head"] and config["r"] == config["lora_alpha"] == 2
    weights = load_file("a/adapter_model.safetensors")
    product = weights["base_model.model.head.lora_B.weight"] @ weights["base_model.model.head.lora_A.weight"]
    left, values, right = np.linalg.svd(delta["head.weight"].numpy(), full_matrices=False)
    best = torch.tensor(left[:, :2] * values[:2] @ right[:2]).float()
    torch.testing.assert_close(product.float(), best, rtol=0.05, atol=0.03)
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}


def test_the_recipe_repeats_it(place, capsys):
    assert extract("--extract-lora", "9", "--out", "a", models=("low", "full"), rule="task-arithmetic") == 0
    assert main(["merge", "--recipe", "a"]) == 0
    assert "6 tensors with the same bits" in capsys.readouterr().out
    assert load_file("a/adapter_model.safetensors")["base_model.model.head.lora_A.weight"].shape == (9, 6)
    save_file(load_file("full.safetensors"), "low.safetensors")
    assert main(["merge", "--recipe", "a"]) == 2


def test_what_cannot_be_extracted(place, capsys):
    save_file({"x": torch.ones(3)}, "x.safetensors")
    save_file({"x": torch.zeros(3)}, "y.safetensors")
    before = sorted(place.rglob("*"))
    for message, words, models in (
        ("expected a rank of at least 1", ("--extract-lora", "0", "--out", "a"), ("low",)),
        ("an adapter is a folder", ("--extract-lora", "2", "--out", "a.safetensors"), ("low",)),
        ("leave --shard away", ("--extract-lora", "2", "--shard", "1MB", "--out", "a"), ("low",)),
        ("has extracted.csv beside it", ("--extract-lora", "2", "--report", "r.csv", "--out", "a"), ("low",)),
        (
            "no tensor differs",
            ("--base", "low.safetensors", "--extract-lora", "2", "--out", "a"),
            ("low",),
        ),
        ("only x differ from the base", ("--base", "y.safetensors", "--extract-lora", "2", "--out", "a"), ("x",)),
    ):
        assert extract(*words, models=models) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert main(["merge", "average", "--models", "low.safetensors", "--extract-lora", "2", "--out", "a"]) == 2
    assert "--extract-lora needs --base" in capsys.readouterr().err
    assert extract("--extract-lora", "2", "--dry-run") == 0
    assert "write a LoRA adapter of rank 2," in capsys.readouterr().out
    assert sorted(place.rglob("*")) == before
