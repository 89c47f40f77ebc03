"""The output of every analysis: NAME.csv with the numbers, NAME.png and NAME.pdf with their plot.

Both pictures name the command that made them in their metadata (PNG: Description, PDF: Subject) and are the same bytes
every time. Lines differ in dash and marker, points in marker and filling, so that a plot can be read in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import save_csv, write_atomically

DASHES = ("-", "--", ":", "-.")
MARKERS = "os^DvPX*<>phd"  # 13 and 4 have no common factor: 52 pairs
FILLINGS = ("full", "none", "left", "bottom")


@dataclass(frozen=True)
class Output:
    """folder: for the files; it exists. command: what the user typed."""

    folder: Path
    command: str


def line_style(k: int) -> dict[str, Any]:
    """How line k of a plot looks; 52 lines differ without their colours."""
    return {"linestyle": DASHES[k % len(DASHES)], "marker": MARKERS[k % len(MARKERS)], "color": f"C{k % 10}", "ms": 4}


def point_style(k: int) -> dict[str, Any]:
    """How point k of a plot looks; 52 points differ without their colours."""
    filling = FILLINGS[k // len(MARKERS) % len(FILLINGS)]
    colour = f"C{k % 10}"
    return {
        "linestyle": "none",
        "marker": MARKERS[k % len(MARKERS)],
        "color": colour,
        "fillstyle": filling,
        "markerfacecoloralt": "w",
    }


def with_legend(lines: int) -> tuple[float, float]:
    """Inches of a plot with a legend beside it that has so many lines."""
    return 9, max(4.2, 0.3 + 0.18 * lines)


def save(out: Output, name: str, columns: Sequence[str], rows: Sequence[Sequence], draw: Callable, size) -> list[Path]:
    """Write the three files; returns their paths. draw(figure) fills a matplotlib Figure of `size` inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no state shared with the user's pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    command = out.command.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no text
    about: dict[str, dict[str, Any]] = {
        "png": {"Title": name, "Description": command},
        "pdf": {"Title": name, "Subject": command, "CreationDate": None},
    }
    paths = [out.folder / f"{name}.{kind}" for kind in ("csv", *about)]
    save_csv(paths[0], columns, rows)
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # publishers refuse the default, Type 3
        for path, (kind, metadata) in zip(paths[1:], about.items(), strict=True):
            write_atomically(path, partial(figure.savefig, format=kind, dpi=120, metadata=metadata))
    return paths
