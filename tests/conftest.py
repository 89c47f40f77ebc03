"""Shared by all tests: none may fetch anything, and none writes outside of temporary folders.

A test is `quick` unless it is `slow` or `gpu` or named in LONG; one that takes more than about three seconds belongs there.
"""

import os
import tempfile

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name  # text heads are cached there

# files, or functions whose cases take that long together; everything else is quick
LONG = {
    "test_alone.py",
    "test_analysis.py",
    "test_baselines.py::test_all_kinds_of_methods_in_one_command",
    "test_bench.py::test_quick_rows_are_complete",
    "test_cli.py",
    "test_compiled.py",
    "test_elementwise.py::test_sizes",
    "test_imagenet_run.py",
    "test_interpreter.py",
    "test_lists.py::test_dare",
    "test_lists.py::test_fisher_average",
    "test_lists.py::test_in_place_and_counted",
    "test_lists.py::test_magmax",
    "test_lists.py::test_weighted_sum",
    "test_method_cmm.py::test_linearised_serves_both_families",
    "test_peers.py",
    "test_readme.py",
    "test_registration.py",
    "test_resume.py",
    "test_sampling.py::test_dare",
    "test_stock.py::test_equals_the_definition",
    "test_stock.py::test_segment_norms",
    "test_threshold.py::test_threshold_equals_sorting",
    "test_threshold.py::test_values_that_mislead_a_sample",
    "test_trm.py::test_merge_and_sums_sizes",
}


def pytest_collection_modifyitems(items):
    for item in items:
        names = {item.path.name, f"{item.path.name}::{item.originalname}"}
        if not names & LONG and not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.quick)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
