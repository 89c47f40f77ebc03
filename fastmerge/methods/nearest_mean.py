"""Nearest-mean classifier on frozen features: a class is the mean of its normalised features; no training.

    python -m fastmerge --method nearest-mean

Mensink et al. 2013, in the cosine form of iCaRL's nearest mean of exemplars, with all images. SimpleCIL (Zhou et
al. 2024, and in PILOT) differs in one step: it averages the features before it normalises the mean. Here the feature of each
image is normalised first, so that every image counts alike.
"""

from __future__ import annotations

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.method import Method, Tensors


class NearestMean(Method):
    """The prototype head holds the class means; the backbone keeps the starting weights."""

    head = "prototype"
    frozen = True
    trains = False

    def train(self, task: Task, images: TaskImages, during: Tensors) -> None:
        return None
