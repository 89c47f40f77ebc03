"""The examples of kernels/README.md run, and its table names every public op."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fastmerge_kernels as fk
import pytest
import torch
from oracle import INTERPRET
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.skipif(INTERPRET, reason="independent of the kernels")
README = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


def run(tmp_path, code, path=""):
    """Run the script on the CPU in `tmp_path` and return its output; without `path` it finds no compiler."""
    script = tmp_path / "example.py"
    script.write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path or str(tmp_path)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_checkpoints(tmp_path):
    generator = torch.Generator().manual_seed(0)
    first = {"w": torch.randn(30, 7, generator=generator), "b": torch.randn(9, generator=generator).half()}
    second = {name: torch.randn(x.shape, generator=generator).to(x.dtype) for name, x in first.items()}
    first["steps"] = second["steps"] = torch.tensor([5])
    save_file(first, tmp_path / "first.safetensors")
    save_file(second, tmp_path / "second.safetensors")
    assert run(tmp_path, EXAMPLES[0]) == "220 entries merged, 0 not finite\n"
    merged = load_file(tmp_path / "merged.safetensors")
    torch.testing.assert_close(merged["w"], (first["w"] + second["w"]) / 2)
    assert merged["b"].dtype == torch.float16 and merged["steps"].item() == 5


def test_compiled_function(tmp_path):
    assert run(tmp_path, EXAMPLES[1]) == "compiled and equal\n"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler on a CPU"
)
def test_compiled_function_by_inductor(tmp_path):
    choice = '"inductor" if device == "cuda" else "aot_eager"'
    assert choice in EXAMPLES[1]
    code = EXAMPLES[1].replace(choice, '"inductor"')
    assert run(tmp_path, code, os.environ["PATH"]) == "compiled and equal\n"


def test_shards_on_ranks(tmp_path):
    assert run(tmp_path, EXAMPLES[2]).endswith("2 ranks, the same bits as one\n")


def test_the_table_names_every_op():
    named = set(re.findall(r"`(\w+)", README.split("## Rules for all ops")[0]))
    assert set(fk.__all__) <= named, set(fk.__all__) - named
