"""The two bounds that train and never merge.

    python -m fastmerge --method finetune joint

finetune: task t starts from task t-1's weights; plain sequential fine-tuning, the lower bound.
joint: one task with the images of all, for as many epochs; the upper bound, which no continual learner has the data for.
"""

from __future__ import annotations

from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.trajectory import Trajectory
from fastmerge.training import Learner, Phase, Train


class Joint:
    """Its scenario has one task. Between tasks a method like this keeps the model, and nothing else."""

    def __init__(self, learner: Learner):
        self.learner = learner

    def begin(self, task: Task) -> None:
        pass

    def train(self, task: Task, images: TaskImages) -> Phase:
        return Train(self.learner, task, images)

    def merge(self, task: Task, images: TaskImages) -> None:
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return {"theta": self.learner.theta}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.learner.theta.copy_(tensors["theta"])


class Finetune(Joint):
    """Trained un-merged, so the training is shared with the post-hoc rules that train so."""

    def __init__(self, learner: Learner, trajectory: Trajectory):
        super().__init__(learner)
        self.trajectory = trajectory

    def train(self, task: Task, images: TaskImages) -> Phase:
        return self.trajectory.train(self.learner, task, images)
