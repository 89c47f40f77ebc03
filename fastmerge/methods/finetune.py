"""Lower and upper bound: training without merging.

    python -m fastmerge --method finetune joint

finetune: task t starts from task t-1's weights; plain sequential fine-tuning, the lower bound.
joint: one task with the images of all tasks, for the same number of epochs. The upper bound: a continual
learner lacks this data.
"""

from __future__ import annotations

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.method import Method, Tensors
from fastmerge.methods.trajectory import Trajectory
from fastmerge.training import Learner, Phase, Train


class Joint(Method):
    """Its scenario has one task."""

    joint = True

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Train(self.learner, task, images)


class Finetune(Method):
    """It shares its training with the post-hoc rules whose training does not depend on merging."""

    def __init__(self, learner: Learner, trajectory: Trajectory):
        super().__init__(learner)
        self.shared = trajectory

    @classmethod
    def build(cls, learner: Learner, trajectory: Trajectory, protocol: str | None) -> Finetune:
        return cls(learner, trajectory)

    @classmethod
    def trajectory(cls, config: Config, protocol: str | None) -> str:
        return "sequential"

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return self.shared.train(self.learner, task, images)
