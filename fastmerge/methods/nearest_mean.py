"""Nearest-mean classifier on frozen features: nothing is trained, a class is the mean of its normalised starting features.

    python -m fastmerge --method nearest-mean

Mensink et al. 2013; the cosine form of iCaRL's nearest mean of exemplars and of PILOT's SimpleCIL, over all images.
"""

from __future__ import annotations

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.method import Method, Tensors


class NearestMean(Method):
    """The class means are the prototype head; the backbone stays at the starting weights."""

    head = "prototype"
    frozen = True
    trains = False

    def train(self, task: Task, images: TaskImages, during: Tensors) -> None:
        return None
