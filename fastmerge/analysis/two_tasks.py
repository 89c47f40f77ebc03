"""The first two tasks learned by CMM's training phase, with or without the tangent space, stage by stage."""

from __future__ import annotations

import dataclasses

from fastmerge.data.cache import TaskImages
from fastmerge.loop import Images
from fastmerge.methods.cmm import CMM
from fastmerge.setup import Setup
from fastmerge.training import Phase


class TwoTasks:
    """A learner with the method CMM, and the images of the first two tasks. tangent: None as the settings say."""

    def __init__(self, setup: Setup, tangent: bool | None = None):
        config = setup.config
        self.learner = setup.learner(config.training.seeds[0])
        if tangent is not None:
            self.learner.config = dataclasses.replace(config, cmm=dataclasses.replace(config.cmm, tangent=tangent))
        self.method = CMM(self.learner)
        self.images = Images(setup.scenario, setup.cache)
        self.tasks = setup.scenario.tasks[:2]
        self.tests: list[TaskImages] = [setup.cache.get(setup.dataset.test, t.test, keep=True) for t in self.tasks]
        self.classes = setup.scenario.seen(1)

    def train(self, number: int) -> TaskImages:
        """Begin task `number` and train it; returns its images."""
        task = self.tasks[number]
        images = self.images.train(task)
        self.learner.grow_head(task, images)
        self.method.begin(task)
        work(self.method.train(task, images))
        return images


def work(phase: Phase) -> None:
    """All steps of a phase."""
    for i in range(phase.steps):
        phase.step(i)
    phase.finish()
