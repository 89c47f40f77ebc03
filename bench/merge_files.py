"""`fastmerge merge` beside mergekit's own command on the same files: time as a multiple of reading the inputs once,
peak memory.

    python bench/merge_files.py --models 8 --width 768 --folder DIR

Every command is a process of its own, from the start of Python to the end, with the files in the cache of the system.
The floor is `cat` of the inputs to /dev/null. mergekit is `mergekit-pytorch` of 0.1.5 (n/a where it is not installed);
it writes the same files. Commands take turns; the smallest of --repeats counts. Processor time is that of the process and
its threads, user and system: it says more than seconds where other programs share the cores. `import torch` is the part of
it that Python and torch take before any work. Peak memory is the largest resident set, which holds mapped files too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

RULES = {
    "average": ("linear", [], {"weight": 1.0}),
    "task-arithmetic": ("task_arithmetic", ["--set", "scale=0.125"], {"weight": 0.125}),
    "ties": ("ties", ["--set", "scope=tensor", "zero=positive"], {"weight": 1.0, "density": 0.2}),
    "stock": ("model_stock", [], {}),
}


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a ViT/16 with 12 blocks of this width: 768 is ViT-B, 384 ViT-S."""
    found: dict[str, tuple[int, ...]] = {"patch.weight": (width, 3, 16, 16), "positions": (197, width)}
    for k in range(12):
        block = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
        for name, shape in block.items():
            found |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
        found |= {f"blocks.{k}.norm{j}.{end}": (width,) for j in (1, 2) for end in ("weight", "bias")}
    return found


def make(files: list[Path], width: int, dtype: torch.dtype) -> None:
    """A base and models; kept for the next call."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(width).items()}
    common = {name: 1e-3 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
    for k, file in enumerate(files):
        if not file.exists():
            step = {n: common[n] + 1e-3 * torch.randn(x.shape, generator=generator) for n, x in base.items()}
            save_file({n: (x + step[n] if k else x).to(dtype) for n, x in base.items()}, file)


def timed(words: list[str]) -> tuple[float, float, int]:
    """(seconds, processor seconds, peak resident bytes) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, error = process.communicate() if process.stderr is None else (None, process.stderr.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{error.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    folder, dtype = given.folder / given.dtype, getattr(torch, given.dtype)
    files = [folder / f"{name}.safetensors" for name in ["base", *(f"m{k}" for k in range(given.models))]]
    # another process makes the files: a command's peak starts with the memory of the process that starts it
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(files, given.width, dtype))
    maker.start()
    maker.join()
    base, *models = files
    every, out = [str(file) for file in (base, *models)], given.folder / "out"
    peer = shutil.which("mergekit-pytorch")
    seconds, cpu, _ = map(
        min, zip(*(timed([sys.executable, "-c", "import torch"]) for _ in range(given.repeats)), strict=True)
    )
    print(f"import torch: {seconds:.1f} s, {cpu:.1f} s of processor time; load average {os.getloadavg()[0]:.0f}\n")
    names = "".join(f" {who}, s | x cat | processor, s | peak, MiB |" for who in ("fastmerge", "mergekit"))
    print(f"| rule | cat, s | processor, s |{names}\n|---|{'--:|' * 10}")
    for rule in given.rules:
        method, flags, parameters = RULES[rule]
        based = ["--base", every[0]] if rule != "average" else []
        ours = [sys.executable, "-m", "fastmerge", "merge", rule, "--models", *every[1:], *based, *flags, "--out"]
        about = {"merge_method": method, "dtype": given.dtype}
        about |= {"models": [{"model": name, "parameters": parameters} for name in every[1:]]}
        about |= {"base_model": every[0]} if based else {}
        config = given.folder / "config.yml"
        config.write_text(json.dumps(about))  # JSON is YAML
        commands = {"cat": ["sh", "-c", 'cat "$@" > /dev/null', "cat", *(every if based else every[1:])]}
        commands["ours"] = [*ours, str(out / "merged")]
        if peer:
            commands["mergekit"] = [peer, str(config), str(out / "theirs")]
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
        for _ in range(given.repeats):
            for name, words in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                found[name].append(timed(words))
        shutil.rmtree(out)
        floor, reading, _ = map(min, zip(*found["cat"], strict=True))
        cells = [f"{floor:.2f}", f"{reading:.2f}"]
        for name in ("ours", "mergekit"):
            if runs := found.get(name):
                seconds, cpu, peak = map(min, zip(*runs, strict=True))
                cells += [f"{seconds:.1f}", f"{seconds / floor:.1f}", f"{cpu:.1f}", f"{peak / 2**20:.0f}"]
            else:
                cells += ["n/a"] * 4
        print(f"| {rule} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
