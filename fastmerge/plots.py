"""Plots of a finished command: one accuracy matrix per run, and one plot of accuracy over tasks for all methods."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.analysis.figure import line_style, with_legend
from fastmerge.checkpoint import write_atomically
from fastmerge.evaluate import micro
from fastmerge.results import folder_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZERO_SHOT = "zero-shot"
MOST_BANDS = 10
INK = "#101010"  # of numbers on a coloured cell; what is black elsewhere may follow the page


def draw(folder: Path, methods: dict[str, dict[str, Any]], zero_shot: dict[str, Any] | None) -> list[Path]:
    """Write the plots of `methods[name][seed]` (results as in results.json) as PNG into `folder`; returns their paths."""
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures(methods, zero_shot):
        paths.append(folder / f"{name}.png")
        write_atomically(paths[-1], partial(figure.savefig, format="png", dpi=120))
    return paths


def figures(methods: dict[str, dict[str, Any]], zero_shot: dict[str, Any] | None) -> Iterator[tuple[str, Figure]]:
    """The plots of `methods[name][seed]` with their names: a matrix for every run, then the accuracy of all."""
    from matplotlib.figure import Figure  # by itself: no display, and no state shared with the user's pyplot

    for method, seeds in methods.items():
        for seed, result in seeds.items():
            matrix = [[float("nan") if r is None else r for r in row] for row in result["accuracy_matrix"]]
            if len(matrix) == 1:
                continue  # joint training: a single number
            figure = Figure(figsize=(5.2, 4.4), layout="constrained")
            axes = figure.add_subplot()
            image = axes.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
            if len(matrix) <= 12:
                for i, row in enumerate(matrix):
                    for j, value in enumerate(row):
                        if value == value:
                            axes.text(
                                j,
                                i,
                                f"{value:.0f}",
                                ha="center",
                                va="center",
                                color="w" if value < 60 else INK,
                                fontsize=8,
                            )
            axes.set(xlabel="test images of task", ylabel="after task", title=f"{method}, seed {seed}: accuracy (%)")
            ticks = range(0, len(matrix), max(1, len(matrix) // 10))
            axes.set_xticks(ticks, [str(t + 1) for t in ticks])
            axes.set_yticks(ticks, [str(t + 1) for t in ticks])
            figure.colorbar(image, ax=axes)
            yield f"matrix-{folder_name(method, seed)}", figure

    lines = curves(methods, zero_shot)
    figure = Figure(figsize=with_legend(len(lines)), layout="constrained")
    draw_accuracy(figure, lines)
    yield "accuracy", figure


Curves = dict[str, list[list[float]]]  # of a line: A_t in percent after every task, for every seed


def curves(methods: dict[str, dict[str, Any]], zero_shot: dict[str, Any] | None) -> Curves:
    """The curves of `methods[name][seed]`, before them that of the starting model; joint training has one value."""
    found = {name: [seen_accuracy(result) for result in seeds.values()] for name, seeds in methods.items()}
    return {ZERO_SHOT: [seen_accuracy(zero_shot)]} | found if zero_shot else found


def draw_accuracy(figure: Figure, lines: Curves) -> None:
    """Accuracy over tasks: the mean over the seeds, and a band from the least to the largest unless bands would cover each
    other."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    for k, (name, runs) in enumerate(lines.items()):
        steps = list(zip(*runs, strict=True))
        mean = [statistics.mean(s) for s in steps]
        if len(mean) == 1:
            axes.axhline(mean[0], label=name, linestyle=":", color="k")
            continue
        x = range(1, len(mean) + 1)
        plain = name.endswith(ZERO_SHOT)
        axes.plot(x, mean, label=name, **({"linestyle": "--", "color": "grey"} if plain else line_style(k)))
        if len(runs) > 1 and len(lines) <= MOST_BANDS:
            axes.fill_between(x, [min(s) for s in steps], [max(s) for s in steps], alpha=0.15, color=f"C{k % 10}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="tasks learned", ylabel="accuracy on the classes seen (%)", ylim=(0, 100))
    figure.legend(loc="outside right upper", fontsize=8)
    axes.grid(alpha=0.3)


def seen_accuracy(result: dict[str, Any]) -> list[float]:
    """A_t (micro) after every task, over the tasks seen."""
    return [micro(row[: i + 1], result["test_counts"]) or 0.0 for i, row in enumerate(result["accuracy_matrix"])]
