"""The main job on a tree with ImageNet's 1000 folders and tiny images: 100 tasks, flat memory, constant kept bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from image_trees import write_image

WNIDS = (Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for k, wnid in enumerate(WNIDS):
        write_image(root / "train" / wnid / f"{wnid}_0.JPEG", 2 * k)
        write_image(root / "val" / wnid / f"ILSVRC2012_val_{k:08d}.JPEG", 2 * k + 1)
    return root


# the text head encodes 80,000 prompts, which takes minutes on a CPU
@pytest.mark.parametrize(
    ("replace", "head"), [("anchored", "linear"), pytest.param("literal", "text", marks=pytest.mark.slow)]
)
def test_a_hundred_tasks(tree, tmp_path, replace, head):
    command = [sys.executable, "-m", "fastmerge", "--dataset", "imagenet1k", "--tasks", "100", "--data-root", str(tree)]
    command += "--model tiny --pretrained none --method trm --epochs 1 --merge-epochs 1 --batch-size 32".split()
    command += [
        "--device",
        "cpu",
        "--lr",
        "1e-4",
        "--head",
        head,
        "--trm.replace",
        replace,
        "--run-dir",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "100 tasks with 100 x 10 classes" in done.stdout
    result = json.loads((tmp_path / "r" / "results.json").read_text())["methods"]["trm"]["0"]
    assert len(result["accuracy_matrix"]) == 100 and None not in result["accuracy_matrix"][99]
    peaks, kept = result["peak_memory_bytes_per_task"], result["kept_bytes"]
    assert peaks[99] < 1.05 * peaks[9], f"task 10: {peaks[9]}, task 100: {peaks[99]}"
    theta = kept[0] if replace == "anchored" else kept[0] // 2
    assert set(kept) == {theta} if replace == "anchored" else set(kept) == {2 * theta}
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["order_sha256"] == "1184d882ffd7"  # the common permutation of seed 1993 for 1000 classes
    assert all(len(task["classes"]) == 10 for task in manifest["tasks"])
