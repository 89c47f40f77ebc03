"""The Triton kernels on the CPU: the value tests of this folder again, in a process where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILES = ("test_philox.py", "test_trm.py", "test_elementwise.py", "test_sampling.py", "test_ties.py", "test_stock.py")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this starts the interpreted run")
@pytest.mark.parametrize("file", FILES)
def test_interpreted_kernels_pass(file):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", FOLDER / file]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
