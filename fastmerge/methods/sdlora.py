"""SD-LoRA, scalable decoupled low-rank adaptation (Wu et al., ICLR 2025, arXiv 2501.13198).

    python -m fastmerge --method sdlora --head linear
    python -m fastmerge --method sdlora sdlora:variant=rr sdlora:variant=kd --head linear

LoRA on query and value. The update of a task is a direction and a magnitude: in task t the weights are
W0 + sum_{k<t} alpha_k D_k + alpha_t B A, with the old directions D_k = B_k A_k / ||B_k A_k|| fixed and all magnitudes
trained (models/directions.py). The sum becomes W for evaluation, so the saved model is a plain one.

variant  rr: later adapters have a smaller rank, 0.8 of it from the fifth task on and 0.6 from the ninth (10, 8, 6 in the
         paper and in a comment of the released code). kd: after a task its direction is fitted to the old ones by least
         squares; if the squared residual is at most `residual`, the fit goes into their magnitudes and the direction is
         not kept. Each weight decides for itself.

As in the released code: query and value, SGD with momentum 0.9 at a constant 8e-3 (its JSON names Adam and a cosine that the
code does not use; its milestones lie behind the last epoch), a new magnitude starts at 0.8. Different: the released code
divides by ||B|| ||A|| where the paper has ||B A||, which we follow; it starts all magnitudes anew at 0.8 in every task, which
changes the function before any training, while ours go on; it has one magnitude per task for all layers, ours belong to a
weight as in the paper's equation; its first task sees the logits of all classes; it computes an orthogonality loss in every
step and drops it.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `sdlora:clip=0` switches it off. Where the
norm is above 1 a step of SGD is divided by it. The classifier learns at `--head-lr`; there at the rate of LoRA.
"""

from __future__ import annotations

from typing import Any

import torch

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.backbone import Backbone
from fastmerge.models.directions import Directions, OnDirections
from fastmerge.models.lora import Projections, check_rank
from fastmerge.training import Learner, Phase, Train

TARGETS = ("query", "value")
SMALLER = ((8, 0.6), (4, 0.8))  # variant rr: from this task on (counted from 0), this part of the rank


class SDLoRA(Method):
    """It keeps W0 of the adapted weights and all directions: Theta(T r d)."""

    groups = ("sdlora",)
    ignores = ("training.lr", "training.warmup_steps", "training.weight_decay")
    lora = False

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.sdlora
        projections, theta = Projections(learner.flat, TARGETS), learner.theta
        self.initial = projections.gather(theta)
        self.kept = [
            Directions(theta.new_zeros(0, b.columns), theta.new_zeros(b.rows, 0), theta.new_zeros(0))
            for b in projections.blocks
        ]

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        check_rank("--sdlora.rank", config.sdlora.rank, backbone, TARGETS)

    def rank(self, task: Task) -> int:
        rank = self.settings.rank
        if self.settings.variant == "rr":
            share = next((share for first, share in SMALLER if task.index >= first), 1.0)
            return max(1, round(share * rank))
        return rank

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainDirections(self, task, images)

    def state_dict(self) -> Tensors:
        kept = {"initial": self.initial}
        for k, own in enumerate(self.kept):
            kept |= {f"down.{k}": own.down, f"up.{k}": own.up, f"magnitudes.{k}": own.magnitudes}
            kept[f"ranks.{k}"] = torch.tensor(own.ranks, dtype=torch.int64)
        return kept

    def load_state_dict(self, tensors: Tensors) -> None:
        self.initial.copy_(tensors["initial"])
        for k, own in enumerate(self.kept):
            own.down, own.up, own.magnitudes = (
                tensors[f"{name}.{k}"].to(self.initial, copy=True) for name in ("down", "up", "magnitudes")
            )
            own.ranks = tensors[f"ranks.{k}"].tolist()


class TrainDirections(Train):
    trainable: OnDirections

    def __init__(self, method: SDLoRA, task: Task, images: TaskImages):
        learner, settings = method.learner, method.settings
        generator = learner.generator("lora", task.index)
        trainable = OnDirections(
            learner.flat, method.rank(task), TARGETS, generator, method.initial, method.kept, settings.magnitude
        )
        super().__init__(learner, task, images, trainable=trainable, lr=settings.lr)
        self.method = method

    def optimiser_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            group.pop("weight_decay", None)
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)  # `step` sets the rate

    def rate(self, peak: float, i: int) -> float:
        return peak

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        settings = self.method.settings
        residual = settings.residual if settings.variant == "kd" else None
        for (down, up, old, new), own in zip(self.trainable.pieces(), self.method.kept, strict=True):
            own.magnitudes = old.detach().clone()
            own.add(up.detach(), down.detach(), float(new), residual)
