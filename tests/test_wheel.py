"""The wheel has every module and every file of data, and its commands run from it alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import unpacked

ROOT = Path(__file__).resolve().parents[1]
HOMES = ("fastmerge", "kernels/fastmerge_kernels")


def test_the_wheel_has_every_file_and_runs_from_it_alone(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in HOMES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unpacked(source, site)
    packed = {str(f.relative_to(site)) for home in HOMES for f in (site / Path(home).name).rglob("*") if f.is_file()}
    homes = [(source / home, (source / home).parent) for home in HOMES]
    assert packed == {str(f.relative_to(above)) for home, above in homes for f in home.rglob("*") if f.is_file()}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    use = [sys.executable, "-m", "fastmerge", "reproduce", "--list"]
    used = subprocess.run(use, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert used.returncode == 0 and "trm:table1" in used.stdout, used.stderr
