"""Accuracy and loss between the models of two tasks: CMM, Figures 1, 2 and 4.

Task 2 is trained from the un-merged model of task 1, once as usual and once in the tangent space. Both pairs are merged with
weight lambda for the second model, by plain averaging and by AdamW's second moments (eq. 4); the test images of both tasks
are classified among the classes of both.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import fastmerge_kernels as fk
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.analysis.two_tasks import TwoTasks
from fastmerge.checkpoint import write_atomically
from fastmerge.evaluate import batches
from fastmerge.setup import Setup
from fastmerge.training import positions

COLUMNS = ("training", "merge", "lambda", "accuracy_task1", "accuracy_task2", "accuracy", "loss")


def interpolate(setup: Setup, points: int, out: Path) -> list[Path]:
    """Write `interpolate.csv` (COLUMNS; accuracies in percent, loss in nats per image) and `interpolate.png` into `out`."""
    rows = [row for tangent in (False, True) for row in curves(setup, tangent, points)]

    def table(path: Path) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows])

    write_atomically(out / "interpolate.csv", table)
    write_atomically(out / "interpolate.png", lambda path: draw(path, rows))
    return [out / "interpolate.csv", out / "interpolate.png"]


def curves(setup: Setup, tangent: bool, points: int) -> Iterator[tuple]:
    """Rows of COLUMNS for one way of training."""
    two = TwoTasks(setup, tangent)
    found = []
    for number in range(2):
        two.train(number)
        found.append((two.learner.theta.clone(), two.method.fisher_t.clone()))
    (theta1, fisher1), (theta2, fisher2) = found
    theta = two.learner.theta
    for merge in ("average", "fisher"):
        for lam in torch.linspace(0, 1, points).tolist():
            if merge == "average":
                fk.lerp(theta1, theta2, lam, out=theta)
            else:
                theta.copy_(theta1)
                fk.fisher_merge_(theta, fisher1.clone(), theta2, fisher2, lam)
            accuracy, loss = score(two)
            both = sum(a * len(t) for a, t in zip(accuracy, two.tests, strict=True)) / sum(map(len, two.tests))
            yield "tangent" if tangent else "normal", merge, lam, *accuracy, both, loss


@torch.no_grad()
def score(two: TwoTasks) -> tuple[list[float], float]:
    """Accuracy on each task's test images in percent, and the mean cross-entropy over all, at the present weights."""
    learner, candidates = two.learner, torch.tensor(two.classes, device=two.learner.device)
    correct = torch.zeros(2, dtype=torch.int64, device=learner.device)
    loss = torch.zeros((), dtype=torch.float64, device=learner.device)
    for pixels, labels, test in batches(two.tests, learner.config.training.batch_size):
        logits: Tensor = learner.head(learner.features(learner.plain(pixels)), candidates)
        truth = positions(labels, candidates)
        correct.index_add_(0, test, (logits.argmax(1) == truth).long())
        loss += F.cross_entropy(logits, truth, reduction="sum")
    counts = [len(t) for t in two.tests]
    return [100.0 * c / n for c, n in zip(correct.tolist(), counts, strict=True)], float(loss) / sum(counts)


def draw(path: Path, rows: list[tuple]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column, title in zip(figure.subplots(1, 2), (5, 6), ("accuracy (%)", "loss"), strict=True):
        for training, style in (("normal", "--"), ("tangent", "-")):
            for merge, colour in (("average", "C0"), ("fisher", "C1")):
                line = [(r[2], r[column]) for r in rows if r[:2] == (training, merge)]
                axes.plot(*zip(*line, strict=True), style, color=colour, marker=".", label=f"{training}, {merge}")
        axes.set(xlabel="weight of the second task's model", ylabel=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)
