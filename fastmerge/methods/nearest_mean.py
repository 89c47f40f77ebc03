"""Nearest-mean classifier on frozen features: nothing is trained, a class is the mean of its normalised starting features.

    python -m fastmerge --method nearest-mean

Mensink et al. 2013; the cosine form of iCaRL's nearest mean of exemplars and of PILOT's SimpleCIL, over all images.
"""

from __future__ import annotations

from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.training import Learner


class NearestMean:
    """The class means are the prototype head, and the model is the starting model, which the learner keeps for that head."""

    head = "prototype"

    def __init__(self, learner: Learner):
        self.learner = learner

    def begin(self, task: Task) -> None:
        pass

    def train(self, task: Task, images: TaskImages) -> None:
        return None

    def merge(self, task: Task, images: TaskImages) -> None:
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        pass
