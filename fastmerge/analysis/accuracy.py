"""Accuracy after every task of finished runs, against the number of tasks (TRM, Figure 6).

    python -m fastmerge --method trm magmax finetune --protocol strict --seeds 0 1 2 --run-dir runs/a
    python -m fastmerge analyse accuracy runs/a
    python -m fastmerge analyse accuracy runs/a runs/b

The accuracy after task t is over all test images of the tasks seen (micro average), as in the run's own plot, which this
one is for any number of folders: a line for every method, the mean over the seeds, and a band from the least to the largest
(with up to ten lines). Joint training is one value, and a horizontal line.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from fastmerge.analysis.figure import Output, save, with_legend
from fastmerge.plots import ZERO_SHOT, Curves, curves, draw_accuracy
from fastmerge.results import names, read_run

COLUMNS = ("line", "tasks", "mean", "least", "largest", "seeds")
ALL = "all"


def accuracy(folders: Sequence[Path], out: Output) -> list[Path]:
    """Write `accuracy.csv` (COLUMNS; tasks: number learned, 'all' for joint training; percent) and its plot.

    Raises:
        UserError: a folder has no readable results.
    """
    lines: Curves = {}
    for folder, name in zip(folders, names(folders), strict=True):
        for line, runs in curves(*read_run(folder)).items():
            if line == ZERO_SHOT and runs in lines.values():
                continue  # the same start
            lines[f"{name}: {line}" if len(folders) > 1 else line] = runs
    rows = [
        (line, t if len(runs[0]) > 1 else ALL, statistics.mean(found), min(found), max(found), len(found))
        for line, runs in lines.items()
        for t, found in enumerate(zip(*runs, strict=True), start=1)
    ]
    return save(out, "accuracy", COLUMNS, rows, lambda figure: draw_accuracy(figure, lines), with_legend(len(lines)))
