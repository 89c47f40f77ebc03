"""`fastmerge merge` beside mergekit's own command on the same files: time, processor time, peak memory.

    python bench/merge_files.py --folder DIR                       # 12 minutes; 2.6 GB of files in DIR
    python bench/merge_files.py --folder DIR --models 8 --settings float32/1/warm --rules average --minutes 2

Every command is a process of its own, from the start of Python to the end. The floor is `cat` of the inputs to /dev/null.
mergekit is `mergekit-pytorch` of 0.1.5 (n/a where it is not installed); it writes the same files. A setting is the type of
the files, the number of cores (which the processes are bound to, with as many threads), and the cache: warm, with the
inputs in the cache of the system, or cold, without (and without the libraries, where the system allows that).

The three commands take turns, and all rows are repeated until --minutes have passed (or a signal ends it); then the table is
printed. Seconds and processor seconds (of the process and its threads, user and system) are the smallest of the repeats, and
ours / theirs is the median of the ratios of commands that ran one after the other. `import torch` is the part that Python
and torch take before any work. Peak memory is the largest resident set of all repeats, which holds mapped files too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

RULES = {
    "average": ("linear", [], {"weight": 1.0}),
    "task-arithmetic": ("task_arithmetic", ["--set", "scale=0.125"], {"weight": 0.125}),
    "ties": ("ties", ["--set", "scope=tensor", "zero=positive"], {"weight": 1.0, "density": 0.2}),
    "stock": ("model_stock", [], {}),
}
SETTINGS = ("float32/1/warm", "bfloat16/1/warm", "float32/2/warm", "float32/1/cold")
TITLES = "rule | type | cores | cache | runs | cat, s | ours, s | theirs, s | ours / theirs | ours / cat"
TITLES += " | ours, processor s | theirs | ours / theirs | ours, peak MiB | theirs"
CORES = os.sched_getaffinity(0)
DROP = Path("/proc/sys/vm/drop_caches")


class Run(NamedTuple):
    """Of one process. cpu: seconds. peak: bytes."""

    seconds: float
    cpu: float
    peak: int


class Row(NamedTuple):
    rule: str
    dtype: str
    cores: int
    cache: str


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a ViT/16 with 12 blocks of this width: 768 is ViT-B, 384 ViT-S."""
    found: dict[str, tuple[int, ...]] = {"patch.weight": (width, 3, 16, 16), "positions": (197, width)}
    for k in range(12):
        block = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
        for name, shape in block.items():
            found |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
        found |= {f"blocks.{k}.norm{j}.{end}": (width,) for j in (1, 2) for end in ("weight", "bias")}
    return found


def make(files: list[Path], width: int, dtype: str) -> None:
    """A base and models; kept for the next call."""
    import torch
    from safetensors.torch import save_file

    files[0].parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)  # a model's numbers do not depend on which files are there
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(width).items()}
    common = {name: 1e-3 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
    for k, file in enumerate(files):
        if not file.exists():
            generator.manual_seed(1 + k)
            step = {n: common[n] + 1e-3 * torch.randn(x.shape, generator=generator) for n, x in base.items()}
            partial = file.with_suffix(".part")
            save_file({n: (x + step[n] if k else x).to(getattr(torch, dtype)) for n, x in base.items()}, partial)
            partial.rename(file)


def timed(words: list[str], cores: int) -> Run:
    os.sched_setaffinity(0, sorted(CORES)[:cores])  # a process inherits it
    threads = {name: str(cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | threads)
    assert process.stderr is not None
    try:
        error = process.stderr.read()
    except KeyboardInterrupt:
        process.kill()
        process.wait()
        raise
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    os.sched_setaffinity(0, CORES)
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{error.decode()[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def cold(files: list[Path]) -> None:
    """Take the files, or all that can be taken, out of the cache of the system."""
    if os.access(DROP, os.W_OK):
        DROP.write_text("1\n")
        return
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def commands(row: Row, files: list[Path], folder: Path, out: Path) -> dict[str, list[str]]:
    """cat, ours, theirs."""
    method, flags, parameters = RULES[row.rule]
    every = [str(file) for file in files]
    based = ["--base", every[0]] if row.rule != "average" else []
    ours = [sys.executable, "-m", "fastmerge", "merge", row.rule, "--models", *every[1:], *based, *flags]
    about = {"merge_method": method, "dtype": row.dtype}
    about |= {"models": [{"model": name, "parameters": parameters} for name in every[1:]]}
    about |= {"base_model": every[0]} if based else {}
    config = folder / "config.yml"
    config.write_text(json.dumps(about))  # JSON is YAML
    found = {"cat": ["sh", "-c", 'cat "$@" > /dev/null', "cat", *(every if based else every[1:])]}
    found["ours"] = [*ours, "--out", str(out / "merged")]
    if peer := shutil.which("mergekit-pytorch"):
        found["theirs"] = [peer, str(config), str(out / "theirs")]
    return found


def measure(row: Row, files: list[Path], folder: Path) -> dict[str, Run]:
    """One run of each command."""
    out, found = folder / "out", {}
    for name, words in commands(row, files, folder, out).items():
        shutil.rmtree(out, ignore_errors=True)  # of a killed command
        out.mkdir()
        cold(files) if row.cache == "cold" else warm(files)
        try:
            found[name] = timed(words, row.cores)
        finally:
            shutil.rmtree(out)
    return found


def line(row: Row, runs: list[dict[str, Run]]) -> str:
    least = {}
    for name in runs[0]:
        seconds, cpu, peaks = zip(*(run[name] for run in runs), strict=True)
        least[name] = Run(min(seconds), min(cpu), max(peaks))
    ours, floor = least["ours"], least["cat"]
    its_seconds = ratio = its_cpu = cpu_ratio = peak = "n/a"
    if theirs := least.get("theirs"):
        its_seconds, its_cpu, peak = f"{theirs.seconds:.1f}", f"{theirs.cpu:.1f}", f"{theirs.peak / 2**20:.0f}"
        ratio = f"{statistics.median(run['ours'].seconds / run['theirs'].seconds for run in runs):.2f}"
        cpu_ratio = f"{statistics.median(run['ours'].cpu / run['theirs'].cpu for run in runs):.2f}"
    cells = [*map(str, row), str(len(runs)), f"{floor.seconds:.2f}", f"{ours.seconds:.1f}", its_seconds, ratio]
    cells += [
        f"{ours.seconds / floor.seconds:.1f}",
        f"{ours.cpu:.1f}",
        its_cpu,
        cpu_ratio,
        f"{ours.peak / 2**20:.0f}",
        peak,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="TYPE/CORES/CACHE")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--minutes", type=float, default=12, help="no row begins after that")
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    split = [setting.split("/") for setting in given.settings]
    rows = [Row(rule, dtype, int(cores), cache) for dtype, cores, cache in split for rule in given.rules]
    names = [f"{name}.safetensors" for name in ["base", *(f"m{k}" for k in range(given.models))]]
    files = {row.dtype: [given.folder / f"{row.dtype}-{given.width}" / name for name in names] for row in rows}
    for dtype, its in files.items():  # in another process: a command's peak starts with the memory of its parent
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(its, given.width, dtype))
        maker.start()
        maker.join()
    os.sync()  # what is not yet on the disk stays in the cache
    start = time.perf_counter()
    torch = min(timed([sys.executable, "-c", "import torch"], 1) for _ in range(2))
    runs: dict[Row, list[dict[str, Run]]] = {row: [] for row in rows}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while time.perf_counter() - start < 60 * given.minutes:
            row = min(rows, key=lambda row: len(runs[row]))
            runs[row].append(measure(row, files[row.dtype], given.folder))
            seconds = ", ".join(f"{name} {run.seconds:.1f} s" for name, run in runs[row][-1].items())
            print(f"{' '.join(map(str, row))}: {seconds}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        pass
    without = "any cache" if os.access(DROP, os.W_OK) else "the inputs in the cache"
    print(f"{given.models} models; import torch: {torch.seconds:.1f} s, {torch.cpu:.1f} s of processor time;")
    print(f"load average {os.getloadavg()[0]:.1f}; cold: without {without}\n")
    print(f"| {TITLES} |\n|{'---|' * 4}{'--:|' * 11}")
    print("\n".join(line(row, runs[row]) for row in rows if runs[row]))


if __name__ == "__main__":
    main()
