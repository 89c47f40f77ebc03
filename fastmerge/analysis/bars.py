"""Accuracy, forgetting and plasticity of the methods of finished runs, side by side (P&M, Figure 1).

The numbers are those of all finished runs in a run folder; each folder gets one row of bars.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from fastmerge.analysis.figure import Output, save
from fastmerge.results import names, read_run

COLUMNS = ("run", "method", "metric", "mean", "deviation", "seeds")
METRICS = {"final_accuracy": "final accuracy", "forgetting": "forgetting", "plasticity": "plasticity"}


def bars(folders: Sequence[Path], out: Output) -> list[Path]:
    """Write `bars.csv` (COLUMNS; percent; sample deviation over the seeds, 0 for one seed) and its plot.

    Raises:
        UserError: a folder has no readable results.
    """
    rows = [row for folder, name in zip(folders, names(folders), strict=True) for row in read(folder, name)]
    size = (11, 0.6 + len(folders) * 2.6)
    return save(out, "bars", COLUMNS, rows, lambda figure: draw(figure, rows), size)


def read(folder: Path, name: str) -> list[tuple]:
    """Rows of COLUMNS for one run folder; an undefined metric (forgetting with one task) has no row."""
    found = []
    for method, seeds in read_run(folder)[0].items():
        for metric in METRICS:
            values = [result[metric] for result in seeds.values() if result[metric] is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                found.append((name, method, metric, statistics.mean(values), spread, len(values)))
    return found


def draw(figure, rows: list[tuple]) -> None:
    runs = list(dict.fromkeys(r[0] for r in rows))
    grid = figure.subplots(len(runs), len(METRICS), squeeze=False)
    for run, line in zip(runs, grid, strict=True):
        for axes, (metric, title) in zip(line, METRICS.items(), strict=True):
            mine = [r for r in rows if r[0] == run and r[2] == metric]
            places = range(len(mine))
            colours = [f"C{k % 10}" for k in places]
            axes.barh(places, [r[3] for r in mine], xerr=[r[4] for r in mine], color=colours, capsize=3)
            axes.set_yticks(
                places, [r[1] for r in mine] if metric == "final_accuracy" else [""] * len(mine), fontsize=8
            )
            axes.invert_yaxis()
            axes.set_title(f"{run}: {title} (%)", fontsize=9)
            axes.grid(alpha=0.3, axis="x")
