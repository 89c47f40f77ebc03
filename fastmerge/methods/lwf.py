"""LwF, Learning without Forgetting (Li & Hoiem 2017): on the new images, keep the old model's predictions of old classes.

    python -m fastmerge --method lwf --lwf.lam 1 --lwf.temperature 2

Loss: cross-entropy over the task's classes + lam * cross-entropy between the predictions of theta_{t-1} (teacher) and of the
model over all classes learned before, both softened by the temperature. As in the paper there is no factor T^2. The teacher
sees the same augmented images, with the head as it was when the task began.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fastmerge.checkpoint import joined, select
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.training import Learner, Phase, Train


class LwF:
    """Between tasks it keeps the model, and which classes it knows."""

    def __init__(self, learner: Learner):
        self.learner, self.settings = learner, learner.config.lwf
        self.known = torch.zeros(0, dtype=torch.int64)  # classes of the tasks before
        self.teacher: Tensor | None = None  # theta_{t-1} and its head, during a task only
        self.teacher_head = None

    def begin(self, task: Task) -> None:
        if len(self.known):
            self.teacher, self.teacher_head = self.learner.theta.clone(), copy.deepcopy(self.learner.head)

    def train(self, task: Task, images: TaskImages) -> Phase:
        return Distil(self, task, images)

    def merge(self, task: Task, images: TaskImages) -> None:
        self.teacher = self.teacher_head = None
        self.known = torch.unique(torch.cat([self.known, torch.tensor(task.classes)]))

    def state_dict(self) -> dict[str, Tensor]:
        own = {"theta": self.learner.theta, "known": self.known}
        if self.teacher is None:
            return joined(own=own)
        return joined(own=own | {"teacher": self.teacher}, teacher_head=self.teacher_head.state_dict())

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        own = select(tensors, "own")
        self.learner.theta.copy_(own["theta"])
        self.known = own["known"]
        if "teacher" in own:
            self.teacher, self.teacher_head = own["teacher"].to(self.learner.device), copy.deepcopy(self.learner.head)
            self.teacher_head.load_state_dict(select(tensors, "teacher_head"))
            self.teacher_head.to(self.learner.device)


class Distil(Train):
    def __init__(self, method: LwF, task: Task, images: TaskImages):
        super().__init__(method.learner, task, images)
        self.method, self.known = method, method.known.to(method.learner.device)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        method, learner = self.method, self.learner
        if method.teacher is None:
            return super().loss(images, labels)
        with torch.no_grad():
            features = functional_call(learner.flat.module, learner.flat.as_dict(method.teacher), (images,))
            wanted = method.teacher_head(features, self.known)
        features, t = self.features(images), method.settings.temperature
        kept = F.cross_entropy(learner.head(features, self.known) / t, (wanted / t).softmax(1))
        return self.task_loss(features, labels) + method.settings.lam * kept
