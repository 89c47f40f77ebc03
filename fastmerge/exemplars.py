"""Training images that a method keeps, chosen by herding (Rebuffi et al. 2017, iCaRL, Algorithms 4 and 5).

Features have length 1, and each new image brings the mean of the chosen ones as near as possible to the class mean. A
number of images is kept in all, the same number of each class; the last chosen ones of a class are dropped first. A class
that returns in another domain gets exemplars of its own there, and all pairs of class and task share the number.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.rehearsal import Joined
from fastmerge.data.scenario import Scenario, Task
from fastmerge.errors import UserError
from fastmerge.statistics_pass import ByClass, StatisticsPass, Sums
from fastmerge.training import Learner, Phase


class Exemplars:
    """Pair after pair of class and task: `exemplars` `[e, 3, s, s]` uint8 in the order of their choice, `labels` `[e]`; and
    `sizes`, the number of each pair. most: how many in all; flag: the setting that says so."""

    def __init__(self, learner: Learner, most: int, flag: str):
        size, device = learner.backbone.image_size, learner.device
        self.learner, self.most, self.flag = learner, most, flag
        self.exemplars = torch.zeros(0, 3, size, size, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(0, dtype=torch.int64, device=device)
        self.sizes: list[int] = []

    def check_room(self, task: Task) -> None:
        """Raise UserError if some pair would have no exemplar after the task."""
        _check_room(self.most, self.flag, task, len(self.sizes))

    def joined(self, images: TaskImages) -> TaskImages:
        """The images of a task, then the exemplars."""
        return Joined(images, self.exemplars, self.labels)

    def herding(self, task: Task, images: TaskImages) -> Phase:
        """The merging phase that chooses exemplars of the task's classes by the backbone's present features."""
        return Herd(self, task, images)

    def state_dict(self) -> dict[str, Tensor]:
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return {"exemplars": self.exemplars, "labels": self.labels, "sizes": sizes}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.exemplars, self.labels, self.sizes = tensors["exemplars"], tensors["labels"], tensors["sizes"].tolist()


def check_tasks(most: int, flag: str, scenario: Scenario) -> None:
    """Raise UserError if some pair would have no exemplar after one of the tasks. most, flag: as of `Exemplars`."""
    pairs = 0
    for task in scenario.tasks:
        _check_room(most, flag, task, pairs)
        pairs += len(np.unique(scenario.dataset.train.labels[task.train]))  # a class without an image has no exemplars


def _check_room(most: int, flag: str, task: Task, pairs: int) -> None:
    """pairs: before the task."""
    if (needed := pairs + len(task.classes)) > most:
        raise UserError(
            f"{task.name}: {flag} {most} is less than one image for each of {needed} pairs of class and task; give a larger "
            "number with another --run-dir"
        )


class AllFeatures(Sums):
    """The features of a task's images, of length 1, in the order of the pass: `[n, d]`."""

    def __init__(self, learner: Learner, n: int):
        self.size = learner.config.training.batch_size
        self.features = torch.zeros(n, learner.backbone.feature_dim, device=learner.device)

    def add(self, features: Tensor, labels: Tensor, i: int) -> None:
        self.features[i * self.size : i * self.size + len(features)] = F.normalize(features, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        return {"features": self.features}


class Herd(StatisticsPass):
    """The pass, then the choice of exemplars for the task's classes, and fewer for the classes before."""

    batches: ByClass
    sums: AllFeatures

    def __init__(self, kept: Exemplars, task: Task, images: TaskImages):
        batches, sums = ByClass(kept.learner, task, images), AllFeatures(kept.learner, len(images))
        super().__init__(kept.learner, task, images, batches, sums)
        self.kept = kept

    @torch.no_grad()
    def finish(self) -> None:
        kept, (places, ends) = self.kept, self.batches.ends()
        each = kept.most // (len(kept.sizes) + len(places))
        groups = list(zip(kept.exemplars.split(kept.sizes), kept.labels.split(kept.sizes), strict=True))
        groups = [(pixels[:each], labels[:each]) for pixels, labels in groups]
        start = 0
        for end in ends:
            chosen = herd(self.sums.features[start:end], each).cpu()
            groups.append(self.images.batch(self.batches.sorted[start:end][chosen]))
            start = end
        kept.exemplars, kept.labels = (torch.cat(part) for part in zip(*groups, strict=True))
        kept.sizes = [len(labels) for _, labels in groups]


def herd(features: Tensor, m: int) -> Tensor:
    """Algorithm 4: the rows of up to m features in the order of their choice, int64.

    features: `[n, d]`, of length 1. Choice k is the row x, not chosen before, for which (x + sum of the chosen) / k is
    nearest to the mean.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    taken, chosen = torch.zeros(len(features), device=features.device), []
    for k in range(1, min(m, len(features)) + 1):
        distance = torch.linalg.vector_norm(mean - (features + total) / k, dim=1)
        best = (distance + taken).argmin()[None]
        chosen.append(best)
        total = total + features[best][0]
        taken[best] = torch.inf
    return torch.cat(chosen)
