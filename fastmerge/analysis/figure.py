"""The output of every analysis: NAME.csv with the numbers and NAME.png with their plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from fastmerge.checkpoint import write_atomically


def save(out: Path, name: str, columns: Sequence[str], rows: Sequence[Sequence], draw: Callable, size) -> list[Path]:
    """Write both into `out`; returns their paths. draw(figure) fills a matplotlib Figure of `size` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no state shared with the user's pyplot
    from matplotlib.figure import Figure

    def table(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows])

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    paths = [out / f"{name}.csv", out / f"{name}.png"]
    write_atomically(paths[0], table)
    write_atomically(paths[1], lambda path: figure.savefig(path, format="png", dpi=120))
    return paths
