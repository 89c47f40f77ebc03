"""How far a merge moves the class token of every layer (TRM, Figure 3 and eq. 1).

    python -m fastmerge analyse drift --method magmax ties stock trm

theta_1 is trained on task T_1 from theta_0, and theta_{0,1}^f is a merge of both (merges.py). For layer l

    drift_l = 1 / |D_1| sum_j || cls_l(x_j; theta_{0,1}^f) - cls_l(x_j; theta_1) ||_2                                 (eq. 1)

over the training images D_1 of T_1 without augmentation: a mean of norms, not squared. The class token is taken after the
block, before the last normalisation. The paper gives its sizes alone; the CSV also has the mean norm of theta_1's token,
which grows with the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmerge.analysis.figure import Output, line_style, save, with_legend
from fastmerge.analysis.merges import Merges
from fastmerge.setup import Setup

COLUMNS = ("merge", "layer", "drift", "norm")


def drift(setup: Setup, specs: Sequence[str], out: Output) -> list[Path]:
    """Write `drift.csv` and its plot. specs: of the merges, see `Merges`.

    COLUMNS: layer from 1 on; drift as in eq. 1; norm: mean norm of theta_1's class token.

    Raises:
        UserError: the backbone has no class token.
    """
    setup.backbone.check_class_tokens()
    merges = Merges(setup, specs)
    wanted = list(tokens(merges))
    norms = mean_norm(wanted)
    rows: list[tuple] = []
    for spec, _ in merges:
        far = mean_norm(new - old for new, old in zip(tokens(merges), wanted, strict=True))
        rows += [(spec, layer, *sizes) for layer, sizes in enumerate(zip(far, norms, strict=True), start=1)]
    return save(out, "drift", COLUMNS, rows, lambda figure: draw(figure, rows), with_legend(len(specs)))


def tokens(merges: Merges) -> Iterator[Tensor]:
    """The class tokens of the second task's training images at the present weights, `[layers, b, width]` a batch."""
    learner, images = merges.stages.learner, merges.images[1]
    for rows in torch.arange(len(images)).split(learner.config.training.batch_size):
        pixels, _ = images.batch(rows)
        yield learner.without_gradient(lambda x: learner.backbone.class_tokens(x)[1], pixels, dim=1)


def mean_norm(batches) -> list[float]:
    """The mean over the images of the norms of `[layers, b, width]`, for every layer."""
    norms = torch.cat([batch.double().norm(dim=2) for batch in batches], 1)
    return norms.mean(1).tolist()


def draw(figure, rows: list[tuple]) -> None:
    axes = figure.subplots()
    layers = sorted({r[1] for r in rows})
    ends = {r[0]: r[2] for r in rows if r[1] == layers[-1]}
    for k, merge in enumerate(sorted(ends, key=ends.__getitem__, reverse=True)):  # the legend names them from the top
        line = [(r[1], r[2]) for r in rows if r[0] == merge]
        axes.plot(*zip(*line, strict=True), **line_style(k), label=merge)
    axes.set(xlabel="layer", ylabel="mean distance of the class token from theta_1's", xticks=layers)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
