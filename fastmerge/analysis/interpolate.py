"""Accuracy and loss between the models of two tasks (CMM, Figures 1, 2 and 4).

Tasks 1 and 2 are trained in sequence without a merge, once as usual and once in the tangent space. Both pairs of models
are merged with weight lambda for the second model, by plain averaging and by AdamW's second moments (eq. 4). The test
images of both tasks are classified among the classes of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import fastmerge_kernels as fk
import torch

from fastmerge.analysis.figure import Output, line_style, save
from fastmerge.analysis.stages import Stages
from fastmerge.methods.cmm import CMM
from fastmerge.setup import Setup

COLUMNS = ("training", "merge", "lambda", "accuracy_task1", "accuracy_task2", "accuracy", "loss")


def interpolate(setup: Setup, points: int, out: Output) -> list[Path]:
    """Write `interpolate.csv` (COLUMNS; accuracies in percent, loss in nats per image) and its plot."""
    rows = [row for tangent in (False, True) for row in curves(setup, tangent, points)]
    return save(out, "interpolate", COLUMNS, rows, lambda figure: draw(figure, rows), (9, 3.6))


def curves(setup: Setup, tangent: bool, points: int) -> Iterator[tuple]:
    """Rows of COLUMNS for one way of training."""
    cmm = dataclasses.replace(setup.config.cmm, tangent=tangent, merge="fisher")  # keeps AdamW's second moments
    config = dataclasses.replace(setup.config, cmm=cmm)
    two = Stages(setup, CMM, 2, config)
    found = []
    for number in range(2):
        two.train(number)
        found.append((two.learner.theta.clone(), two.during["fisher_t"].clone()))
    (theta1, fisher1), (theta2, fisher2) = found
    theta = two.learner.theta
    for merge in ("average", "fisher"):
        for lam in torch.linspace(0, 1, points).tolist():
            if merge == "average":
                fk.lerp(theta1, theta2, lam, out=theta)
            else:
                theta.copy_(theta1)
                fk.fisher_merge_(theta, fisher1.clone(), theta2, fisher2, lam)
            score = two.score()
            yield "tangent" if tangent else "normal", merge, lam, *score.accuracies, score.accuracy, score.loss


def draw(figure, rows: list[tuple]) -> None:
    for axes, column, title in zip(figure.subplots(1, 2), (5, 6), ("accuracy (%)", "loss"), strict=True):
        for k, (training, merge) in enumerate(dict.fromkeys(r[:2] for r in rows)):
            line = [(r[2], r[column]) for r in rows if r[:2] == (training, merge)]
            axes.plot(*zip(*line, strict=True), **line_style(k), label=f"{training}, {merge}")
        axes.set(xlabel="weight of the second task's model", ylabel=title)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
