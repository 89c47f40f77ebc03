"""P&M, "Train with Perturbation, Infer after Merging" (arXiv 2505.22389), in constant memory.

    python -m fastmerge --method pam --head linear
    python -m fastmerge --method pam pam:perturb=none pam:perturb=none,merge=false --head linear   # P&M, LoRA-M, LoRA

Training: LoRA on the key and value projections. Each step draws c from {-epsilon, 0, +epsilon} and takes the loss at
theta_{t-1} + (1 + c) B A (eq. 15, 16). `--pam.rank 0` trains all weights instead, with the loss at
theta_{t-1} + (1 + c)(theta - theta_{t-1}).
Merging (eq. 8): theta_t = theta_{t-1} + alpha D, D = theta_t* - theta_{t-1}, with the empirical Fishers F_i of eq. 9 and 10

    alpha = -sum_i <theta_{t-1} - theta_i*, F_i D> / sum_i <D, F_i D> = -<S (theta_{t-1} - theta_init) - M, D> / <S D, D>,
    S = sum_i F_i,  M = sum_i F_i (theta_i* - theta_init)

so two vectors replace every theta_i* and F_i, which the paper stores. This applies to the adapted weights only.

Our choices where the paper is silent: alpha is clamped to [0, 1], the range between the two models, as in its Figure 2;
alpha = 1 / t if <S D, D> is 0 or a product is not finite. The raw and the clamped alpha are logged. The Fisher sees
images without augmentation. Gaussian noise (`--pam.perturb gauss`, Table 4) has the norm of the perturbation that it
replaces.
"""

from __future__ import annotations

import math

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.backbone import Backbone
from fastmerge.models.lora import LowRank, check_rank
from fastmerge.models.trainable import AllWeights
from fastmerge.training import ADAPTED, Learner, Phase, Train

KEPT = ("initial", "total", "moment")


class PAM(Method):
    """It keeps theta_init, S and M of the adapted weights.

    During a task: `previous`, the adapted weights of theta_{t-1}, and between the two phases `trained`, those of theta_t*.
    """

    groups = ("pam", "fisher")
    ignores = ("fisher.accumulate", "fisher.labels", "fisher.lam", "training.lr")

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.pam
        self.initial = self.adapted()
        self.total, self.moment = torch.zeros_like(self.initial), torch.zeros_like(self.initial)

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return int(config.pam.merge)  # the Fisher pass

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        if config.training.lora_rank:
            raise UserError("--lora-rank: pam does not read it; give --pam.rank, or remove pam from --method")
        if config.pam.rank and config.training.prompt_length:
            raise UserError(
                f"--pam.rank {config.pam.rank}: with --prompt-length prefixes are trained; give --pam.rank 0"
            )
        if config.pam.rank:
            check_rank("--pam.rank", config.pam.rank, backbone, ADAPTED)

    def adapted(self) -> Tensor:
        """A copy of the present adapted weights, `[m]`."""
        return self.learner.adapted(self.settings.rank).gather(self.learner.theta)

    def begin(self, task: Task) -> Tensors:
        return {"previous": self.adapted()}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Perturbed(self, task, images, during)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase | None:
        return Coefficient(self, task, images, during) if self.settings.merge else None

    def state_dict(self) -> Tensors:
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, tensors: Tensors) -> None:
        for name in KEPT:
            getattr(self, name).copy_(tensors[name])


class Perturbed(Train):
    """Eq. 15: one draw, one forward and one backward per step."""

    trainable: LowRank | AllWeights

    def __init__(self, method: PAM, task: Task, images: TaskImages, during: Tensors):
        trainable = method.learner.trainable(method.settings.rank, "lora", task.index)
        super().__init__(method.learner, task, images, trainable=trainable, lr=method.settings.lr)
        self.method, self.during = method, during
        self.trainable.base = during["previous"]

    def step(self, i: int) -> dict[str, Tensor]:
        settings, generator = self.method.settings, self.learner.generator("perturb", self.task.index, i)
        self.draw, chance = i, torch.rand((), generator=generator).item()
        sign = 0 if chance < settings.p0 else 1 if chance < (1 + settings.p0) / 2 else -1
        self.scale = 0.0 if settings.perturb == "none" else sign * settings.epsilon
        return super().step(i) | {"perturbation": torch.full((), self.scale, device=self.learner.device)}

    def weights(self) -> Tensor:
        """The adapted weights `[m]` that this step's forward sees."""
        shift = self.trainable.shift()
        if self.method.settings.perturb == "gauss" and self.scale:
            generator = self.learner.generator("gauss", self.task.index, self.draw)
            noise = torch.randn(shift.numel(), generator=generator).to(shift, non_blocking=True)
            return self.trainable.base + shift + self.scale * shift.detach().norm() / noise.norm() * noise
        return self.trainable.base + (1 + self.scale) * shift

    def features(self, images: Tensor) -> Tensor:
        return self.trainable.at(self.weights(), images)

    def finish(self) -> None:
        super().finish()
        self.during["trained"] = self.method.adapted()


class Coefficient(FisherPass):
    """The Fisher at theta_t*, then the merge in one more step, so that alpha is logged."""

    name = "merge"

    def __init__(self, method: PAM, task: Task, images: TaskImages, during: Tensors):
        adapted = method.learner.adapted(method.settings.rank)
        super().__init__(method.learner, task, images, labels=method.settings.labels, adapted=adapted)
        self.method, self.during = method, during
        self.steps += 1

    def step(self, i: int) -> dict[str, Tensor]:
        if i < self.steps - 1:
            return super().step(i)
        method, previous, trained = self.method, self.during["previous"], self.during["trained"]
        method.learner.parts.changes()
        merged, clamped, alpha = merged_by_fisher(
            method.total, method.moment, self.result(), previous, trained, method.initial, self.task
        )
        self.adapted.scatter(merged, self.learner.theta)
        return {"alpha": torch.tensor(clamped), "alpha_formula": torch.tensor(alpha)}


def merged_by_fisher(
    total: Tensor, moment: Tensor, fisher: Tensor, previous: Tensor, trained: Tensor, initial: Tensor, task: Task
) -> tuple[Tensor, float, float]:
    """Take a Fisher at `trained` into S (`total`) and M (`moment`), in place; return the merge (eq. 8) as a new tensor, its
    alpha, and what the formula gives. All `[m]` fp32; initial: the weights that M is relative to."""
    fk.pam_accumulate_(total, moment, fisher, trained, initial)
    first, second = fk.pam_coefficient(total, moment, previous, trained, initial).tolist()
    known = math.isfinite(first) and math.isfinite(second) and second > 0
    alpha = -first / second if known else 1 / (task.index + 1)
    clamped = min(1.0, max(0.0, alpha))
    return fk.lerp(previous, trained, clamped), clamped, alpha
