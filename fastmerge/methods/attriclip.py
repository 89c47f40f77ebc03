"""AttriCLIP (Wang et al., CVPR 2023, arXiv 2305.11488): a bank of attributes, each a key and a text prompt, on the tasks in
sequence.

    python -m fastmerge --method attriclip --attriclip.bank 10 --attriclip.top 3

Both towers of CLIP are frozen. The keys nearest to an image's feature by cosine choose its attributes; their prompts stand
before the class name, so the class rows depend on the image. Loss: cross-entropy over the task's own classes, plus `match`
times the mean of 1 - cosine between the image and its keys, plus `orthogonal` times the mean absolute cosine between the
texts of different attributes without a class name. All tasks train one bank.

As in the released code (vcop_4.py): weights 0.7 and 0.3, SGD without momentum at 1e-3 * batch / 20, cosine, keys and prompts
from N(0, 0.02). Differences: the released code starts a new bank for every task unless told to keep it, which forgets all;
it chooses by products with keys that are not normalised, the paper by cosine, as here; its prompts stand in the order of
similarity, here in the order of the bank; its texts without a name have the other prompts' placeholders, here nothing.
After a task the class rows of all sets of attributes are encoded, C(10, 3) = 120 for every class: the saved model needs no
text tower, but keeps these rows (AttributeHead, models/heads.py). Others could not reproduce the paper's numbers.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `attriclip:clip=0` switches it off.
"""

from __future__ import annotations

from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.coop import CoOp, TrainContext
from fastmerge.models.backbone import Backbone
from fastmerge.models.heads import AttributeHead
from fastmerge.models.text_context import NAMELESS
from fastmerge.models.trainable import PassesThrough
from fastmerge.training import Learner, Phase, learning_rate, positions

MOST_SETS = 1000


class Bank(PassesThrough):
    """keys `[N, d]`, prompts `[N, m, width]`."""

    def __init__(self, count: int, d: int, tokens: int, width: int, generator: torch.Generator):
        super().__init__()
        self.keys = nn.Parameter(0.02 * torch.randn(count, d, generator=generator))
        self.prompts = nn.Parameter(0.02 * torch.randn(count, tokens, width, generator=generator))


class AttriCLIP(CoOp):
    """It keeps the bank; the head keeps the class rows."""

    groups = ("attriclip",)
    context: Bank

    def __init__(self, learner: Learner):
        super().__init__(learner)
        s, weight, scale = self.settings, *(learner.head.get_buffer(name) for name in ("weight", "scale"))
        self.attributes = AttributeHead(weight, float(scale), s.bank, s.top).to(learner.device)
        self.sets = torch.combinations(torch.arange(s.bank), s.top).to(learner.device)  # [sets, top]
        learner.head = self.attributes

    @classmethod
    def prompts(cls, config: Config, classes: int, images: int) -> int:
        s = config.attriclip
        return min(images, comb(s.bank, s.top)) * classes + s.bank

    @property
    def peak(self) -> float:
        return self.settings.lr * self.learner.config.training.batch_size / 20

    def made(self, generator: torch.Generator) -> Bank:
        s = self.settings
        return Bank(s.bank, self.learner.backbone.feature_dim, s.tokens, self.text.width, generator)

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        s = config.attriclip
        if s.top > s.bank:
            raise UserError(f"--attriclip.top {s.top}: the bank has {s.bank} attributes; expected at most as many")
        if (count := comb(s.bank, s.top)) > MOST_SETS:
            raise UserError(
                f"--attriclip.bank {s.bank} --attriclip.top {s.top}: {count} sets of attributes, each with a row for every "
                f"class; expected at most {MOST_SETS} sets"
            )

    @classmethod
    def length(cls, config: Config) -> int:
        return config.attriclip.tokens * config.attriclip.top

    def train(self, task: Task, images: TaskImages, during: dict[str, Tensor]) -> Phase:
        return TrainBank(self, task, images)

    def contexts(self, numbers: Tensor) -> Tensor:
        """The prompts of these sets, `[n, top * m, width]`. numbers: `[n]` int64."""
        return self.context.prompts[self.sets[numbers]].flatten(1, 2)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the keys to the head and encode its rows."""
        self.attributes.keys.copy_(self.context.keys)
        classes = torch.arange(len(self.attributes.weight), device=self.attributes.weight.device)
        for i, context in enumerate(self.context.prompts[self.sets].flatten(1, 2)):
            self.attributes.table[:, i] = self.text.rows(context, classes)


class TrainBank(TrainContext):
    method: AttriCLIP

    def optimiser_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0)

    def rate(self, peak: float, i: int) -> float:
        return learning_rate(peak, i, self.steps)

    def task_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        method, keys = self.method, self.method.context.keys
        which, k = method.attributes.which(features, keys.detach()), len(self.classes)
        used, place = distinct(which, len(method.sets))  # every set is encoded once
        of = torch.arange(len(used), device=used.device).repeat_interleave(k)
        rows = method.text.rows(method.contexts(used), self.classes.repeat(len(used)), of).unflatten(0, (-1, k))
        main = F.cross_entropy(method.attributes.logits(features, rows, place), positions(labels, self.classes))
        distance = 1 - F.cosine_similarity(features[:, None], keys[method.sets[which]], dim=2).mean()
        return main + method.settings.match * distance + method.settings.orthogonal * self.overlap()

    def overlap(self) -> Tensor:
        """Mean absolute cosine between the texts of different attributes; 0 for one attribute."""
        prompts = self.method.context.prompts
        n = len(prompts)
        texts = self.method.text.rows(prompts, torch.full((n,), NAMELESS, device=prompts.device))
        return (texts @ texts.T).abs().masked_fill(torch.eye(n, device=texts.device).bool(), 0).sum() / max(
            1, n * (n - 1)
        )


def distinct(numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The distinct values of `numbers` `[b]`, which are below `count`, in order, and the place of each number among them.

    Only the CPU knows how many there are without waiting: on another device other values follow, up to min(b, count).
    """
    there = F.one_hot(numbers, count).amax(0)
    first = there.argsort(descending=True, stable=True)[: len(numbers)]
    if numbers.device.type == "cpu":
        first = first[: int(there.sum())]
    return first, (there.cumsum(0) - 1)[numbers]
