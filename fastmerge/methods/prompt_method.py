"""What the methods share that learn prompts for a frozen transformer (models/prompts.py, models/prompt_pools.py).

A step runs the backbone twice: once without prompts for the queries, which choose the prompts, and once with them. Training
images are cropped anew in every epoch, and the query is that of the crop, as in all released code, so that a key is
pulled to what the prompt is trained on. It cannot be kept: no two crops of an image are the same.

The loss is cross-entropy over the task's own classes plus the pool's own term. Adam without weight decay trains the prompts
at the method's rate, and a linear head at `--head-lr` (released code: at the same rate).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.backbone import Backbone
from fastmerge.models.features import Features, prompted
from fastmerge.models.prompt_pools import POOLS, Pool
from fastmerge.models.prompts import check_prompts
from fastmerge.models.trainable import Prompted
from fastmerge.training import Learner, Phase, TrainWithAdam


class PromptMethod(Method):
    """It keeps its pool. inserted: whether prompts are tokens and not prefixes. constant: whether the rate is, at
    `lr` times batch size / 256; else it is annealed from `lr`. layers: its settings that name blocks."""

    lora = False
    frozen = True
    inserted: ClassVar[bool] = False
    constant: ClassVar[bool] = True
    layers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings: Any = getattr(learner.config, self.groups[0])
        self.pool: Pool = self.start(learner.backbone, learner.generator("pool")).to(learner.device)

    @abstractmethod
    def start(self, backbone: Backbone, generator: torch.Generator) -> Pool:
        """The pool of the first task."""

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        settings, flag = getattr(config, cls.groups[0]), f"--{cls.groups[0]}.layers"
        for name in cls.layers:
            flag = f"--{cls.groups[0]}.{name}".replace("_", "-")
            blocks = list(getattr(settings, name))
            if not blocks or len(set(blocks)) < len(blocks):
                raise UserError(f"{flag} {blocks}: expected at least one block, each once")
            check_prompts(backbone, blocks, flag)
        if cls.inserted:
            check_prompts(backbone, (0,), flag, tokens=True)

    def first_batch(self, task: Task, pixels: Tensor) -> None:
        """Called before the first step of a task with its images, uint8 `[b, 3, s, s]`: what starts from images. Called again
        where the step is done again (after an out-of-memory error), so it must not build on what it wrote."""

    def begin(self, task: Task) -> Tensors:
        if task.index:
            grown = self.pool.grown(self.learner.generator("pool", task.index))
            self.pool = type(self.pool)(grown).to(self.learner.device)
        return {}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainPrompts(self, task, images)

    def features(self) -> Features:
        return prompted(self.learner.backbone, self.pool)

    def state_dict(self) -> Tensors:
        return dict(self.pool.state_dict())

    def load_state_dict(self, tensors: Tensors) -> None:
        self.pool = POOLS[self.pool.kind](tensors).to(self.learner.device)


class TrainPrompts(TrainWithAdam):
    trainable: Prompted

    def __init__(self, method: PromptMethod, task: Task, images: TaskImages):
        self.constant, lr = method.constant, method.settings.lr
        if method.constant:
            lr *= method.learner.config.training.batch_size / 256
        prompts = Prompted(method.learner.backbone, method.pool)
        super().__init__(method.learner, task, images, trainable=prompts, lr=lr)
        self.method = method

    def step(self, i: int) -> dict[str, Tensor]:
        if i == 0:
            self.method.first_batch(self.task, self.images.batch(self.batches.rows(0))[0])
        return super().step(i)

    def rate(self, peak: float, i: int) -> float:
        return peak if self.constant else super().rate(peak, i)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        features, penalty = self.trainable.in_training(images)
        return self.task_loss(features, labels) + penalty
