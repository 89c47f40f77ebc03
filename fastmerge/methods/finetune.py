"""Plain sequential fine-tuning: task t starts from task t-1's weights and nothing is merged. The lower bound.

python -m fastmerge --method finetune
"""

from __future__ import annotations

from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.training import Learner, Phase, Train


class Finetune:
    """Between tasks it keeps the model, and nothing else."""

    searches = False

    def __init__(self, learner: Learner):
        self.learner = learner

    def train(self, task: Task, images: TaskImages) -> Phase:
        return Train(self.learner, task, images)

    def merge(self, task: Task, images: TaskImages) -> Phase | None:
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return {"theta": self.learner.theta}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.learner.theta.copy_(tensors["theta"])
