"""The machine of a run: device, versions, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastmerge import __version__
from fastmerge.errors import UserError


def choose_device(name: str) -> torch.device:
    """cpu, cuda, cuda:N, or auto (cuda if there is one). Under torchrun, cuda is this process's own GPU.

    Raises:
        UserError: another name; a GPU that does not exist.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device; use --device cpu or auto, or check the driver")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif "LOCAL_RANK" in os.environ:
        raise UserError(f"--device {name}: under torchrun every process has its own GPU; use --device cuda")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.index is not None:
        if device.index >= count:
            raise UserError(f"--device {name}: there are {count} CUDA devices, numbered from 0")
        torch.cuda.set_device(device)
    return device


def _commit() -> str | None:
    """Commit of the source tree this package runs from, with '+' if it has changes; None if unknown."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
        return head + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """JSON-able description for `environment.json`."""
    names = ("torch", "torchvision", "triton", "numba", "numpy", "timm", "open_clip_torch", "safetensors", "pillow")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "fastmerge": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


class PeakMemory:
    """Peak memory between `reset()` and `read()`, in bytes: the GPU's allocator, or the process's resident set.

    Where the system cannot reset the resident peak, a reading is the peak since the process started.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        """Start a new reading. Unused memory is released first, so that the readings of a long run are comparable."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # glibc keeps freed memory in its heap, which grows over many tasks
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
            except OSError:
                pass  # not Linux, or not permitted: read() then reports the peak since the start

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            high = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            high = None
        if high:
            return int(high[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
