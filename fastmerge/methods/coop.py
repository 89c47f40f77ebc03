"""CoOp, context optimisation (Zhou et al., IJCV 2022, arXiv 2109.01134), trained on the tasks in sequence.

    python -m fastmerge --method coop --coop.tokens 16

Both towers of CLIP are frozen. The prompt of a class is M learned vectors and the class name (eq. 2, "end" position); all
classes and tasks share the vectors. Loss: cross-entropy over the task's own classes with cosine logits (eq. 3).

As in the released code: vectors drawn from N(0, 0.02), SGD with momentum 0.9 and weight decay 5e-4, one epoch at 1e-5 and
then a cosine, which here changes every step. The paper trains 200 epochs on 16 images a class; here `--epochs` counts, and
the warm-up epoch is left out where there is only one. After every task the class rows of all names are encoded with the
vectors into the text head, so the saved model needs no text tower.

The gradient is clipped to norm 1 (`--clip`); the released code of CoOp, and that of VPT (vpt.py), does not clip:
`coop:clip=0` and `vpt:clip=0` switch it off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.precision import tf32
from fastmerge.models.text_context import ClassPrompts
from fastmerge.models.trainable import Beside, PassesThrough, Trainable
from fastmerge.training import Learner, Phase, Train, learning_rate, positions

FIRST_RATE = 1e-5  # of the warm-up epoch


class Context(PassesThrough):
    """The learned vectors, `[m, width]`."""

    def __init__(self, generator: torch.Generator, *shape: int):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(shape, generator=generator))


class CoOp(Method):
    """It keeps the learned vectors. Methods that learn other texts of the frozen tower have its frame."""

    groups = ("coop",)
    ignores = ("training.lr", "training.warmup_steps", "training.weight_decay")
    lora = False
    frozen = True
    needs_text = True
    context: nn.Module

    def __init__(self, learner: Learner):
        super().__init__(learner)
        assert learner.text is not None
        self.text: ClassPrompts = learner.text
        self.settings = getattr(learner.config, self.groups[0])
        self.context = self.made(learner.generator("context")).to(learner.device)
        self.trained = self.trainable()

    @classmethod
    def check_text(cls, config: Config, text: ClassPrompts) -> None:
        if (count := cls.length(config)) > text.room:
            raise UserError(
                f"--{cls.groups[0]}.tokens: {count} context vectors before a class name, and the text tower has room for "
                f"{text.room}"
            )

    @classmethod
    def length(cls, config: Config) -> int:
        """Context vectors before a class name."""
        return getattr(config, cls.groups[0]).tokens

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return self.settings.lr

    @classmethod
    def prompts(cls, config: Config, classes: int, images: int) -> int:
        """How many prompts a step encodes at most, for a task of so many classes and a batch of so many images."""
        return classes

    def trainable(self) -> Trainable:
        return Beside(self.learner.backbone, self.context)

    def made(self, generator: torch.Generator) -> nn.Module:
        """The parameters at the start."""
        return Context(generator, self.settings.tokens, self.text.width)

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainContext(self, task, images)

    def deployed(self) -> Tensor:
        """The vectors that classify, `[m, width]`."""
        return self.context.get_parameter("vectors")

    def rows(self, classes: Tensor) -> Tensor:
        """The rows of these classes, `[k, d]`, differentiable."""
        return self.text.rows(self.deployed(), classes)

    @torch.no_grad()
    def write(self) -> None:
        """Encode the rows of all classes into the text head."""
        weight = self.learner.head.get_buffer("weight")
        weight.copy_(self.rows(torch.arange(len(weight), device=weight.device)))

    def state_dict(self) -> Tensors:
        return {"context": self.trained.theta.detach()}

    def load_state_dict(self, tensors: Tensors) -> None:
        self.trained.theta.data.copy_(tensors["context"])


class TrainContext(Train):
    def __init__(self, method: CoOp, task: Task, images: TaskImages):
        super().__init__(method.learner, task, images, trainable=method.trained, lr=method.peak)
        self.method = method

    def optimiser_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=5e-4)

    def rate(self, peak: float, i: int) -> float:
        first = self.batches.per_epoch
        if self.steps == first:
            return learning_rate(peak, i, self.steps)
        return min(FIRST_RATE, peak) if i < first else learning_rate(peak, i - first, self.steps - first)

    def task_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(features, self.method.rows(self.classes)), positions(labels, self.classes))

    def logits(self, features: Tensor, rows: Tensor) -> Tensor:
        """features `[b, d]`, rows `[k, d]` normalised -> `[b, k]`."""
        with tf32(False):
            return self.learner.head.get_buffer("scale") * F.normalize(features, dim=1) @ rows.T

    def finish(self) -> None:
        super().finish()
        self.method.write()
