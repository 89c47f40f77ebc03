"""LwF, Learning without Forgetting (Li & Hoiem 2017): on new images, keep the old model's predictions for old classes.

    python -m fastmerge --method lwf --lwf.lam 1 --lwf.temperature 2

Loss: cross-entropy over the task's classes + lam * cross-entropy between the predictions of theta_{t-1} (teacher) and of the
model over all classes learned before (with a prototype head, of which it has seen an image), both softened by the
temperature. As in the paper there is no factor T^2. The teacher sees the same augmented images and uses the head from the
start of the task.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fastmerge.checkpoint import joined, select
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.method import Method, Tensors
from fastmerge.settings.merging import LwFSettings
from fastmerge.settings.statistics import ICaRLSettings
from fastmerge.training import Learner, Phase, Train


class LwF(Method):
    """It keeps the known classes. During a task: `teacher`, theta_{t-1}, and `teacher_head.*`, its head."""

    groups = ("lwf",)
    settings: LwFSettings | ICaRLSettings

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.lwf
        self.known = torch.zeros(0, dtype=torch.int64)  # classes of the previous tasks

    def begin(self, task: Task) -> Tensors:
        if not len(self.known):
            return {}
        head = {name: tensor.clone() for name, tensor in self.learner.head.state_dict().items()}
        return {"teacher": self.learner.theta.clone()} | joined(teacher_head=head)

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Distil(self, task, images, during)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> None:
        own = torch.tensor(task.classes, device=self.known.device)
        self.known = torch.unique(torch.cat([self.known, own]))

    def state_dict(self) -> Tensors:
        return {"known": self.known}

    def load_state_dict(self, tensors: Tensors) -> None:
        self.known = tensors["known"]


UNSEEN = -1e30  # a logit so low that its probability is 0, and finite


class Distil(Train):
    """during: the teacher and its head, empty in the first task."""

    def __init__(self, method: LwF, task: Task, images: TaskImages, during: Tensors):
        super().__init__(method.learner, task, images)
        self.method, self.known, self.teacher = method, method.known.to(method.learner.device), during.get("teacher")
        if self.teacher is not None:
            self.teacher_head = copy.deepcopy(self.learner.head)
            self.teacher_head.load_state_dict(select(during, "teacher_head"))
            self.teacher_head.to(self.learner.device)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        method, learner = self.method, self.learner
        if self.teacher is None:
            return super().loss(images, labels)
        with torch.no_grad():
            features = functional_call(learner.flat.module, learner.flat.as_dict(self.teacher), (images,))
            wanted = self.teacher_head(features, self.known)
        features, t = self.features(images), method.settings.temperature
        # A prototype head has the logit -inf for a class of which it has seen no image. There is nothing to keep, and the
        # term 0 * -inf would be NaN.
        logits = learner.head(features, self.known).masked_fill(wanted == -math.inf, UNSEEN)
        kept = F.cross_entropy(logits / t, (wanted / t).softmax(1))
        return self.task_loss(features, labels) + method.settings.lam * kept
