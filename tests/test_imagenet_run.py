"""The main job on ImageNet's folder layout with tiny images: many tasks, constant memory, bounded kept bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from image_trees import write_image

WNIDS = (Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
# --class-order 1993 of 1000 classes is the common permutation; their text head takes minutes (80,000 prompts)
FULL = pytest.mark.slow


@pytest.mark.parametrize(
    ("classes", "tasks", "order_hash", "head"),
    [
        (200, 40, "b113214bc615", "linear"),
        pytest.param(1000, 100, "1184d882ffd7", "linear", marks=FULL),
        pytest.param(1000, 100, "1184d882ffd7", "text", marks=FULL),
    ],
)
def test_many_tasks(tmp_path, classes, tasks, order_hash, head):
    tree = tmp_path / "imagenet"
    for k, wnid in enumerate(WNIDS[:classes]):
        write_image(tree / "train" / wnid / f"{wnid}_0.JPEG", 2 * k)
        write_image(tree / "val" / wnid / f"ILSVRC2012_val_{k:08d}.JPEG", 2 * k + 1)
    command = [
        sys.executable,
        "-m",
        "fastmerge",
        "--dataset",
        "imagenet1k",
        "--tasks",
        str(tasks),
        "--data-root",
        str(tree),
    ]
    command += "--model tiny --pretrained none --method trm --epochs 1 --merge-epochs 1 --batch-size 16".split()
    command += f"--device cpu --lr 1e-4 --head {head} --no-nearest-mean".split()
    # one thread: with two, threads mostly wait for each other in small batches
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "r")], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert f"{tasks} tasks with {tasks} x {classes // tasks} classes" in done.stdout
    result = json.loads((tmp_path / "r" / "results.json").read_text())["methods"]["trm"]["0"]
    assert len(result["accuracy_matrix"]) == tasks and None not in result["accuracy_matrix"][-1]
    peaks, kept = result["peak_memory_bytes_per_task"], result["kept_bytes"]
    assert peaks[-1] < 1.05 * peaks[9], f"task 10: {peaks[9]}, task {tasks}: {peaks[-1]}"
    model = 3_350_528  # bytes of theta of the tiny backbone: 837,632 fp32 entries with padding
    rows = [kept_bytes - model for kept_bytes in kept]  # the head: at most 128 + 1 numbers and an index per class
    assert all(0 < n <= 4 * classes * 132 for n in rows), rows
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["order_sha256"] == order_hash  # PILOT's permutation of seed 1993
    assert all(len(task["classes"]) == classes // tasks for task in manifest["tasks"])
