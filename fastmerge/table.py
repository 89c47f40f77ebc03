"""One table of several run folders: python -m fastmerge table runs/a runs/b"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.errors import UserError
from fastmerge.report import results_rows, results_table
from fastmerge.results import read_json, read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the folders in `argv`; returns the exit code (2: a folder has no readable results)."""
    from rich.console import Console

    parser = argparse.ArgumentParser(
        prog="fastmerge table",
        description="Join the results of several run folders into one table.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or its results.json")
    paths = list(dict.fromkeys(parser.parse_args(argv).runs))
    try:
        rows = joined_rows(paths)
        different = differing(paths)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 2 + sum(
            3 + max(map(len, column)) for column in zip(*rows, strict=True)
        )  # cut no number in a file
    console.print(results_table(rows)[0])
    for line in different:
        console.print(line, markup=False)
    return 0


def joined_rows(paths: Sequence[Path]) -> list[list[str]]:
    """The rows of `results_rows` for every run folder or results.json, with its name in front; one header.

    Raises:
        UserError: a folder has no readable results.
    """
    tables = [results_rows(*read_run(path)) for path in paths]
    titles = max((table[0] for table in tables), key=len)  # skipped images are a column only where there are some
    rows = [["run", *titles]]
    for name, (_, *body) in zip(names(paths), tables, strict=True):
        rows += [[name, *row, *[""] * (len(titles) - len(row))] for row in body]
    return rows


def names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, as many parts as tell them apart."""
    folders = [(path.parent if path.is_file() else path).absolute().parts for path in paths]
    longest = max(map(len, folders))
    for parts in range(1, longest + 1):
        found = ["/".join(folder[-parts:]) for folder in folders]
        if len(set(found)) == len(found):
            return found
    return [str(path) for path in paths]


def differing(paths: Sequence[Path]) -> list[str]:
    """Lines that say in which settings and contents the folders differ, so that nobody compares what cannot be compared."""
    known: dict[str, dict[str, Any]] = {}
    for name, path in zip(names(paths), paths, strict=True):
        manifest = (path.parent if path.is_file() else path) / "manifest.json"
        if manifest.exists():
            values = read_json(manifest, "the manifest.json of a run")
            about = values.get("determines") if isinstance(values, dict) else None
            if isinstance(about, dict) and all(isinstance(about.get(part), dict) for part in ("settings", "contents")):
                known[name] = about["contents"] | about["settings"]
    if len(known) < 2:
        return []
    keys = list(dict.fromkeys(key for values in known.values() for key in values))
    different = [key for key in keys if len({repr(values.get(key)) for values in known.values()}) > 1]
    return [f"the runs differ in: {', '.join(different)}"] if different else []


if __name__ == "__main__":
    sys.exit(main())
