"""The learner (model, head, seeds), the interface of a phase, and the training phase that most methods share.

Every random choice of step i depends only on (seed, task, phase, i), so a phase that continues at step i in another
process makes the same choices.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.augment import normalise, random_resized_crop, to_float
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.flat import FlatModel
from fastmerge.models.backbone import Backbone
from fastmerge.models.heads import Head
from fastmerge.models.lora import LowRank, Projections
from fastmerge.models.precision import allow_tf32
from fastmerge.models.prompts import drawn_prefix
from fastmerge.models.recompute import checkpoint_blocks
from fastmerge.models.text_context import ClassPrompts
from fastmerge.models.trainable import AllWeights, Trainable
from fastmerge.parts import Parts, free_bytes, saved_bytes
from fastmerge.ranks import ranks
from fastmerge.wording import counted

ADAPTED = ("key", "value")  # projections (P&M, Implementation Details)


PHASES = ("train", "merge")  # the phases of every task, in this order


class Phase(ABC):
    """A numbered sequence of steps of one task.

    name: one of PHASES. steps: their number. batches: which images step i takes, None if there are no steps.
    seconds_elsewhere: time that the work of this phase took in an earlier run; it counts for this run too.
    bytes_written: of files that `finish` wrote.
    """

    name: str
    steps: int
    batches: Batches | None
    seconds_elsewhere: float = 0.0
    bytes_written: int = 0

    @abstractmethod
    def step(self, i: int) -> dict[str, Tensor]:
        """Do step i; return 0-d tensors by name for the log. It calls `Parts.changes` before it changes weights, optimiser or
        sums, because after an out-of-memory error it is done again in smaller parts."""

    def finish(self) -> None:
        """Called after the last step, also if there are no steps."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint between two steps, besides those of the learner, the method and the task."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`."""


class Learner:
    """The model that a method trains: a flat backbone and its head on one device, with the seeds of one run.

    Attributes:
        parts: how many images a step computes at once.
        flat: the backbone's parameters as one buffer, with `--prompt-length` those of its prefix alone; `theta` is
            `flat.theta` without autograd, `[n]` fp32.
        text: the class names and the text tower, for methods with `needs_text`; else None.
        test_images: those of a task, by its index, for a method that is asked to choose on them; set by the loop.
        initial: `[n]` copy of the starting weights if the head needs it (prototypes) and they are trained; else None.

    frozen: the method never changes the backbone, whose weights need no autograd and no gradient buffer then.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        config: Config,
        seed: int,
        device: torch.device,
        flip: bool = False,
        frozen: bool = False,
    ):
        self.config, self.seed, self.device = config, seed, device
        self.frozen_bytes = 0  # of weights that are not in theta
        if config.training.prompt_length and not frozen:
            self.frozen_bytes = sum(p.nbytes for p in backbone.parameters())
            backbone.add_prefix(drawn_prefix(backbone, config.training.prompt_length, self.generator("prefix")))
        # eval: no dropout, so that a step is a function of its seed
        self.flat = FlatModel(backbone.eval(), frozen=frozen).to(device)
        self.backbone, self.head = backbone, head.to(device)
        backbone.precision = config.training.precision or "fp32"
        allow_tf32(backbone.precision == "tf32")  # of backward passes
        if config.training.checkpoint_gradients:
            checkpoint_blocks(backbone)
        self.ranks = ranks()
        self.flip = flip if config.data.flip is None else config.data.flip
        self.parts = Parts(
            config.training.batch_size,
            config.training.micro_batch,
            partial(free_bytes, device) if device.type == "cuda" else None,
            partial(saved_bytes, self.flat, backbone.image_size),
            self.theta.nbytes,
            lambda n: self.ranks.own(n),
        )
        if config.training.compile and not config.training.checkpoint_gradients:  # a row may ask for the second alone
            self.backbone.compile_with(self.parts.usual, lambda text: self.parts.say(text))
        self.text: ClassPrompts | None = None  # set for methods that need it
        self.test_images: Callable[[int], TaskImages] | None = None
        trained = not frozen and not config.training.prompt_length
        self.initial = self.theta.clone() if head.needs_initial_features and trained else None

    @property
    def theta(self) -> Tensor:
        return self.flat.theta.detach()

    def seed_for(self, *what: str | int) -> int:
        """A seed in [0, 2^63) that depends only on the run's seed and on `what`."""
        digest = hashlib.blake2b(repr((self.seed, *what)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self, *what: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_for(*what))

    def normalise(self, images: Tensor) -> Tensor:
        return normalise(images, self.backbone.mean, self.backbone.std)

    def plain(self, images: Tensor) -> Tensor:
        """Convert uint8 `[b, 3, s, s]` to the backbone's input, without augmentation."""
        return self.normalise(to_float(images))

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Convert uint8 `[b, 3, s, s]` to the backbone's input, randomly cropped (and flipped)."""
        scale = (self.config.data.crop_scale, 1.0)
        return self.normalise(random_resized_crop(images, generator, scale=scale, flip=self.flip))

    def without_gradient(self, function: Callable[[Tensor], Tensor], images: Tensor, dim: int = 0) -> Tensor:
        """function(images) in parts that fit the memory, joined along `dim`, which counts the images. Where several
        processes share a batch, each computes its own part. images: uint8 `[b, 3, s, s]`."""
        n = len(images)
        own = self.ranks.own(n) if n >= self.ranks.size else slice(0, n)  # of a few images every process computes all

        @torch.no_grad()
        def work() -> Tensor:
            parts = self.parts.cut(own, n, "evaluate")
            return torch.cat([function(self.plain(images[part])) for part, _ in parts], dim)

        mine = self.parts.attempt(work)
        if own == slice(0, n):
            return mine
        shape = list(mine.shape)
        shape[dim] = n
        found = mine.new_zeros(shape)
        found.narrow(dim, own.start, own.stop - own.start).copy_(mine)
        self.ranks.add_(found)
        return found

    def adapted(self, rank: int) -> Projections | AllWeights:
        """The weights that LoRA of this rank changes: the key and value projections; rank 0: all weights."""
        return Projections(self.flat, ADAPTED) if rank else AllWeights(self.flat)

    def trainable(self, rank: int, *what: str | int) -> LowRank | AllWeights:
        """What is trained: LoRA of this rank, initialised from the seed for `what`; rank 0: all weights."""
        return LowRank(self.flat, rank, ADAPTED, self.generator(*what)) if rank else AllWeights(self.flat)

    def grow_head(self, task: Task, images: TaskImages) -> None:
        """Prepare the head for a new task: add rows, or class means of the starting model's features."""
        self.head.grow(task.classes, self.generator("head", task.index))
        if not self.head.needs_initial_features:
            return
        current = self.theta.clone() if self.initial is not None else None
        if self.initial is not None:
            self.theta.copy_(self.initial)
        start = self.backbone.without_prefix if self.config.training.prompt_length else self.backbone
        for rows in torch.arange(len(images)).split(self.config.training.batch_size):
            pixels, labels = images.batch(rows)
            self.head.observe(self.without_gradient(start, pixels), labels)
        if current is not None:
            self.theta.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """The model, the head, and `initial` unless None; the tensors are not copied."""
        kept = {"theta": self.theta} | {f"head.{k}": v for k, v in self.head.state_dict().items()}
        return kept if self.initial is None else kept | {"initial": self.initial}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.theta.copy_(tensors["theta"])
        self.head.load_state_dict({k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")})
        self.head.to(self.device)
        if self.initial is not None:
            self.initial.copy_(tensors["initial"])


class Batches:
    """Which images step i takes: a new permutation every epoch; the last batch of an epoch may be smaller."""

    def __init__(self, learner: Learner, task: Task, images: TaskImages, phase: str, epochs: int):
        self.learner, self.images, self.what = learner, images, (task.index, phase)
        self.per_epoch = math.ceil(len(images) / learner.config.training.batch_size)
        self.steps = epochs * self.per_epoch
        self._epoch = -1

    def rows(self, i: int) -> Tensor:
        """Indices into the task's images, int64 on the CPU."""
        epoch, place = divmod(i, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self.order(epoch).split(self.learner.config.training.batch_size), epoch
            self.images.plan(list(self._order[place:]))
        return self._order[place]

    def order(self, epoch: int) -> Tensor:
        """All rows in the order of an epoch, int64 on the CPU."""
        return torch.randperm(len(self.images), generator=self.learner.generator("order", *self.what, epoch))


def learning_rate(peak: float, i: int, steps: int, warmup: int = 0) -> float:
    """Linear warm-up over `warmup` steps, then cosine annealing from `peak` to 0 at i = `steps` (Loshchilov & Hutter
    2017, eq. 5, one cycle). A task of up to `warmup` steps never anneals, as in the released code of MagMax and CMM."""
    if i < warmup:
        return peak * (i + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))


class Train(Phase):
    """Cross-entropy over the task's own classes, AdamW, cosine (TRM, Implementation Details; MagMax trains alike).

    As in the released code of MagMax and CMM, logits of earlier classes are excluded. trainable: what is trained, by
    default chosen by `--lora-rank`. lr: peak learning rate, by default `--lr`. A subclass may override `optimiser_for`
    and `rate`.
    """

    name = "train"
    kind = "train"  # of steps, see `Parts`
    batches: Batches

    def __init__(
        self,
        learner: Learner,
        task: Task,
        images: TaskImages,
        *,
        trainable: Trainable | None = None,
        lr: float | None = None,
    ):
        self.learner, self.task, self.images = learner, task, images
        settings = learner.config.training
        self.batches = Batches(learner, task, images, self.name, settings.epochs)
        self.steps = self.batches.steps
        self.classes = torch.tensor(task.classes, device=learner.device)
        self.trainable = trainable or learner.trainable(settings.lora_rank, "lora", task.index)
        groups: list[dict[str, Any]] = [{"params": [self.trainable.theta], "peak": settings.lr if lr is None else lr}]
        if head := learner.head.trainable():
            # no weight decay: it would shrink the rows of classes that this task does not train
            groups.append({"params": head, "peak": settings.head_lr, "weight_decay": 0.0})
        self.optimiser = self.optimiser_for(groups)

    def optimiser_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser for parameter groups, each with its peak learning rate as `peak`."""
        fused = self.learner.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, weight_decay=self.learner.config.training.weight_decay, fused=fused)

    def rate(self, peak: float, i: int) -> float:
        """The learning rate of step i."""
        return learning_rate(peak, i, self.steps, self.learner.config.training.warmup_steps)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch. images: normalised floats `[b, 3, s, s]`; labels: class indices `[b]`."""
        return self.task_loss(self.features(images), labels)

    def features(self, images: Tensor) -> Tensor:
        return self.trainable.features(images)

    def task_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.learner.head(features, self.classes), positions(labels, self.classes))

    def regularise(self) -> None:
        """Hook between backward and clipping: a method may add to the flat gradient."""

    def step(self, i: int) -> dict[str, Tensor]:
        learner, rows = self.learner, self.batches.rows(i)
        pixels, labels = self.images.batch(rows)
        images = learner.augmented(pixels, learner.generator("augment", self.task.index, i))
        self.gradient.zero_()
        for p in learner.head.trainable():
            p.grad = None
        loss = learner.theta.new_zeros(())
        for part, share in learner.parts.of(len(images), self.kind):
            value = self.loss(images[part], labels[part]) * share
            value.backward()
            loss += value.detach()
        learner.ranks.add_(loss, self.gradient, *gradients(learner.head.trainable()))
        self.regularise()
        if clip := learner.config.training.clip:
            norm = torch.nn.utils.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], clip)
        else:
            norm = self.gradient.norm()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(group["peak"], i)
        learner.parts.changes()
        self.optimiser.step()
        return {"loss": loss, "gradient_norm": norm.detach()}

    @property
    def gradient(self) -> Tensor:
        """The gradient of the trained parameters, `[p]`."""
        gradient = self.trainable.theta.grad
        assert gradient is not None
        return gradient

    def finish(self) -> None:
        self.trainable.fold()
        self.learner.flat.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        return self.trainable.tensors() | optimiser_tensors(self.optimiser)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.trainable.load(tensors)
        load_optimiser(self.optimiser, tensors)


class TrainWithAdam(Train):
    """With Adam and no weight decay, as methods train that leave the backbone frozen."""

    def optimiser_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            group.pop("weight_decay", None)
        return torch.optim.Adam(groups, fused=self.learner.device.type in ("cpu", "cuda"))


def gradients(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients of the parameters; a missing one becomes zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def positions(labels: Tensor, classes: Tensor) -> Tensor:
    """Column of each label. labels: class indices `[b]`; classes: the class index of each column `[k]`.

    Raises:
        ValueError: a label is not among `classes`. Checked only on the CPU, since the check would stall a GPU.
    """
    hit = labels[:, None] == classes[None, :]
    if labels.device.type == "cpu" and not bool(hit.any(1).all()):
        raise ValueError(
            f"label {int(labels[~hit.any(1)][0])} is not among the {counted(len(classes), 'class', 'classes')} of this task"
        )
    return hit.int().argmax(1)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as a flat dict 'optimiser.<parameter>.<name>' of tensors."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{i}.{name}": torch.as_tensor(v) for i, entry in state.items() for name, v in entry.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
