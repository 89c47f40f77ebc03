"""How much the gradient of the next task turns along its training (TRM, Figure 4 and eq. 2).

    python -m fastmerge analyse gradients
    python -m fastmerge analyse gradients --method magmax ties stock trm --points 21

theta_1 and the merges theta_{0,1}^f (merges.py) are starts: each is trained on the next task T_2 to its own theta_2. For
delta = x (theta_2 - start), x from 0 to 1, the angle is

    arccos <g(start), g(start + delta)> / (||g(start)|| ||g(start + delta)||),   g = grad L                           (eq. 2)

L is the loss of training, over all training images of T_2 at once (the paper does not say which images) and without
augmentation; g is the gradient of what training changes, with `--lora-rank` of the adapted weights. A trained head is
that of the end. The paper's "continuous finetuning" is `finetune`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.analysis.figure import Output, line_style, save, with_legend
from fastmerge.analysis.merges import Merges, dot
from fastmerge.analysis.stages import Stages
from fastmerge.data.cache import TaskImages
from fastmerge.setup import Setup

COLUMNS = ("start", "x", "angle", "norm")
SHOWN = ("magmax", "ties", "stock", "trm")  # by default: each merge costs a training


def gradients(setup: Setup, specs: Sequence[str], points: int, out: Output) -> list[Path]:
    """Write `gradients.csv` and its plot. specs: of the merges, see `Merges`.

    COLUMNS: start: 'finetune' or a merge; x: share of the way to theta_2; angle in degrees; norm of the gradient.
    """
    merges = Merges(setup, specs, count=3)
    learner, images = merges.stages.learner, merges.stages.training_images(2)
    head, rows = copy.deepcopy(learner.head), list[tuple]()
    for start, theta in starts(merges):
        rows += [(start, *found) for found in turns(merges.stages, theta, images, points)]
        learner.head = copy.deepcopy(head)
    return save(out, "gradients", COLUMNS, rows, lambda figure: draw(figure, rows), with_legend(1 + len(specs)))


def starts(merges: Merges) -> Iterator[tuple[str, Tensor]]:
    """theta_1 and the merges, which the learner has; each `[n]` and the caller's."""
    yield "finetune", merges.second.clone()
    yield from merges


def turns(stages: Stages, start: Tensor, images: TaskImages, points: int) -> Iterator[tuple[float, float, float]]:
    """Train the third task from `start`, the present weights; yield x, the angle in degrees and the norm of the gradient."""
    stages.train(2, images)
    theta, end = stages.learner.theta, stages.learner.theta.clone()
    first, size = None, 0.0
    for x in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        fk.lerp(start, end, x, out=theta)
        here = stages.gradient(2, images)
        norm = math.sqrt(dot(here, here))
        if first is None:
            first, size = here, norm
        cosine = dot(first, here) / (size * norm) if size * norm else 1.0  # a gradient of 0 does not turn
        yield x, math.degrees(math.acos(min(1.0, max(-1.0, cosine)))), norm


def draw(figure, rows: list[tuple]) -> None:
    axes = figure.subplots()
    for k, start in enumerate(dict.fromkeys(r[0] for r in rows)):
        line = [(r[1], r[2]) for r in rows if r[0] == start]
        axes.plot(*zip(*line, strict=True), **line_style(k), label=start)
    axes.set(xlabel="x: 0 is the start, 1 is the model after the third task", ylabel="angle of the gradient (degrees)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
