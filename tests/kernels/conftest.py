"""Fixtures of the op tests. Every test that takes `device` runs on the CPU, and on CUDA under `-m gpu`.

With TRITON_INTERPRET=1 the CPU runs go through the Triton kernels in Triton's interpreter (see `test_interpreter.py`).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `oracle`, `compiling`: shared by the tests of this folder

from fastmerge_kernels import reference  # noqa: E402
from oracle import INTERPRET  # noqa: E402

reference.random_words = functools.lru_cache(8)(reference.random_words)  # otherwise most of the tests' time goes here
reference.random_normal = functools.lru_cache(8)(reference.random_normal)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_interpreter.py" in item.nodeid)  # last: its process runs during the others


@pytest.fixture(scope="session", autouse=True)
def interpreted_run(request):
    """If `test_interpreter.py` is selected, start its run before the first test and yield (process, log)."""
    if INTERPRET or not any("test_interpreter.py" in item.nodeid for item in request.session.items):
        yield None
        return
    # every family of Triton kernels needs its own test file: pytest fails if the file is missing
    families = sorted((Path(reference.__file__).parent / "gpu").glob("*.py"))
    names = [file.stem for file in families if file.stem not in ("__init__", "launch")]
    files = [Path(__file__).parent / f"test_{name}.py" for name in names]
    values = "not named and not independent and not equally_often and not keeps_the_mean and not normals_are_normal"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", values, *files]
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        yield process, log
        process.kill()
        process.wait()
