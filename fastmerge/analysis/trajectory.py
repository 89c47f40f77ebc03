"""The loss of the new task between the old and the new model, and that of every merge (TRM, Figure 2).

    python -m fastmerge analyse trajectory
    python -m fastmerge analyse trajectory --method magmax ties stock trm trm:replace=none --points 41

theta_1 is trained on task T_1 from theta_0 (merges.py). The curve is the loss on T_1 of theta_0 + x (theta_1 - theta_0) for
x from 0 to 1. A merge theta_m is a point: its own loss, at its projection on the line,

    x = <theta_m - theta_0, d> / <d, d>,   d = theta_1 - theta_0.

A merge is not on the line; `off_line` in the CSV is its distance from it, ||theta_m - theta_0 - x d|| / ||d||. The loss is
that of training: cross-entropy among the task's own classes, on its training images ("on the same training data"), here
without augmentation. A trained head is the one after T_1 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.analysis.figure import Output, point_style, save, with_legend
from fastmerge.analysis.merges import Merges, dot
from fastmerge.setup import Setup

COLUMNS = ("part", "merge", "x", "off_line", "loss")


def trajectory(setup: Setup, specs: Sequence[str], points: int, out: Output) -> list[Path]:
    """Write `trajectory.csv` and its plot. specs: of the merges, see `Merges`.

    COLUMNS: part is 'line', with an empty merge, or 'merge'; x and off_line in units of ||theta_1 - theta_0||; loss in nats
    per image.
    """
    merges = Merges(setup, specs)
    theta, images = merges.stages.learner.theta, merges.images[1]
    rows: list[tuple] = []
    for x in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        fk.lerp(merges.first, merges.second, x, out=theta)
        rows.append(("line", "", x, 0.0, merges.stages.loss(1, images)))
    for spec, merged in merges:
        x, off_line = project(merged, merges.first, merges.second)
        rows.append(("merge", spec, x, off_line, merges.stages.loss(1, images)))
    return save(out, "trajectory", COLUMNS, rows, lambda figure: draw(figure, rows), with_legend(1 + len(specs)))


def project(merged: Tensor, first: Tensor, second: Tensor) -> tuple[float, float]:
    """Where the projection of `merged` on the line is, 0 at `first` and 1 at `second`, and the distance from the line in
    units of ||second - first||. All `[n]`."""
    d, moved = second - first, merged - first
    size = dot(d, d) or 1.0  # nothing was learned: every model is the first one
    x = dot(moved, d) / size
    moved.sub_(d, alpha=x)
    return x, math.sqrt(dot(moved, moved) / size)


def draw(figure, rows: list[tuple]) -> None:
    axes = figure.subplots()
    line = [(r[2], r[4]) for r in rows if r[0] == "line"]
    axes.plot(*zip(*line, strict=True), "-", color="0.4", label="from theta_0 to theta_1")
    merges = sorted(
        (r for r in rows if r[0] == "merge"), key=lambda r: r[2]
    )  # the legend names them from left to right
    for k, (_, merge, x, _, loss) in enumerate(merges):
        axes.plot(x, loss, **point_style(k), label=merge)
    scale = "log" if min(r[4] for r in rows) > 0 else "linear"  # losses of a task that was learned are close to 0
    axes.set(xlabel="x: 0 is theta_0, 1 is theta_1", ylabel="loss on the second task (nats)", yscale=scale)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
