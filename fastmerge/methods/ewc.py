"""EWC, Elastic Weight Consolidation (Kirkpatrick et al. 2017): stay near theta_{t-1} where the Fisher of the past is large.

    python -m fastmerge --method ewc --ewc.lam 1000

Loss: cross-entropy + lam / 2 sum_i F_i (theta_i - theta_{t-1,i})^2. F is the sum of the diagonal Fishers of all tasks
so far, each at its own solution; the only anchor is the last solution (Huszar 2018). `--ewc.decay` below 1 gives online
EWC (Schwarz et al. 2018). The first paper anchors each task's Fisher at that task's solution. F is per image by default
(`fastmerge.fisher_pass`). MagMax's code squares a running sum of gradients, so its lam of 1e6 has another scale. The
rows of a linear head are not penalised.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.fisher_pass import FisherPass
from fastmerge.methods.method import Method, Tensors
from fastmerge.training import Learner, Phase, Train


class EWC(Method):
    """It keeps the summed Fisher. During a task: `anchor`, theta_{t-1}."""

    groups = ("ewc", "fisher")
    ignores = ("fisher.accumulate", "fisher.lam")
    lora = False

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.ewc
        self.fisher = torch.zeros_like(learner.theta)

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the Fisher pass

    def begin(self, task: Task) -> Tensors:
        return {"anchor": self.learner.theta.clone()} if task.index else {}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Anchored(self, task, images, during.get("anchor"))

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Consolidate(self, task, images)

    def state_dict(self) -> Tensors:
        return {"fisher": self.fisher}

    def load_state_dict(self, tensors: Tensors) -> None:
        self.fisher.copy_(tensors["fisher"])


class Anchored(Train):
    """anchor: theta_{t-1} `[n]`, None in the first task."""

    def __init__(self, method: EWC, task: Task, images: TaskImages, anchor: Tensor | None):
        super().__init__(method.learner, task, images)
        self.method, self.anchor = method, anchor

    def regularise(self) -> None:
        method, learner = self.method, self.learner
        if self.anchor is not None:
            fk.ewc_gradient_(self.gradient, method.fisher, learner.theta, self.anchor, method.settings.lam)


class Consolidate(FisherPass):
    """After training: F <- decay F + F_t."""

    name = "merge"

    def __init__(self, method: EWC, task: Task, images: TaskImages):
        super().__init__(method.learner, task, images)
        self.method = method

    def finish(self) -> None:
        self.method.fisher.mul_(self.method.settings.decay).add_(self.result())
