"""How bench/ measures: a case, what it is compared with, and one interleaved loop over all of them.

Every round times the op, a copy, and the op's rivals one after the other in one process, so that their ratios survive a
machine whose speed drifts. Rivals that fail or do not fit report None (n/a).
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
COPY_LIMIT = 256 << 20  # bytes; a larger copy is timed by this one's speed
RIVAL_SECONDS = 4.0  # a rival slower than this in total is not repeated


def vit_shapes(size: str) -> list[tuple[int, ...]]:
    """The tensors of a ViT of that size: rules that work per tensor see a real model's lengths."""
    w = WIDTHS[size]
    block = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(w,), (197, w), (w, 3, 16, 16), (w,)] + 12 * block + [(w,), (w,)]


def segments(size: str) -> list[int]:
    """Boundaries 0, ..., n of those tensors in the flat vector."""
    bounds = [0]
    for shape in vit_shapes(size):
        bounds.append(bounds[-1] + torch.Size(shape).numel())
    return bounds


def named(flat: Tensor, size: str) -> dict[str, Tensor]:
    """Views of the flat vector as the state dict that peers want."""
    shapes = vit_shapes(size)
    parts = flat.split([torch.Size(s).numel() for s in shapes])
    return {f"p{k:03d}": p.view(s) for k, (p, s) in enumerate(zip(parts, shapes, strict=True))}


@dataclass
class Case:
    """One row. run: the op, outputs allocated beforehand where it can write in place or into `out`."""

    run: Callable[[], object]
    bytes: int | None = None  # moved by one call, from the op's formula
    eager: Callable[[], object] | None = None  # the formula in torch; compiled too with --compile
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    models_bytes: int | None = None  # of the T models of a rule: moving them once is the unit of x_models
    model_bytes: int | None = None  # of one model: the unit of extra memory


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
        """Growth of the peak memory during one call, what it returns included. None where the system does not tell."""
        gc.collect()
        if self.cuda:
            self.sync()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call()
            self.sync()
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else the call could use freed blocks that still count as resident
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # the peak starts again from the present size
        except (OSError, AttributeError):
            return None
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(key))


def copier(nbytes: int, device: torch.device) -> tuple[Callable[[], object], float]:
    """(a copy that reads and writes nbytes in total, or COPY_LIMIT's worth; what to multiply its time with)."""
    size = min(nbytes // 2, COPY_LIMIT) // 4
    source, target = torch.ones(size, device=device), torch.zeros(size, device=device)
    return (lambda: target.copy_(source)), nbytes / (8 * size)


def measure(benchmark, case: Case, *, device: torch.device, rounds: int, compiled: bool = False) -> dict:
    """Run one row under pytest-benchmark and fill its extra_info; returns that."""
    clock, info, problems = Clock(device), benchmark.extra_info, {}
    rivals: dict[str, Callable[[], object]] = dict(case.peers)
    if case.eager is not None:
        rivals["eager"] = case.eager
        if compiled:
            rivals["compile"] = torch.compile(case.eager)
    calls = 1
    if case.bytes is not None:
        copy, scale = copier(case.bytes, device)
        # on a GPU a call's launch must hide behind the calls queued before it, or small sizes time the host
        calls = max(1, min(200, int(2e10 / case.bytes))) if clock.cuda else 1

    def repeat(call, calls=calls):
        return lambda: [call() for _ in range(calls)] and None

    with torch.no_grad() if case.bytes is not None else contextlib.nullcontext():
        case.run()  # compiles
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
                queued[name] = max(1, min(calls, int(1 / first)))  # slow rivals hide their launches anyway
                times[name] = [first] if first > RIVAL_SECONDS else []
            except Exception as error:  # not installed, out of memory, no compiler: the row goes on without it
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
