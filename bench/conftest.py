"""Options and fixtures of the benchmarks; see README.md for the commands."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from measure import DTYPES, WIDTHS, Vectors, measure  # noqa: E402

MISSING = [
    name for name in ("safetensors", "open_clip") if importlib.util.find_spec(name) is None
]  # the trainer needs them
collect_ignore = ["test_speed_training.py", "test_speed_search.py"] if MISSING else []


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="1M fp32, T = 2, three rounds unless --rounds is set")
    group.addoption("--device", default="auto", help="cpu, cuda, or auto (cuda if there is one)")
    group.addoption("--sizes", default="1M,22M,86M", help=f"of {', '.join(WIDTHS)}; 1B needs a GPU")
    group.addoption("--dtypes", default="fp32,bf16", help=f"of {', '.join(DTYPES)}")
    group.addoption("--tasks", default="2,8,20,100", help="numbers of models T for the streaming rules")
    group.addoption("--rounds", type=int, help="7, with --quick 3")
    group.addoption("--compile", action="store_true", help="also time torch.compile of the formula (slow to compile)")


def pytest_report_header():
    return f"bench: {', '.join(MISSING)} missing, so no training and search rows" if MISSING else None


def _list(config, option: str, quick: str) -> list[str]:
    return (quick if config.getoption("--quick") else config.getoption(option)).split(",")


def pytest_configure(config):
    known = {"--sizes": WIDTHS, "--dtypes": DTYPES}
    for option, names in known.items():
        unknown = set(config.getoption(option).split(",")) - set(names)
        if unknown:
            raise pytest.UsageError(f"{option}: expected of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if not all(t.isdigit() and int(t) > 0 for t in config.getoption("--tasks").split(",")):
        raise pytest.UsageError(f"--tasks: expected positive numbers, got {config.getoption('--tasks')}")


def pytest_generate_tests(metafunc):
    for name, option, quick in (("size", "--sizes", "1M"), ("dtype", "--dtypes", "fp32"), ("tasks", "--tasks", "2")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, _list(metafunc.config, option, quick))


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    name = request.config.getoption("--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    return torch.device(name)


class Bench(Vectors):
    """Fixture of a benchmark: the vectors of a size, and `row(case)` to measure a case."""

    def __init__(self, request, benchmark, device, size: str | None, dtype: str | None):
        config = request.config
        self.benchmark, self.info, self._device = benchmark, benchmark.extra_info, device
        self.rounds = config.getoption("--rounds") or (3 if config.getoption("--quick") else 7)
        self.compiled = config.getoption("--compile")
        benchmark.extra_info |= {"device": device.type, "threads": torch.get_num_threads()}
        if size is None:
            return
        if size == "1B" and (device.type == "cpu" or torch.cuda.get_device_properties(device).total_memory < 60e9):
            pytest.skip("1B needs a GPU with at least 60 GB")
        super().__init__(device, size, dtype)

    def row(self, case) -> dict:
        return measure(self.benchmark, case, device=self._device, rounds=self.rounds, compiled=self.compiled)


@pytest.fixture
def bench(request, benchmark, device) -> Bench:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return Bench(request, benchmark, device, parameters.get("size"), parameters.get("dtype"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config, machine_info):
    """Add versions and remove the machine's name, because results are committed."""
    machine_info.pop("node", None)
    names = ("torch", "triton", "numba", "mergekit", "peft", "pytest-benchmark")
    machine_info["versions"] = {name: _version(name) for name in names}
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_benchmark_update_commit_info(config, commit_info):
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    commit_info.clear()
    commit_info["id"] = found or None
