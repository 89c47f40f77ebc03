"""The wheel of `kernels/` builds, and its ops work without the trainer and the trainer's dependencies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import unpacked

import fastmerge

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

USE = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm", "open_clip", "fastmerge", "torchvision", "safetensors", "PIL"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
import fastmerge_kernels as fk, torch

assert fk.__file__.startswith(sys.argv[1]), fk.__file__
assert torch.equal(fk.lerp(torch.zeros(5), torch.ones(5), 0.5), torch.full((5,), 0.5))
"""


def test_the_wheel_works_alone(tmp_path):
    source, site = tmp_path / "kernels", tmp_path / "site"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    unpacked(source, site)
    packed = {str(f.relative_to(site)) for f in site.rglob("*.py")}
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    assert packed == {str(f.relative_to(KERNELS)) for f in (KERNELS / "fastmerge_kernels").rglob("*.py")}
    needs = set(re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.M))
    assert needs == {"torch", "triton", "numba", "numpy"}
    assert f"\nVersion: {fastmerge.__version__}\n" in metadata
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    used = subprocess.run(
        [sys.executable, "-c", USE, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
