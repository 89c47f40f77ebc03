"""P&M, "Train with Perturbation, Infer after Merging" (arXiv 2505.22389), in constant memory.

    python -m fastmerge --method pam --head linear
    python -m fastmerge --method pam pam:perturb=none pam:perturb=none,merge=false --head linear   # P&M, LoRA-M, LoRA

Training: LoRA on the key and value projections; per step c is drawn from {-epsilon, 0, +epsilon} and the loss is taken at
theta_{t-1} + (1 + c) B A (eq. 15, 16). `--pam.rank 0` trains all weights instead, theta_{t-1} + (1 + c)(theta - theta_{t-1}).
Merging (eq. 8): theta_t = theta_{t-1} + alpha D, D = theta_t* - theta_{t-1}, with the empirical Fishers F_i of eq. 9 and 10

    alpha = -sum_i <theta_{t-1} - theta_i*, F_i D> / sum_i <D, F_i D> = -<S (theta_{t-1} - theta_init) - M, D> / <S D, D>,
    S = sum_i F_i,  M = sum_i F_i (theta_i* - theta_init)

so two vectors stand in for every theta_i* and F_i, which the paper stores. All of it concerns the adapted weights only.

Where the paper is silent: alpha is clamped to [0, 1], as between the two models lies what its Figure 2 looks at; where
<S D, D> is 0 or not finite nothing is known of the loss, and alpha = 1 / t. Both alphas are logged. The Fisher sees images
without augmentation. Gaussian noise (`--pam.perturb gauss`, Table 4) has the norm of the shift it stands for.
"""

from __future__ import annotations

import math

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.fisher import FisherPass
from fastmerge.training import Learner, Phase, Train

VECTORS = ("initial", "total", "moment", "previous", "trained")


class PAM:
    """Between tasks it keeps the model and, of the adapted weights, theta_init, S and M."""

    def __init__(self, learner: Learner):
        self.learner, self.settings = learner, learner.config.pam
        self.initial = self.adapted()
        self.total, self.moment = torch.zeros_like(self.initial), torch.zeros_like(self.initial)
        self.previous: Tensor | None = None  # theta_{t-1}, during a task
        self.trained: Tensor | None = None  # theta_t*, from the end of training to the merge

    def adapted(self) -> Tensor:
        """The adapted weights as they are, `[m]`, new."""
        return self.learner.adapted(self.settings.rank).gather(self.learner.theta)

    def begin(self, task: Task) -> None:
        self.previous = self.adapted()

    def train(self, task: Task, images: TaskImages) -> Phase:
        return Perturbed(self, task, images)

    def merge(self, task: Task, images: TaskImages) -> Phase | None:
        if self.settings.merge:
            return Coefficient(self, task, images)
        self.previous = self.trained = None
        return None

    def state_dict(self) -> dict[str, Tensor]:
        kept = {name: getattr(self, name) for name in VECTORS}
        return {"theta": self.learner.theta} | {k: v for k, v in kept.items() if v is not None}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.learner.theta.copy_(tensors["theta"])
        for name in VECTORS:
            setattr(self, name, tensors[name].to(self.learner.device) if name in tensors else None)


class Perturbed(Train):
    """Eq. 15: one draw, one forward, one backward a step."""

    def __init__(self, method: PAM, task: Task, images: TaskImages):
        super().__init__(method.learner, task, images, rank=method.settings.rank, lr=method.settings.lr)
        self.method, self.factor = method, 1.0
        self.adapter.base = method.previous

    def step(self, i: int) -> dict[str, Tensor]:
        settings, generator = self.method.settings, self.learner.generator("perturb", self.task.index, i)
        self.draw, chance = i, torch.rand((), generator=generator).item()
        sign = 0 if chance < settings.p0 else 1 if chance < (1 + settings.p0) / 2 else -1
        self.scale = 0.0 if settings.perturb == "none" else sign * settings.epsilon
        return super().step(i) | {"perturbation": torch.full((), self.scale, device=self.learner.device)}

    def weights(self) -> Tensor:
        shift = self.adapter.shift()
        if self.method.settings.perturb == "gauss" and self.scale:
            generator = self.learner.generator("gauss", self.task.index, self.draw)
            noise = torch.randn(shift.numel(), generator=generator).to(shift)
            return self.adapter.base + shift + self.scale * shift.detach().norm() / noise.norm() * noise
        return self.adapter.base + (1 + self.scale) * shift

    def finish(self) -> None:
        super().finish()
        self.method.trained = self.method.adapted()


class Coefficient(FisherPass):
    """The Fisher at theta_t*, then alpha in one more step, so that it is in the log."""

    name = "merge"

    def __init__(self, method: PAM, task: Task, images: TaskImages):
        adapted = method.learner.adapted(method.settings.rank)
        super().__init__(method.learner, task, images, labels=method.settings.labels, adapted=adapted)
        self.method = method
        self.steps += 1

    def step(self, i: int) -> dict[str, Tensor]:
        if i < self.steps - 1:
            return super().step(i)
        method = self.method
        fk.pam_accumulate_(method.total, method.moment, super().finish(), method.trained, method.initial)
        first, second = fk.pam_coefficient(
            method.total, method.moment, method.previous, method.trained, method.initial
        ).tolist()
        known = math.isfinite(first) and math.isfinite(second) and second > 0
        alpha = -first / second if known else 1 / (self.task.index + 1)
        clamped = min(1.0, max(0.0, alpha))
        merged = fk.lerp(method.previous, method.trained, clamped)
        self.adapted.scatter(merged, self.learner.theta)
        return {"alpha": torch.tensor(clamped), "alpha_formula": torch.tensor(alpha)}

    def finish(self) -> None:
        self.method.previous = self.method.trained = None
