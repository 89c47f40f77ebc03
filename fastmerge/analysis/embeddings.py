"""Features of old classes before and after representation alignment (CMM, Figures 5-7).

CMM learns two tasks. Three models embed the test images of a few classes of task 1: the model of task 1, the merged
model, and the merged model after alignment. One t-SNE (van der Maaten & Hinton 2008, scikit-learn) lays out all their
features. It distorts distances, so the CSV also has the distance between every feature and the first model's feature.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastmerge.analysis.figure import Output, point_style, save
from fastmerge.analysis.stages import Stages, work
from fastmerge.errors import UserError
from fastmerge.methods.cmm import CMM
from fastmerge.setup import Setup
from fastmerge.wording import counted

MODELS = ("previous", "merged", "aligned")
COLUMNS = ("class", "image", "model", "x", "y", "distance")


def embeddings(setup: Setup, classes: int, out: Output) -> list[Path]:
    """Write `embeddings.csv` (COLUMNS; image: position among the task's test images) and its plot."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("embeddings needs scikit-learn: pip install scikit-learn") from None
    two = Stages(setup, CMM, 2)
    work(two.merging(0, two.train(0)))
    chosen = two.tasks[0].classes[:classes]
    labels = two.tests[0].labels.tolist()
    rows = [k for k, label in enumerate(labels) if label in chosen]
    if len(rows) < 2:
        first = counted(len(chosen), "class", "classes")
        raise UserError(f"{counted(len(rows), 'test image')} of the first {first}; t-SNE needs at least two")
    features = {"previous": embed(two, rows)}
    phase = two.method.merge(two.tasks[1], two.train(1), two.during)
    phase.merge()
    features["merged"] = embed(two, rows)
    work(phase)
    features["aligned"] = embed(two, rows)

    everything = torch.cat([features[m] for m in MODELS]).double().numpy()
    perplexity = min(30.0, (len(everything) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(everything)
    table = []
    for number, model in enumerate(MODELS):
        far = (features[model] - features["previous"]).norm(dim=1).tolist()
        for k, row in enumerate(rows):
            name = setup.dataset.class_names[labels[row]]
            x, y = places[number * len(rows) + k].tolist()
            table.append((name, row, model, x, y, far[k]))

    return save(out, "embeddings", COLUMNS, table, lambda figure: draw(figure, table), (9, 5))


@torch.no_grad()
def embed(two: Stages, rows: list[int]) -> Tensor:
    """Features `[k, d]` of these test images of task 1, on the CPU: the trained function at the current weights."""
    parts, features = [], two.method.trained_as()
    for part in torch.tensor(rows).split(two.learner.config.training.batch_size):
        pixels, _ = two.tests[0].batch(part)
        parts.append(features(two.learner.plain(pixels)).cpu())
    return torch.cat(parts)


def draw(figure, table: list[tuple]) -> None:
    names = list(dict.fromkeys(line[0] for line in table))
    for axes, model in zip(figure.subplots(1, 2, sharex=True, sharey=True), MODELS[1:], strict=True):
        for number, name in enumerate(names):
            for which, filling in (("previous", "none"), (model, "full")):
                spots = [(line[3], line[4]) for line in table if line[0] == name and line[2] == which]
                style = point_style(number) | {"fillstyle": filling, "ms": 4, "alpha": 0.7}
                axes.plot(*zip(*spots, strict=True), **style, label=name if which == model else None)
        far = [line[5] for line in table if line[2] == model]
        title = f"{model} (filled), previous (open)\nmean distance {sum(far) / len(far):.2f}"
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", fontsize=8)
