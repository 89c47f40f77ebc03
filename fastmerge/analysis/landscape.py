"""The loss over the plane through theta_init, theta_{t-1} and theta_t*, with P&M's coefficient in it (P&M, Figure 2).

P&M learns t tasks. The last merge combines theta_{t-1}, the merged model of the earlier tasks, and theta_t*, the newly
trained model. The weights theta_init + beta (theta_{t-1} - theta_init) + alpha (theta_t* - theta_init) are evaluated on
the test images of all t tasks. A merge can choose from the path beta = 1 - alpha. `--pam.perturb none` gives models
that were trained without perturbation ("M" in the figure).
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastmerge.analysis.figure import Output, save
from fastmerge.analysis.stages import Stages, work
from fastmerge.errors import UserError
from fastmerge.methods.pam import PAM
from fastmerge.setup import Setup

COLUMNS = ("part", "alpha", "beta", "loss", "loss_own", "accuracy")
FAR = 1.25  # alpha and beta range from 0 to this


def landscape(setup: Setup, after: int, points: int, out: Output) -> list[Path]:
    """Write `landscape.csv` and its plot.

    COLUMNS: part is 'plane', 'path' (beta = 1 - alpha) or 'chosen'; loss: mean over the tasks of the cross-entropy in
    nats among the classes of all tasks; loss_own: among the task's own classes (as in eq. 6); accuracy in percent.
    """
    if not setup.config.pam.merge:
        raise UserError("--pam.no-merge: landscape shows where the merge lands; leave this option out")
    stages = Stages(setup, PAM, after)
    method = stages.method
    for number in range(len(stages.tasks)):
        images = stages.train(number)
        previous, trained = stages.during["previous"], stages.during["trained"]
        alpha = float(work(stages.merging(number, images))["alpha"])
    adapted = stages.learner.adapted(setup.config.pam.rank)

    def row(part: str, alpha: float, beta: float) -> tuple:
        weights = method.initial + beta * (previous - method.initial) + alpha * (trained - method.initial)
        adapted.scatter(weights, stages.learner.theta)
        score = stages.score()
        return part, alpha, beta, score.loss, score.loss_own, score.accuracy

    axis = torch.linspace(0, FAR, points, dtype=torch.float64).tolist()
    rows = [row("plane", a, b) for b in axis for a in axis]
    rows += [row("path", a, 1 - a) for a in torch.linspace(0, 1, points, dtype=torch.float64).tolist()]
    rows.append(row("chosen", alpha, 1 - alpha))
    return save(out, "landscape", COLUMNS, rows, lambda figure: draw(figure, rows, axis, after), (10, 4.2))


def draw(figure, rows: list[tuple], axis: list[float], after: int) -> None:
    titles = {3: "among the classes of all tasks", 4: "among the classes of its own task"}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        plane = torch.tensor([r[column] for r in rows if r[0] == "plane"]).view(len(axis), -1)
        colours = axes.contourf(axis, axis, plane.numpy(), levels=20, cmap="viridis_r")
        axes.plot([0, 1], [1, 0], "w--", linewidth=1)
        best = min((r for r in rows if r[0] == "path"), key=lambda r: r[column])
        (chosen,) = (r for r in rows if r[0] == "chosen")
        axes.plot(best[1], best[2], "wo", label=f"lowest on the path: alpha {best[1]:.2f}, loss {best[column]:.3g}")
        axes.plot(chosen[1], chosen[2], "r*", ms=12, label=f"chosen: alpha {chosen[1]:.2f}, loss {chosen[column]:.3g}")
        axes.set(xlabel=f"alpha: weight of the model of task {after}", ylabel="beta: weight of the previous model")
        axes.set_title(f"loss {title}", fontsize=10)
        axes.legend(fontsize=8, loc="upper right")
        figure.colorbar(colours, ax=axes)
