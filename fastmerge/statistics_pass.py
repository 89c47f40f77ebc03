"""One pass over a task's images that sums up their features: class means and covariances, or a Gram matrix.

The images are not augmented and the model does not change. Processes share the forward passes; all of them hold the same
sums.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.models.precision import tf32
from fastmerge.training import Batches, Learner, Phase, positions


class Sums(ABC):
    """What a pass adds up; its tensors are in the checkpoints of the phase."""

    @abstractmethod
    def add(self, features: Tensor, labels: Tensor, i: int) -> None:
        """Take in batch i. features: `[b, d]` fp32 without autograd; labels: class indices `[b]`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums so far; they are changed in place."""


class StatisticsPass(Phase):
    """The merging phase of a method that needs statistics of the present model's features. A method overrides `finish`."""

    name = "merge"

    def __init__(self, learner: Learner, task: Task, images: TaskImages, batches: Batches, sums: Sums):
        self.learner, self.task, self.images = learner, task, images
        self.batches: Batches = batches
        self.sums, self.steps = sums, batches.steps

    @torch.no_grad()
    def step(self, i: int) -> dict[str, Tensor]:
        pixels, labels = self.images.batch(self.batches.rows(i))
        features = self.learner.without_gradient(self.learner.backbone, pixels)
        self.learner.parts.changes()
        with tf32(False):
            self.sums.add(features, labels, i)
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return self.sums.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.sums.tensors().items():
            tensor.copy_(tensors[name])


class ByClass(Batches):
    """The images class by class, so that the host knows where each class begins in a batch.

    present: the classes that have images, as places in `task.classes`.
    """

    def __init__(self, learner: Learner, task: Task, images: TaskImages):
        super().__init__(learner, task, images, "statistics", epochs=1)
        classes = torch.tensor(task.classes, device=learner.device)
        places = positions(images.labels, classes).cpu()
        self.sorted = places.argsort(stable=True)
        self.places = places[self.sorted].split(learner.config.training.batch_size)
        self.present = self.ends()[0]

    def order(self, epoch: int) -> Tensor:
        return self.sorted

    def classes(self, i: int) -> list[tuple[int, slice]]:
        """The classes of batch i, as places in `task.classes`, each with its part of the batch."""
        found, end = [], 0
        for place, same in itertools.groupby(self.places[i].tolist()):
            start, end = end, end + len(list(same))
            found.append((place, slice(start, end)))
        return found

    def ends(self) -> tuple[list[int], list[int]]:
        """The classes that have images, as places in `task.classes`, and where each ends in `sorted`."""
        places, ends = list[int](), list[int]()
        for place, same in itertools.groupby(place for part in self.places for place in part.tolist()):
            places.append(place)
            ends.append((ends[-1] if ends else 0) + len(list(same)))
        return places, ends


class ClassMoments(Sums):
    """Number, sum and second moment of the features of every class of a task, `k` classes in the order of `task.classes`.

    count: `[k]` int64; total: `[k, d]`, second: `[k, d, d]`, fp64, so that the mean can be taken off at the end.
    """

    def __init__(self, learner: Learner, task: Task, batches: ByClass):
        k, d, device = len(task.classes), learner.backbone.feature_dim, learner.device
        self.batches = batches
        self.count = torch.zeros(k, dtype=torch.int64, device=device)
        self.total = torch.zeros(k, d, dtype=torch.float64, device=device)
        self.second = torch.zeros(k, d, d, dtype=torch.float64, device=device)

    def add(self, features: Tensor, labels: Tensor, i: int) -> None:
        for place, part in self.batches.classes(i):
            x = features[part].double()
            self.count[place] += len(x)
            self.total[place] += x.sum(0)
            self.second[place].addmm_(x.T, x)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """count `[k]` int64, means `[k, d]`, and scatter matrices sum (x - mean)(x - mean)^T `[k, d, d]`, fp64."""
        mean = self.total / self.count.clamp(min=1)[:, None]
        return self.count, mean, self.second - self.count[:, None, None] * mean[:, :, None] * mean[:, None, :]

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total, "second": self.second}
