"""Flag regressions between two benchmark runs: exit code 1 if a row's slowdown exceeds the threshold, else 0.

    python bench/compare.py OLD.json NEW.json [--threshold 1.15] [--by x_copy|min|median]

--by x_copy (default) compares the time relative to a copy in the same run, so the machine may be slower or shared.
Rows without a copy (the search step) use the minimum. min and median compare seconds: use the same, idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def load(path: str) -> dict[str, dict]:
    try:
        rows = json.loads(Path(path).read_text())["benchmarks"]
        return {row["name"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: expected a JSON file of pytest-benchmark (--benchmark-json): {error!r}")


def value(row: dict, by: str) -> float:
    ratio = row.get("extra_info", {}).get("x_copy")
    if by == "x_copy" and ratio is not None:
        return ratio
    return row["stats"]["median" if by == "median" else "min"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=1.15, help="a slowdown above this factor is a regression")
    parser.add_argument("--by", choices=("x_copy", "min", "median"), default="x_copy")
    options = parser.parse_args(arguments)
    old, new = load(options.old), load(options.new)
    common = [name for name in old if name in new]
    if not common:
        sys.exit(f"{options.old} and {options.new} have no row in common")
    slower = 0
    for name in common:
        ratio = value(new[name], options.by) / value(old[name], options.by)
        verdict = "SLOWER" if ratio > options.threshold else "faster" if ratio < 1 / options.threshold else ""
        slower += verdict == "SLOWER"
        print(f"{ratio:7.2f}  {name}  {verdict}".rstrip())
    for title, missing in (("only in OLD", old.keys() - new.keys()), ("only in NEW", new.keys() - old.keys())):
        for name in sorted(missing):
            print(f"      -  {name}  {title}")
    print(f"{slower} of {len(common)} rows slower than {options.threshold} x")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
