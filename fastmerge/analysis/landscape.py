"""The loss over the plane through theta_init, theta_{t-1} and theta_t*, with P&M's coefficient in it (P&M, Figure 2).

    python -m fastmerge analyse landscape --head linear                                   # after the last task
    python -m fastmerge analyse landscape --head linear --tasks 10 --after 4 7 --both     # the paper's: P&M and M

P&M learns t tasks. The last merge combines theta_{t-1}, the merged model of the earlier tasks, and theta_t*, the newly
trained model. The weights theta_init + beta (theta_{t-1} - theta_init) + alpha (theta_t* - theta_init) are evaluated on
the test images of all t tasks. A merge can choose from the path beta = 1 - alpha. `--both` also trains the tasks without
perturbation, the paper's "M"; `--pam.perturb none` does that alone. Panels of one row share their colours.

The paper writes "average loss across all learned tasks" and not among which classes, so both are here: among the classes
of all tasks, and among the task's own classes, as in eq. 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastmerge.analysis.figure import Output, save
from fastmerge.analysis.stages import Stages, work
from fastmerge.errors import UserError
from fastmerge.methods.pam import PAM
from fastmerge.settings.merging import PAMSettings
from fastmerge.setup import Setup

COLUMNS = ("perturb", "after", "part", "alpha", "beta", "loss", "loss_own", "accuracy")
FAR = 1.25  # alpha and beta range from 0 to this
KINDS = {5: "loss among the classes of all tasks", 6: "loss among the classes of its own task"}  # by column


def landscape(setup: Setup, after: Sequence[int], both: bool, points: int, out: Output) -> list[Path]:
    """Write `landscape.csv` and its plot. after: numbers of tasks, from 2 on, ascending.

    COLUMNS: perturb: the setting; after: number of the task; part is 'plane', 'path' (beta = 1 - alpha) or 'chosen'; loss:
    mean over the tasks of the cross-entropy in nats among the classes of all tasks; loss_own: among the task's own classes
    (as in eq. 6); accuracy in percent.

    Raises:
        UserError: P&M without its merge, or `both` of a training without perturbation.
    """
    pam = setup.config.pam
    if not pam.merge:
        raise UserError("--pam.no-merge: landscape shows where the merge lands; leave this option out")
    if both and pam.perturb == "none":
        raise UserError("--both: shows --pam.perturb none beside a training with perturbation; leave one of them out")
    rows = [
        (its.perturb, *row)
        for its in [pam, dataclasses.replace(pam, perturb="none")][: 1 + both]
        for row in planes(setup, its, after, points)
    ]
    size = (1 + 3.3 * len(KINDS) * (1 + both), 0.4 + 3.9 * len(after))
    return save(out, "landscape", COLUMNS, rows, lambda figure: draw(figure, rows), size)


def planes(setup: Setup, pam: PAMSettings, after: Sequence[int], points: int) -> Iterator[tuple]:
    """Learn the tasks; yield rows of COLUMNS without the first."""
    stages = Stages(setup, PAM, max(after), dataclasses.replace(setup.config, pam=pam))
    method, theta = stages.method, stages.learner.theta
    adapted = stages.learner.adapted(pam.rank)
    plane, path = (torch.linspace(0, end, points, dtype=torch.float64).tolist() for end in (FAR, 1))
    for number in range(len(stages.tasks)):
        images = stages.train(number)
        previous, trained = stages.during["previous"], stages.during["trained"]
        chosen = float(work(stages.merging(number, images))["alpha"])
        if number + 1 not in after:
            continue
        merged = theta.clone()
        places = [("plane", a, b) for b in plane for a in plane] + [("path", a, 1 - a) for a in path]
        for part, alpha, beta in [*places, ("chosen", chosen, 1 - chosen)]:
            adapted.scatter(
                method.initial + beta * (previous - method.initial) + alpha * (trained - method.initial), theta
            )
            score = stages.score(number + 1)
            yield number + 1, part, alpha, beta, score.loss, score.loss_own, score.accuracy
        theta.copy_(merged)


def draw(figure, rows: list[tuple]) -> None:
    from matplotlib.patheffects import withStroke

    trained, after = (list(dict.fromkeys(r[k] for r in rows)) for k in (0, 1))
    panels = figure.subplots(len(after), len(KINDS) * len(trained), sharex=True, sharey=True, squeeze=False)
    for task, line in zip(after, panels, strict=True):
        for k, (column, title) in enumerate(KINDS.items()):
            some = line[k * len(trained) : (k + 1) * len(trained)]
            values = [r[column] for r in rows if r[1:3] == (task, "plane")]
            span = max(values) - min(values) or 1.0  # all weights may have the same loss
            levels = [min(values) + span * level / 20 for level in range(21)]
            for axes, perturb in zip(some, trained, strict=True):
                here = [r for r in rows if r[:2] == (perturb, task)]
                axis = sorted({r[3] for r in here if r[2] == "plane"})
                plane = torch.tensor([r[column] for r in here if r[2] == "plane"]).view(len(axis), -1)
                colours = axes.contourf(axis, axis, plane.numpy(), levels=levels, cmap="viridis_r")
                axes.plot([0, 1], [1, 0], "w--", path_effects=[withStroke(linewidth=3, foreground="k")], label="path")
                best = min((r for r in here if r[2] == "path"), key=lambda r: r[column])
                (chosen,) = (r for r in here if r[2] == "chosen")
                axes.plot(best[3], best[4], "wo", ms=9, mec="k", clip_on=False, label="lowest on the path")
                axes.plot(chosen[3], chosen[4], "r*", ms=12, mec="k", mew=0.7, clip_on=False, label="chosen by P&M")
                how = "not perturbed" if perturb == "none" else f"perturbed ({perturb})"
                lowest = f"lowest: alpha {best[3]:.2f}, loss {best[column]:.3g}"
                axes.set_title(
                    f"after task {task}, {how}\nchosen: alpha {chosen[3]:.2f}, loss {chosen[column]:.3g}\n{lowest}",
                    fontsize=8,
                )
                axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            figure.colorbar(colours, ax=list(some), label=title, format="%.4g")
    for axes in panels[-1]:
        axes.set_xlabel("alpha: weight of the new model")
    for axes in panels[:, 0]:
        axes.set_ylabel("beta: weight of the previous model")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
