"""A full-size backbone does a training step, a merge and an evaluation on the CPU."""

import json

import pytest
from image_trees import image_folder

from fastmerge.__main__ import main


@pytest.mark.slow
@pytest.mark.parametrize(("model", "head"), [("ViT-B-16-quickgelu", "text"), ("vit_base_patch16_224", "prototype")])
def test_vit_b_16(tmp_path, capsys, model, head):
    data = image_folder(tmp_path / "data", classes=2, train=1, test=1)
    flags = ["--dataset", "folder", "--data-root", str(data), "--model", model, "--pretrained", "none", "--head", head]
    flags += "--tasks 2 --method trm --epochs 1 --merge-epochs 1 --batch-size 1 --device cpu".split()
    flags += ["--save-every", "1e9", "--no-nearest-mean"]
    assert main([*flags, "--run-dir", str(tmp_path / "r")]) == 0
    assert "random weights" in capsys.readouterr().out
    result = json.loads((tmp_path / "r" / "results.json").read_text())["methods"]["trm"]["0"]
    assert result["kept_bytes"][1] > 4 * 85e6 and len(result["accuracy_matrix"]) == 2
    steps = [json.loads(line) for line in (tmp_path / "r" / "trm-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert [s["phase"] for s in steps] == ["train", "evaluate", "train", "merge", "evaluate"]
