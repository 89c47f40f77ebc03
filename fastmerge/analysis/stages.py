"""Learn the first tasks of a scenario with a method, stage by stage, and score any weights on these tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.evaluate import batches
from fastmerge.loop import Images
from fastmerge.methods.method import Method, Tensors
from fastmerge.setup import Setup
from fastmerge.training import Learner, Phase, positions


class Score(NamedTuple):
    """accuracies: per task, percent, among the classes of all tasks; accuracy: over all images. loss: mean over the
    tasks of the cross-entropy in nats, among the classes of all tasks; loss_own: among the task's own (as in
    training)."""

    accuracies: list[float]
    accuracy: float
    loss: float
    loss_own: float


M = TypeVar("M", bound=Method)


class Stages(Generic[M]):
    """A learner with a method, and the first `count` tasks of the scenario. config: settings that replace the
    command's. during: the tensors of the current task."""

    def __init__(self, setup: Setup, method: Callable[[Learner], M], count: int, config: Config | None = None):
        self.learner = setup.learner(setup.config.training.seeds[0], config=config)
        self.learner.parts.say = lambda text: print(text, file=sys.stderr)  # standard output lists the files
        self.method: M = method(self.learner)
        self.during: Tensors = {}
        self.images = Images(setup.scenario, setup.cache)
        self.tasks = setup.scenario.tasks[:count]
        self.tests: list[TaskImages] = [setup.cache.get(setup.dataset.test, t.test, keep=True) for t in self.tasks]
        self.scenario = setup.scenario

    def training_images(self, number: int) -> TaskImages:
        return self.images.train(self.tasks[number])

    def train(self, number: int, images: TaskImages | None = None) -> TaskImages:
        """Begin task `number` and train it; returns its images. images: these, if the caller has them."""
        task = self.tasks[number]
        images = images or self.training_images(number)
        self.learner.grow_head(task, images)
        self.during = self.method.begin(task)
        work(self.method.train(task, images, self.during))
        return images

    def merging(self, number: int, images: TaskImages) -> Phase | None:
        """The merging phase of task `number`, after `train`."""
        return self.method.merge(self.tasks[number], images, self.during)

    @torch.no_grad()
    def loss(self, number: int, images: TaskImages) -> float:
        """The loss of training at the current weights, without augmentation: the mean over `images`, of task `number`, of the
        cross-entropy in nats among the task's own classes."""
        learner, classes = self.learner, torch.tensor(self.tasks[number].classes, device=self.learner.device)
        total = torch.zeros((), dtype=torch.float64, device=learner.device)
        for rows in torch.arange(len(images)).split(learner.config.training.batch_size):
            pixels, labels = images.batch(rows)
            logits = learner.head(learner.without_gradient(learner.backbone, pixels), classes)
            total += F.cross_entropy(logits, positions(labels, classes), reduction="sum")
        return float(total) / len(images)

    def gradient(self, number: int, images: TaskImages) -> Tensor:
        """The gradient of `loss` with respect to the weights that training changes, a new tensor `[n]`, or `[m]` of LoRA."""
        learner, classes = self.learner, torch.tensor(self.tasks[number].classes, device=self.learner.device)
        flat = learner.flat
        flat.zero_grad()
        for rows in torch.arange(len(images)).split(learner.config.training.batch_size):
            pixels, labels = images.batch(rows)
            inputs, targets = learner.plain(pixels), positions(labels, classes)
            for part, share in learner.parts.of(len(rows), "train"):
                loss = F.cross_entropy(learner.head(learner.backbone(inputs[part]), classes), targets[part])
                (loss * (share * len(rows) / len(images))).backward(inputs=flat.parameters)
        learner.ranks.add_(flat.gradient)
        found = learner.adapted(learner.config.training.lora_rank).gather(flat.gradient)
        flat.zero_grad()
        return found

    @torch.no_grad()
    def score(self, count: int | None = None) -> Score:
        """Score the current weights on the test images of the first `count` tasks, by default of all."""
        count = count or len(self.tasks)
        learner, tests = self.learner, self.tests[:count]
        classes = torch.tensor(self.scenario.seen(count - 1), device=learner.device)
        features = self.method.features()
        own = torch.stack([torch.isin(classes.cpu(), torch.tensor(t.classes)) for t in self.tasks[:count]]).to(
            learner.device
        )
        counts = [len(t) for t in tests]
        # per task: correct, loss, loss among its own classes
        sums = torch.zeros(len(counts), 3, dtype=torch.float64, device=learner.device)
        for pixels, labels, test in batches(tests, learner.config.training.batch_size):
            logits: Tensor = learner.head(features(learner.plain(pixels)), classes)
            truth = positions(labels, classes)
            right = (logits.argmax(1) == truth).double()
            loss = F.cross_entropy(logits, truth, reduction="none")
            narrow = F.cross_entropy(logits.masked_fill(~own[test], -torch.inf), truth, reduction="none")
            sums.index_add_(0, test, torch.stack([right, loss.double(), narrow.double()], 1))
        means = (sums.cpu() / torch.tensor(counts)[:, None]).T.tolist()
        accuracies = [100 * r for r in means[0]]
        correct = sum(a * n for a, n in zip(accuracies, counts, strict=True))
        return Score(accuracies, correct / sum(counts), *(sum(x) / len(counts) for x in means[1:]))


def work(phase: Phase | None) -> dict[str, Tensor]:
    """Run all steps of a phase; returns the terms of the last one."""
    terms: dict[str, Tensor] = {}
    if phase is None:
        return terms
    for i in range(phase.steps):
        terms = phase.step(i)
    phase.finish()
    return terms
