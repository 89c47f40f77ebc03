"""Everything that has to be measured on a GPU, in parts of at most 8 minutes.

    python bench/gpu.py                       # all parts, each in a process of its own
    python bench/gpu.py --part 2              # one part
    python bench/gpu.py --join                # only writes the table from the parts measured so far

Needs torch, triton, numba, numpy, timm and pytest, but no open_clip. Every part adds what it measured to
`bench/results/<gpu>.json` and writes `bench/results/<gpu>.md` from all parts. What was not measured is n/a. Exit code 2: no
GPU. 1: a part failed.

Ops are timed by CUDA graphs: *kernel* is the time of a call inside a graph of many, without the host; *call* is the time per
call where the host queues many. A share is the time of a copy of the same number of bytes, also in a graph, divided by the
kernel's. The projection takes the measured rates and the counts of images of the main job, ImageNet in 100 tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

from measure import Vectors, copier  # noqa: E402

SECONDS = 480  # of a part
TRAIN, TEST, TASKS = 1_281_167, 50_000, 100  # images of ImageNet, tasks of the main job
PRECISIONS = ("fp32", "tf32", "bf16")
TARGETS = {"one pass": 0.90, "random": 0.85}  # of a copy's bandwidth
RANDOM_RULES = ("random_mix", "dare")


# -- clocks ------------------------------------------------------------------------------------------------------------


def kernel_seconds(call: Callable[[], object], device: torch.device, calls: int) -> float | None:
    """Seconds per call in a CUDA graph of `calls` calls, the fastest of 7 replays; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and makes the tables that stay on the device
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(8):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / calls)
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds per call of `calls` calls in a queue, the fastest of 5 times."""
    call()
    times = []
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


# -- parts -------------------------------------------------------------------------------------------------------------


def run_tests(device: torch.device) -> dict[str, Any]:
    """Run the tests that need a GPU; those of the trainer need open_clip and are skipped without."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"tests": {"exit": 1, "names": [f"stopped after {SECONDS} s"]}}
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return {"tests": {"exit": done.returncode, **counts, "names": failed}}


def op_rows(device: torch.device, suite: str, sizes: tuple[str, ...], dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Time the cases of a suite. suite: 'one pass', 'random' or 'rules'."""
    if suite == "one pass":
        from test_speed_one_pass import OPS as cases
    elif suite == "random":
        from test_speed_random import OPS as cases
    else:
        from test_speed_rules import RULES as cases
    rows = []
    for size in sizes:
        for dtype in dtypes:
            for make in cases:
                with torch.no_grad():
                    rows.append(op_row(make, suite, device, size, dtype))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return {"ops": rows}


def op_row(make: Callable, suite: str, device: torch.device, size: str, dtype: str) -> dict[str, Any]:
    vectors, name = Vectors(device, size, dtype), make.__name__
    if suite == "rules":
        base = vectors.normal()
        case = make(vectors, base, vectors.models(8, base), torch.empty_like(base))
    else:
        case = make(vectors)
    moved = case.bytes * vectors.bytes
    calls = max(1, min(50, int(2e9 / moved)))
    copy, factor = copier(moved, device)
    kind = "random" if suite == "random" or name in RANDOM_RULES else "one pass"
    row = {
        "op": name + (" T=8" if suite == "rules" else ""),
        "kind": kind,
        "size": size,
        "dtype": dtype,
        "bytes": moved,
    }
    row["kernel_s"] = kernel_seconds(case.run, device, calls)
    copied = kernel_seconds(copy, device, calls)
    row["copy_s"] = None if copied is None else copied * factor
    row["call_s"] = call_seconds(case.run, device, calls)
    return row


def rates(
    device: torch.device, compiled: bool, model: str = "86M", batch: int = 128, steps: int = 10
) -> dict[str, Any]:
    """Images per second and peak memory of training, search and evaluation, per precision."""
    found: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        for kind in ("train", "search", "evaluate"):
            row: dict[str, Any] = {"step": kind, "precision": precision, "compile": compiled, "batch": batch}
            try:
                row |= rate(kind, model, batch, precision, compiled, device, steps)
            except Exception as error:  # out of memory, a precision that the device lacks: say so in the table
                row["not_measured"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            found.append(row)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {"rates": found}


def rate(
    kind: str, model: str, batch: int, precision: str, compiled: bool, device: torch.device, steps: int
) -> dict[str, Any]:
    from models import start

    from fastmerge.methods.trm import TRM
    from fastmerge.training import Train

    flags = [f"--precision={precision}", f"--compile={str(compiled).lower()}"]
    learner, task, images = start(model, batch, device, *flags)
    if kind == "evaluate":
        plain = learner.plain(images.images)

        def step(i: int) -> object:
            with torch.inference_mode():
                return learner.backbone(plain)

    elif kind == "train":
        step = Train(learner, task, images).step
    else:
        method = TRM(learner)
        during = method.begin(task)
        learner.theta.add_(0.01 * learner.theta * torch.randn_like(learner.theta))
        search = method.merge(task, images, during)
        assert search is not None
        step = search.step
    for i in range(3):
        step(i)
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start_time = time.perf_counter()
    for i in range(3, 3 + steps):
        step(i)
    synchronise(device)
    seconds = (time.perf_counter() - start_time) / steps
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": seconds, "images_per_s": batch / seconds, "peak_bytes": peak}


DTYPES = ("fp32", "bf16")
PARTS: dict[int, tuple[str, Callable[[torch.device], dict[str, Any]]]] = {
    1: ("tests that need a GPU", run_tests),
    2: ("ops, one pass", lambda device: op_rows(device, "one pass", ("86M",), DTYPES)),
    3: ("ops with random numbers", lambda device: op_rows(device, "random", ("86M",), DTYPES)),
    4: ("rules over 8 models", lambda device: op_rows(device, "rules", ("86M",), DTYPES)),
    5: ("training, search and evaluation of ViT-B/16", lambda device: rates(device, False)),
    6: ("the same, compiled", lambda device: rates(device, True)),
}


# -- the table ---------------------------------------------------------------------------------------------------------


def projection(rows: list[dict[str, Any]], epochs: int, merge_epochs: int) -> list[tuple[str, dict[str, float | None]]]:
    """Hours of the main job by measured rates, for every precision whose three rates are known; None where one is not."""
    table = []
    for precision in PRECISIONS:
        for compiled in (False, True):
            mine = {
                r["step"]: r.get("images_per_s")
                for r in rows
                if (r["precision"], r["compile"]) == (precision, compiled)
            }
            if not mine:
                continue
            later = TRAIN * (TASKS - 1) / TASKS  # the first task is not merged
            tests = TEST / TASKS * TASKS * (TASKS + 1) / 2 + TEST  # all tasks so far after each task, and zero-shot
            images = {"train": TRAIN * epochs, "search": later * merge_epochs, "evaluate": 2 * later + tests}
            hours = {k: n / mine[k] / 3600 if mine.get(k) else None for k, n in images.items()}
            known = [h for h in hours.values() if h is not None]
            hours["sum"] = sum(known) if len(known) == len(images) else None
            table.append((precision + (", compiled" if compiled else ""), hours))
    return table


def number(x: float | None, form: str) -> str:
    return "n/a" if x is None else format(x, form)


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(record: dict[str, Any], epochs: int, merge_epochs: int) -> str:
    """The table of all parts measured so far. Nothing in it is estimated; the projection is arithmetic on measured rates."""
    parts = record["parts"]
    machine = ", ".join(f"{k} {v or 'n/a'}" for k, v in record["versions"].items())
    lines = [
        f"{record['gpu']}; {machine}; commit {record['commit'] or 'n/a'}.",
        "Made by `python bench/gpu.py`, which says how.",
        "",
    ]
    missing = [f"{n} ({PARTS[n][0]})" for n in PARTS if str(n) not in parts]
    if missing:
        lines += [f"Not measured: parts {', '.join(missing)}.", ""]
    tests = parts.get("1", {}).get("tests")
    if tests is not None:
        names = f": {', '.join(tests['names'])}" if tests["names"] else ""
        counts = [f"{tests.get(word, 0)} {word}" for word in ("passed", "failed", "error", "skipped")]
        lines += ["## Tests that need a GPU", "", f"{', '.join(counts)}{names}.", ""]
    ops = [row for n in ("2", "3", "4") for row in parts.get(n, {}).get("ops", [])]
    if ops:
        lines += ["## Ops", "", line("op", "size", "dtype", "kernel ms", "call ms", "GB/s", "of copy", "target")]
        lines += [line("---", "---", "---", *["--:"] * 5)]
        for row in ops:
            kernel, copy = row["kernel_s"], row["copy_s"]
            share = copy / kernel if kernel and copy else None
            lines.append(
                line(
                    row["op"], row["size"], row["dtype"], number(kernel and 1e3 * kernel, ".3f"),
                    number(1e3 * row["call_s"], ".3f"), number(row["bytes"] / kernel / 1e9 if kernel else None, ".0f"),
                    number(share, ".2f"),
                    f"{TARGETS[row['kind']]:.2f}" + (" missed" if share is not None and share < TARGETS[row["kind"]] else ""),
                )
            )  # fmt: skip
        lines.append("")
    rows = [row for n in ("5", "6") for row in parts.get(n, {}).get("rates", [])]
    if rows:
        lines += [
            "## ViT-B/16",
            "",
            line("step", "precision", "compiled", "batch", "images/s", "ms", "peak GiB", "note"),
        ]
        lines += [line("---", "---", "---", *["--:"] * 4, "---")]
        for row in rows:
            seconds, peak = row.get("seconds"), row.get("peak_bytes")
            lines.append(
                line(
                    row["step"], row["precision"], "yes" if row["compile"] else "no", str(row["batch"]),
                    number(row.get("images_per_s"), ".0f"), number(seconds and 1e3 * seconds, ".1f"),
                    number(peak and peak / 2**30, ".1f"), row.get("not_measured", ""),
                )
            )  # fmt: skip
        lines += ["", "## Projected hours of the main job", ""]
        lines += [
            f"ImageNet in {TASKS} tasks, {epochs} + {merge_epochs} epochs, TRM, by the rates above; decoding not counted.",
            "",
        ]
        lines += [line("precision", "train", "search", "teacher and evaluation", "sum"), line("---", *["--:"] * 4)]
        for name, hours in projection(rows, epochs, merge_epochs):
            lines.append(line(name, *(number(hours[k], ".1f") for k in ("train", "search", "evaluate", "sum"))))
        lines.append("")
    return "\n".join(lines)


# -- files and the command line ----------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def read(path: Path, gpu: str) -> dict[str, Any]:
    """The record of this GPU; a new one if the file is missing. Raises SystemExit if another commit's parts are in it."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    new = {"gpu": gpu, "versions": versions(), "commit": commit, "parts": {}}
    if not path.exists():
        return new
    record = json.loads(path.read_text())
    if any(record[key] != new[key] for key in ("gpu", "versions", "commit")):
        raise SystemExit(
            f"{path}: has parts measured with {record['gpu']}, {record['versions']}, commit {record['commit']}; "
            f"this is {new['gpu']}, {new['versions']}, commit {new['commit']}. Move the file away to measure all parts again."
        )
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the record and its table."""
    from fastmerge.config import Config

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    settings = Config().training
    path.with_suffix(".md").write_text(markdown(record, settings.epochs, settings.merge_epochs))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", type=int, choices=PARTS, help="; ".join(f"{n}: {name}" for n, (name, _) in PARTS.items())
    )
    parser.add_argument("--join", action="store_true", help="write the table from the parts measured so far")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the two files")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no CUDA device; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = options.results / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")
    if options.part is None and not options.join:
        flags = ["--results", str(options.results)]
        codes = []
        for part, (name, _) in PARTS.items():
            print(f"part {part}: {name}", flush=True)
            command = [sys.executable, __file__, "--part", str(part), *flags]
            try:
                codes.append(subprocess.run(command, timeout=SECONDS + 60).returncode)
            except subprocess.TimeoutExpired:
                print(f"part {part} took more than {SECONDS + 60} s and was stopped", file=sys.stderr)
                codes.append(1)
        print(path.with_suffix(".md"))
        return int(any(codes))
    record = read(path, gpu)
    if options.part is not None:
        record["parts"][str(options.part)] = PARTS[options.part][1](device)
    write(path, record)
    print(path.with_suffix(".md"))
    return int(bool(record["parts"].get("1", {}).get("tests", {}).get("exit", 0))) if options.part == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
