"""Run the quick benchmark; exit code 1 if a row's time relative to a copy grew too much since the committed run.

    python bench/gate.py            # compare with results/cpu-quick.json; .ci/run calls this
    python bench/gate.py --write    # measure and write that file; each row is the median of three runs

Like `compare.py`, it compares x_copy by the row's name: op and copy are of one run, so a slow machine changes both.
Rows that fail are measured once more, alone, before they count. A row that only one of the two runs has fails too: use
`--write` after adding, renaming or removing rows. The suites of threads and those without a copy (training, search)
are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from compare import load
from table import strip, write

BENCH = Path(__file__).resolve().parent
BASELINE = BENCH / "results" / "cpu-quick.json"
LEFT_OUT = "not threads and not training and not search"
KEPT = ("device", "threads", "size", "dtype", "T", "x_copy", "x_copy_median")  # fields of a row in the baseline

Measure = Callable[..., dict]  # (*node ids) -> pytest-benchmark's JSON; no node ids: every row


def measure(*rows: str) -> dict:
    """Run the benchmark in one process with one thread on the CPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        flags = ["--quick", "--rounds=7", "--device=cpu", f"--benchmark-json={path}", "-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *(rows or ["bench", "-k", LEFT_OUT]), *flags]
        result = subprocess.run(command, cwd=BENCH.parent, env=environment, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"the quick benchmark failed:\n{result.stdout[-4000:]}{result.stderr[-2000:]}")
        return json.loads(path.read_text())


def ratios(rows: dict[str, dict]) -> dict[str, float]:
    found = {name: row["extra_info"].get("x_copy") for name, row in rows.items()}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def check(baseline: Path, limit: float, measure: Measure) -> list[str]:
    """Return the problems, one line each."""
    old, run = ratios(load(str(baseline))), measure()
    new = ratios({row["name"]: row for row in run["benchmarks"]})
    fix = "bench/gate.py --write after adding, renaming or removing a row"
    problems = [f"{name}: in {baseline.name}, not in this run ({fix})" for name in old if name not in new]
    problems += [f"{name}: in this run, not in {baseline.name} ({fix})" for name in new if name not in old]
    node = {row["name"]: row["fullname"] for row in run["benchmarks"]}

    def slower():
        return [name for name in old if name in new and new[name] > limit * old[name]]

    if suspects := slower():
        print(f"measured once more: {', '.join(suspects)}")
        again = ratios({row["name"]: row for row in measure(*(node[name] for name in suspects))["benchmarks"]})
        new |= {name: min(new[name], again[name]) for name in suspects}
    for name in old:
        if name in new:
            print(f"{new[name] / old[name]:7.2f}  {name}  {new[name]:.2f} copies, {old[name]:.2f} in {baseline.name}")
    for name in slower():
        grown = f"{new[name]:.2f} copies, {new[name] / old[name]:.2f} times the {old[name]:.2f} of {baseline.name}"
        problems.append(f"{name}: {grown}; the limit is {limit:g} times")
    return problems


def record(baseline: Path, measure: Measure, runs: int = 3) -> None:
    """Write the last run with the median ratios of all runs."""
    found = [measure() for _ in range(runs)]
    rows = [{row["name"]: row for row in run["benchmarks"]} for run in found]
    kept = strip(found[-1])
    kept["benchmarks"] = [row for row in kept["benchmarks"] if row["name"] in ratios(rows[-1])]
    for row in kept["benchmarks"]:
        info = {key: row["extra_info"][key] for key in KEPT if key in row["extra_info"]}
        for key in ("x_copy", "x_copy_median"):
            info[key] = round(statistics.median(run[row["name"]]["extra_info"][key] for run in rows), 3)
        row["extra_info"] = info
    write(kept, baseline)


def main(arguments: list[str] | None = None, measure: Measure = measure) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--limit", type=float, default=2.5, help="x_copy may grow by this factor")
    parser.add_argument("--write", action="store_true", help="write the baseline instead of comparing with it")
    options = parser.parse_args(arguments)
    if options.write:
        record(options.baseline, measure)
        return 0
    problems = check(options.baseline, options.limit, measure)
    print("\n".join(problems) or f"no row's ratio to a copy grew {options.limit:g}-fold")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
