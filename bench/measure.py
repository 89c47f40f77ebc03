"""Measurement for bench/: a case, its rivals, and one interleaved loop over all of them.

Every round times a copy, the rivals and the op in sequence in one process, so that their ratios do not depend on a
drifting machine speed. Rivals that fail or do not fit report None (n/a).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

WIDTHS = {"1M": 80, "22M": 384, "86M": 768, "1B": 2560}  # of a 12-block ViT, patch 16: ViT-S is 22M, ViT-B 86M
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COPY_LIMIT = 256 << 20  # bytes read; the time of a larger copy is extrapolated
MEMORY = 6 << 30  # bytes of models in memory at once on the CPU; beyond that a few models are reused
RIVAL_SECONDS = 4.0  # a rival that has taken this long in total is not repeated


def vit_shapes(size: str) -> list[tuple[int, ...]]:
    """Return the shapes of a ViT of that size, so that per-tensor rules get realistic lengths."""
    w = WIDTHS[size]
    block = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(w,), (197, w), (w, 3, 16, 16), (w,)] + 12 * block + [(w,), (w,)]


def segments(size: str) -> list[int]:
    """Return the boundaries 0, ..., n of those tensors in the flat vector."""
    bounds = [0]
    for shape in vit_shapes(size):
        bounds.append(bounds[-1] + torch.Size(shape).numel())
    return bounds


def named(flat: Tensor, size: str) -> dict[str, Tensor]:
    """Return views of the flat vector as the state dict that peers need."""
    shapes = vit_shapes(size)
    parts = flat.split([torch.Size(s).numel() for s in shapes])
    return {f"p{k:03d}": p.view(s) for k, (p, s) in enumerate(zip(parts, shapes, strict=True))}


@dataclass
class Case:
    """One row. run: the op; outputs are allocated beforehand if it can write in place or into `out`."""

    run: Callable[[], object]
    bytes: int | None = None  # that one call moves, by the op's formula
    eager: Callable[[], object] | None = None  # the formula in torch; --compile also times it compiled
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    models_bytes: int | None = None  # of a rule's T models; moving them once is the unit of x_models
    model_bytes: int | None = None  # of one model, the unit of extra memory


class Vectors:
    """The vectors of a row: `n` entries with `bounds` of the tensors, seeded, of one dtype; `info` describes them."""

    def __init__(self, device: torch.device, size: str, dtype: str):
        self.device, self.size, self.bounds = device, size, segments(size)
        self.n, self.dtype = self.bounds[-1], DTYPES[dtype]
        self.bytes = self.n * self.dtype.itemsize  # of one model
        self.info: dict = getattr(self, "info", {})  # of a benchmark, if there is one
        self.info |= {"n": self.n, "size": size, "dtype": dtype}
        self._generator = torch.Generator(device).manual_seed(0)

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
        self.info |= {"T": count, "distinct_models": self.distinct}
        models = [self.normal(1e-3, around=base) for _ in range(self.distinct)]
        return [models[k % len(models)] for k in range(count)]

    def fits(self, models: int) -> bool:
        """Return whether a rival may allocate that many models."""
        if self.device.type == "cuda":
            return models * self.bytes < torch.cuda.get_device_properties(self.device).total_memory // 2
        return models * self.bytes < MEMORY // 2


class Clock:
    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.device = device

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        self.sync()
        start = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - start

    def extra_bytes(self, call: Callable[[], object]) -> int | None:
        """Return the growth of peak memory in one call, result included; None if the system does not report it."""
        gc.collect()
        if self.cuda:
            self.sync()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call()
            self.sync()
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else the call could reuse freed blocks that count as resident
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # resets the peak to the current size
        except (OSError, AttributeError):
            return None
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(key))


def copier(nbytes: int, device: torch.device) -> tuple[Callable[[], object], float]:
    """Return (a copy that reads and writes at most nbytes in total, the factor that scales its time to nbytes)."""
    size = min(nbytes // 2, COPY_LIMIT) // 4
    source, target = torch.ones(size, device=device), torch.zeros(size, device=device)
    return (lambda: target.copy_(source)), nbytes / (8 * size)


def measure(benchmark, case: Case, *, device: torch.device, rounds: int, compiled: bool = False) -> dict:
    """Run one row under pytest-benchmark; fill and return its extra_info."""
    clock, info, problems = Clock(device), benchmark.extra_info, {}
    rivals: dict[str, Callable[[], object]] = dict(case.peers)
    if case.eager is not None:
        rivals["eager"] = case.eager
        if compiled:
            rivals["compile"] = torch.compile(case.eager)
    calls = 1
    if case.bytes is not None:
        copy, scale = copier(case.bytes, device)
        # on a GPU queued calls must hide the launch of a call, or small sizes time the host
        calls = max(1, min(200, int(2e10 / case.bytes))) if clock.cuda else 1

    def repeat(call, calls=calls):
        return lambda: [call() for _ in range(calls)] and None

    with torch.no_grad() if case.bytes is not None else contextlib.nullcontext():
        case.run()  # warm-up and compilation
        info["extra_models"] = None
        if case.model_bytes:
            extra = clock.extra_bytes(case.run)
            info["extra_models"] = None if extra is None else round(extra / case.model_bytes, 2)
        times: dict[str, list[float]] = {name: [] for name in rivals}
        queued: dict[str, int] = {}
        for name, call in list(rivals.items()):
            try:
                if name == "compile":
                    call()
                first = clock.seconds(call)
                queued[name] = max(1, min(calls, int(1 / first)))  # slow rivals need no queue
                times[name] = [first] if first > RIVAL_SECONDS else []
            except Exception as error:  # not installed, out of memory, no compiler: leave the rival out
                problems[name] = f"{type(error).__name__}: {str(error)[:120]}"
                del rivals[name]
        own, copies = [], []

        def target():
            repeat(case.run)()
            clock.sync()

        def setup():
            if case.bytes is not None:
                copies.append(clock.seconds(repeat(copy)) / calls * scale)
            for name, call in rivals.items():
                if sum(times[name]) < RIVAL_SECONDS:
                    times[name].append(clock.seconds(repeat(call, queued[name])) / queued[name])
            clock.sync()

        benchmark.pedantic(target, setup=setup, rounds=rounds)
    own = [t / calls for t in benchmark.stats.stats.data]
    best = min(own)
    info |= {"ms": round(1e3 * best, 4), "ms_median": round(1e3 * statistics.median(own), 4), "calls_per_round": calls}
    if case.bytes is not None:
        info["GB/s"] = round(case.bytes / best / 1e9, 2)
        info["x_copy"] = round(best / min(copies), 3)
        info["x_copy_median"] = round(statistics.median(a / b for a, b in zip(own, copies, strict=True)), 3)
        info["copy_fraction"] = round(min(copies) / best, 3)
        if case.models_bytes:
            info["x_models"] = round(best / (min(copies) * case.models_bytes / case.bytes), 3)
    for name in ("eager", "compile", "mergekit", "peft", *times):
        info[f"speedup_{name}"] = round(min(times[name]) / best, 2) if times.get(name) else None
    if problems:
        info["not_measured"] = problems
    return info
