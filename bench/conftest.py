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
from measure import DTYPES, WIDTHS, measure, segments  # noqa: E402

MISSING = [
    name for name in ("safetensors", "open_clip") if importlib.util.find_spec(name) is None
]  # the trainer needs them
collect_ignore = ["test_speed_training.py", "test_speed_search.py"] if MISSING else []
MEMORY = 6 << 30  # bytes of models in memory at once on the CPU; beyond that a few models are reused


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


class Bench:
    """Fixture of a benchmark: `n` and `bounds` of the size, seeded tensors, and `row(case)` to measure a case."""

    def __init__(self, request, benchmark, device, size: str | None, dtype: str | None):
        config = request.config
        self.benchmark, self.device, self.size = benchmark, device, size
        self.rounds = config.getoption("--rounds") or (3 if config.getoption("--quick") else 7)
        self.compiled = config.getoption("--compile")
        benchmark.extra_info |= {"device": device.type, "threads": torch.get_num_threads()}
        self._generator = torch.Generator(device).manual_seed(0)
        if size is None:
            return
        if size == "1B" and (device.type == "cpu" or torch.cuda.get_device_properties(device).total_memory < 60e9):
            pytest.skip("1B needs a GPU with at least 60 GB")
        self.bounds = segments(size)
        self.n, self.dtype = self.bounds[-1], DTYPES[dtype]
        self.bytes = self.n * self.dtype.itemsize  # of one model
        benchmark.extra_info |= {"n": self.n, "size": size, "dtype": dtype}

    def normal(self, std: float = 0.02, *, around: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.empty(self.n, device=self.device).normal_(0, std, generator=self._generator)
        return (x if around is None else x.add_(around)).to(self.dtype)

    def positive(self) -> torch.Tensor:
        return torch.empty(self.n, device=self.device).uniform_(1e-4, 1, generator=self._generator).to(self.dtype)

    def models(self, count: int, base: torch.Tensor) -> list[torch.Tensor]:
        """Return `count` models near base; if they do not fit, repeat a few (a stream from disk reuses buffers too)."""
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory // 2
        else:
            memory = MEMORY
        distinct = max(
            2, min(count, memory // self.bytes // 2 - 4)
        )  # half is for Fishers; 8 models for copies and peers
        self.distinct = min(count, distinct)
        self.benchmark.extra_info |= {"T": count, "distinct_models": self.distinct}
        models = [self.normal(1e-3, around=base) for _ in range(self.distinct)]
        return [models[k % len(models)] for k in range(count)]

    def fits(self, models: int) -> bool:
        """Return whether a rival may allocate that many models."""
        if self.device.type == "cuda":
            return models * self.bytes < torch.cuda.get_device_properties(self.device).total_memory // 2
        return models * self.bytes < MEMORY // 2

    def row(self, case) -> dict:
        return measure(self.benchmark, case, device=self.device, rounds=self.rounds, compiled=self.compiled)


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
