"""EWC, Elastic Weight Consolidation (Kirkpatrick et al. 2017): stay near theta_{t-1} where the Fisher of the past is large.

    python -m fastmerge --method ewc --ewc.lam 1000

Loss: cross-entropy + lam / 2 sum_i F_i (theta_i - theta_{t-1,i})^2, F the sum of the diagonal Fishers of all tasks so far at
their own solutions, and one anchor, the last solution (Huszar 2018; with `--ewc.decay` below 1 online EWC, Schwarz et al.
2018). The first paper anchors each task's Fisher at that task's solution. F is per image (`fastmerge.fisher`); the code of
MagMax squares a running sum of gradients, so its lam of 1e6 means something else. A linear head's rows are not held.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.fisher import FisherPass
from fastmerge.training import Learner, Phase, Train


class EWC:
    """Between tasks it keeps the model and the summed Fisher."""

    def __init__(self, learner: Learner):
        self.learner, self.settings = learner, learner.config.ewc
        self.fisher = torch.zeros_like(learner.theta)
        self.anchor: Tensor | None = None  # theta_{t-1}, during a task only

    def begin(self, task: Task) -> None:
        if task.index:
            self.anchor = self.learner.theta.clone()

    def train(self, task: Task, images: TaskImages) -> Phase:
        return Anchored(self, task, images)

    def merge(self, task: Task, images: TaskImages) -> Phase:
        return Consolidate(self, task, images)

    def state_dict(self) -> dict[str, Tensor]:
        kept = {"theta": self.learner.theta, "fisher": self.fisher}
        return kept if self.anchor is None else kept | {"anchor": self.anchor}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.learner.theta.copy_(tensors["theta"])
        self.fisher.copy_(tensors["fisher"])
        self.anchor = tensors["anchor"].to(self.learner.device) if "anchor" in tensors else None


class Anchored(Train):
    def __init__(self, method: EWC, task: Task, images: TaskImages):
        super().__init__(method.learner, task, images)
        self.method = method

    def regularise(self) -> None:
        method, flat = self.method, self.learner.flat
        if method.anchor is not None:
            fk.ewc_gradient_(flat.gradient, method.fisher, self.learner.theta, method.anchor, method.settings.lam)


class Consolidate(FisherPass):
    """After training: F <- decay F + F_t."""

    name = "merge"

    def __init__(self, method: EWC, task: Task, images: TaskImages):
        super().__init__(method.learner, task, images)
        self.method = method

    def finish(self) -> None:
        self.method.fisher.mul_(self.method.settings.decay).add_(super().finish())
        self.method.anchor = None
