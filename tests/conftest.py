"""Shared by all tests: none may fetch anything, and none writes outside of temporary folders."""

import os
import tempfile

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name  # text heads are cached there


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
