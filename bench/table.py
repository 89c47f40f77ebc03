"""Print a benchmark run as a Markdown table; with --strip also write a small JSON file to commit (for compare.py).

python bench/table.py RUN.json [--strip bench/results/NAME.json] > bench/results/NAME.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COLUMNS = (
    ("ms", "ms"),
    ("GB/s", "GB/s"),
    ("x copy", "x_copy"),
    ("of copy", "copy_fraction"),
    ("x models", "x_models"),
    ("extra models", "extra_models"),
    ("eager", "speedup_eager"),
    ("compile", "speedup_compile"),
    ("mergekit", "speedup_mergekit"),
    ("peft", "speedup_peft"),
    ("exact", "speedup_exact"),
    ("none", "speedup_none"),
    ("tangent", "speedup_tangent"),
    ("fisher", "speedup_fisher"),
    ("tangent memory", "memory_tangent"),
    ("fisher memory", "memory_fisher"),
    ("one thread", "speedup_one"),
    ("images/s", "images/s"),
    ("vmap", "speedup_vmap"),
    ("loop", "speedup_loop"),
    ("lora step", "speedup_lora"),
)


def strip(run: dict) -> dict:
    """Keep what the table and compare.py need, without paths and the machine's name."""
    machine = run["machine_info"]
    kept = {key: machine[key] for key in ("versions", "threads", "gpu", "python_version", "system") if key in machine}
    cpu = machine.get("cpu")
    kept["cpu"] = cpu.get("brand_raw") if isinstance(cpu, dict) else cpu  # a stripped file has only the name
    rows = [
        {
            "name": row["name"],
            "extra_info": row["extra_info"],
            "stats": {key: row["stats"][key] for key in ("min", "median", "rounds")},
        }
        for row in run["benchmarks"]
    ]
    commit = {"id": run["commit_info"].get("id")}
    return {"machine_info": kept, "commit_info": commit, "datetime": run["datetime"], "benchmarks": rows}


def markdown(run: dict) -> str:
    machine, rows = run["machine_info"], run["benchmarks"]
    versions = ", ".join(f"{name} {version or 'n/a'}" for name, version in machine["versions"].items())
    head = f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} thread(s); {versions}; "
    head += f"commit {run['commit_info']['id']}; {run['datetime'][:10]}"
    columns = [c for c in COLUMNS if any(row["extra_info"].get(c[1]) is not None for row in rows)]
    lines = [head, "", " | ".join(["| row", *(title for title, _ in columns)]) + " |"]
    lines.append("|---" + "|--:" * len(columns) + "|")
    for row in rows:
        cells = [row["extra_info"].get(key) for _, key in columns]
        cells = ["n/a" if x is None else f"{x:g}" for x in cells]
        lines.append(" | ".join(["| " + row["name"].removeprefix("test_"), *cells]) + " |")
    return "\n".join(lines)


def write(run: dict, path: str | Path) -> None:
    """Write the run with one row per line."""
    rows = ",\n".join(json.dumps(row) for row in run["benchmarks"])
    head = json.dumps({**run, "benchmarks": []})
    Path(path).write_text(head.replace('"benchmarks": []', f'"benchmarks": [\n{rows}\n]') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--strip")
    options = parser.parse_args()
    run = strip(json.loads(Path(options.run).read_text()))
    if options.strip:
        write(run, options.strip)
    print(markdown(run))


if __name__ == "__main__":
    main()
