"""The second moments of the inputs of linear layers on a task: the mean over its images of X^T X.

A row of X is what the layer multiplies: a token, or a pooled image. Sums are fp32, the backbone computes in the run's
precision, images are not augmented. InfLoRA designs its adapters from them, RegMean merges by them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.models.inputs import InputMoments, linear_inputs
from fastmerge.training import Batches, Learner, Phase


class MomentsPass(Phase):
    """One pass over a task's images; theta does not change. Afterwards `result()` returns the moments.

    names: the weights to serve, None for all linear layers. batches: the images of the steps, by default a permutation
    of its own. axes: of each weight, the dimension of its input (1; 0 in a product x @ W).

    Raises:
        UserError: the model uses one of `names` in a way that is not a linear layer.
    """

    name = "moments"
    batches: Batches

    def __init__(
        self,
        learner: Learner,
        task: Task,
        images: TaskImages,
        names: Collection[str] | None = None,
        batches: Batches | None = None,
    ):
        self.learner, self.images = learner, images
        self.batches = batches or Batches(learner, task, images, self.name, epochs=1)
        self.steps = self.batches.per_epoch
        found = linear_inputs(learner.flat, learner.backbone.image_size)
        if missing := sorted(set(names or ()) - set(found)):
            raise UserError(f"{missing[0]}: the model does not use it as a linear layer, so its inputs are not known")
        self.axes = {name: axis for name, (_, axis) in found.items() if names is None or name in names}
        self.totals = {name: learner.theta.new_zeros(found[name][0], found[name][0]) for name in self.axes}

    @torch.no_grad()
    def step(self, i: int) -> dict[str, Tensor]:
        learner = self.learner
        pixels, _ = self.images.batch(self.batches.rows(i))
        new = {name: torch.zeros_like(total) for name, total in self.totals.items()}
        named = {name: p for name, p in zip(learner.flat.names, learner.flat.parameters, strict=True) if name in new}
        for part, _ in learner.parts.of(len(pixels), "evaluate"):
            with InputMoments(named, new):
                learner.backbone(learner.plain(pixels[part]))
        learner.ranks.add_(*new.values())
        learner.parts.changes()
        for name, total in self.totals.items():
            total.add_(new[name], alpha=1 / len(self.images))
        return {}

    def result(self) -> dict[str, Tensor]:
        """`[in, in]` fp32 by the name of the weight."""
        return self.totals

    def tensors(self) -> dict[str, Tensor]:
        return {f"moment.{name}": total for name, total in self.totals.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, total in self.totals.items():
            total.copy_(tensors[f"moment.{name}"])
