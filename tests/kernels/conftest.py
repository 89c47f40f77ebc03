"""Fixtures of the op tests. Every test that takes `device` runs on the CPU, and on CUDA under `-m gpu`.

With TRITON_INTERPRET=1 the CPU runs go through the Triton kernels in Triton's interpreter (see `test_interpreter.py`).
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `oracle`, `compiling`: shared by the tests of this folder

from fastmerge_kernels import reference  # noqa: E402

reference.random_words = functools.lru_cache(8)(reference.random_words)  # most of the tests' time otherwise
reference.random_normal = functools.lru_cache(8)(reference.random_normal)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
