"""Join the results of several run folders into one table.

fastmerge table runs/a runs/b
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.report import results_rows
from fastmerge.results import names, read_json, read_run


def main(argv: Sequence[str]) -> int:
    """Run `fastmerge table`; returns the exit code.

    Raises:
        UserError: a folder has no readable results.
    """
    parser = argparse.ArgumentParser(
        prog="fastmerge table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or its results.json")
    paths = list(dict.fromkeys(parser.parse_args(argv).runs))
    rows, different = joined_rows(paths), differing(paths)
    from fastmerge.console import Console  # imports torch: not for a wrong folder

    console = Console()
    console.table(rows)
    for line in different:
        console.line(line)
    return 0


def joined_rows(paths: Sequence[Path]) -> list[list[str]]:
    """The rows of `results_rows` for every run folder or results.json, with its name in front; one header.

    Raises:
        UserError: a folder has no readable results.
    """
    tables = [results_rows(*read_run(path)) for path in paths]
    titles = max((table[0] for table in tables), key=lambda header: len(header)).copy()
    for table in tables:  # some columns are only where there is something in them
        for k, title in enumerate(table[0]):
            if title not in titles:
                titles.insert(titles.index(table[0][k - 1]) + 1, title)
    rows = [["run", *titles]]
    for name, (header, *body) in zip(names(paths), tables, strict=True):
        cells = (dict(zip(header, row, strict=True)) for row in body)
        rows += [[name, *(row.get(title, "") for title in titles)] for row in cells]
    return rows


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
