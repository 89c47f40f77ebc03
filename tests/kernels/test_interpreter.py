"""The Triton kernels on the CPU: the value tests of this folder again, in a process where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("philox", "trm", "elementwise", "sampling", "ties", "stock")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this starts the interpreted run")
def test_interpreted_kernels_pass():
    pytest.importorskip("triton")
    files = [Path(__file__).parent / f"test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
