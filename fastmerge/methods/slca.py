"""SLCA, Slow Learner with Classifier Alignment (Zhang et al., ICCV 2023, arXiv 2303.05118).

    python -m fastmerge --method slca
    python -m fastmerge --method slca slca:align_epochs=0 slca:lora_rank=8   # also without alignment; LoRA, as in SLCA++

Slow learner (section 3.2): the learning rate of the backbone is a hundredth of the head's; the loss is cross-entropy
over the task's own classes. Alignment (section 3.3): every class has a Gaussian N(mu_c, Sigma_c) of the features of the model
at the end of its own task; it does not change when the model does. After the task, the head alone is trained on features
drawn from all Gaussians. Its logits are divided by their mean norm over the tasks, and by a temperature (eq. 5, 6):

    norm = mean over tasks t of ||logits of the classes of t||,   loss = cross-entropy(logits / (temperature * norm))

We follow the released code where it says more: SGD with momentum 0.9; both rates a tenth after 80 % of the epochs; no
alignment after the first task; 256 features a class and epoch, in batches of 256; a cosine by epoch; Sigma + 1e-4 I;
mu_c times 0.9 + 0.1 (t_c + 1) / (t + 1), where t_c is the task of c; the next task starts from the head before the alignment.

Differences from the released code: it takes t_c from the size of the present task, which is right only if all tasks have the
same size; head rows start at zero, not at random, and have no weight decay in training; Sigma has a symmetric root, not a
Cholesky factor. A class that returns in another domain joins its images to its Gaussian.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `slca:clip=0` switches it off. Where the norm
is above 1 a step of SGD is divided by it. In a domain-incremental run t_c is the first task of c, so the factor of a class
does not grow with its later domains.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.gaussians import Gaussians
from fastmerge.methods.method import Method, Tensors
from fastmerge.statistics_pass import ByClass, ClassMoments, StatisticsPass
from fastmerge.training import Learner, Phase, Train, load_optimiser, optimiser_tensors

MOMENTUM, DECAY, RIDGE = 0.9, 0.1, 1e-4
HEAD = ("weight", "bias")


class SLCA(Method):
    """It keeps a Gaussian of every class, and the head before the alignment (`weight`, `bias`)."""

    groups = ("slca",)
    ignores = ("training.lr", "training.weight_decay")
    head = "linear"

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.slca
        self.gaussians = Gaussians(learner.backbone.feature_dim, learner.device)
        self.unaligned = self.present_head()

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass; the alignment sees no images

    def present_head(self) -> Tensors:
        """A copy of the head's rows."""
        return {name: self.learner.head.get_parameter(name).detach().clone() for name in HEAD}

    def begin(self, task: Task) -> Tensors:
        for name, rows in self.unaligned.items():
            self.learner.head.get_parameter(name).data[: len(rows)] = rows
        return {}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return SlowTrain(self.learner, task, images, lr=self.settings.lr)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Align(self, task, images)

    def state_dict(self) -> Tensors:
        return self.gaussians.state_dict() | self.unaligned

    def load_state_dict(self, tensors: Tensors) -> None:
        self.gaussians.load_state_dict(tensors)
        self.unaligned = {name: tensors[name] for name in HEAD}


class SlowTrain(Train):
    def optimiser_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, weight_decay=self.learner.config.slca.weight_decay)

    def rate(self, peak: float, i: int) -> float:
        training = self.learner.config.training
        if i < training.warmup_steps:
            return peak * (i + 1) / training.warmup_steps
        late = i // self.batches.per_epoch >= self.learner.config.slca.decay_at * training.epochs
        return peak * (DECAY if late else 1)


class Align(StatisticsPass):
    """The pass for the Gaussians of the task's classes; then the alignment, a step for every batch of drawn features."""

    sums: ClassMoments

    def __init__(self, method: SLCA, task: Task, images: TaskImages):
        batches = ByClass(method.learner, task, images)
        super().__init__(method.learner, task, images, batches, ClassMoments(method.learner, task, batches))
        self.method, self.settings, head = method, method.settings, method.learner.head
        new = len(set(task.classes[place] for place in batches.present) - set(method.gaussians.known))
        self.per_epoch = len(method.gaussians) + new  # batches: a class has as many features as a batch
        if task.index:
            self.steps += self.settings.align_epochs * self.per_epoch
        self.optimiser = torch.optim.SGD(head.trainable(), momentum=MOMENTUM, weight_decay=self.settings.weight_decay)
        self.passed = False  # whether the sums are in the Gaussians
        self.drawn = -1  # the epoch of `features` and `classes`

    def step(self, i: int) -> dict[str, Tensor]:
        passed = self.batches.steps
        if i < passed - 1:
            return super().step(i)
        if i == passed - 1:
            super().step(i)
            self.method.gaussians.update(self.task, self.sums)
            self.method.unaligned = self.method.present_head()
            self.passed = True
            return {}
        epoch, part = divmod(i - passed, self.per_epoch)
        if epoch != self.drawn:
            self.draw(epoch)
        rows = slice(part * self.settings.samples, (part + 1) * self.settings.samples)
        head, known = self.learner.head, self.method.gaussians.classes
        self.optimiser.zero_grad()
        with torch.enable_grad():
            logits = head(self.features[rows], known)
            loss = F.cross_entropy(logits / (self.norm(logits) * self.settings.temperature), self.places[rows])
            loss.backward()
        for group in self.optimiser.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * epoch / self.settings.align_epochs))
            group["lr"] = self.learner.config.training.head_lr * cosine
        self.learner.parts.changes()
        self.optimiser.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def draw(self, epoch: int) -> None:
        """Draw the features of an epoch, `[k samples, d]` in random order, and the place of each class."""
        gaussians, n = self.method.gaussians, self.settings.samples
        if self.drawn < 0:
            self.roots = gaussians.roots(RIDGE)
        generator = self.learner.generator("align", self.task.index, epoch)
        scale = 0.9 + 0.1 * (gaussians.task + 1) / (self.task.index + 1)
        self.features, self.places = gaussians.drawn(self.roots, n, generator, scale)
        self.drawn = epoch

    def norm(self, logits: Tensor) -> Tensor:
        """Mean over the tasks of the norm of the logits of their classes, `[b, 1]`."""
        tasks = self.method.gaussians.tasks
        groups = [[k for k, own in enumerate(tasks) if own == t] for t in sorted(set(tasks))]
        norms = [torch.linalg.vector_norm(logits[:, group], dim=1, keepdim=True) + 1e-7 for group in groups]
        return torch.cat(norms, 1).mean(1, keepdim=True)

    def tensors(self) -> dict[str, Tensor]:
        return optimiser_tensors(self.optimiser) if self.passed else super().tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.passed = "count" not in tensors
        if not self.passed:
            super().load(tensors)
        load_optimiser(self.optimiser, tensors)
