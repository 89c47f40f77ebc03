"""Variational prompt tuning (Derakhshani et al., ICCV 2023, "Bayesian prompt learning", arXiv 2210.02390), on the tasks in
sequence. It is the VPT of CMM's tables (reference 81), not the visual prompt tuning of Jia et al. 2022.

    python -m fastmerge --method vpt --vpt.samples 10

As CoOp (coop.py), and one residual r, the same for all context vectors, is added to them: p_l + r, r ~ N(mu, sigma) with
learned mu and sigma (the unconditional form). Loss: -log of the mean over the samples of p(y | x, r), plus `--vpt.kl` times
KL(N(mu, sigma) || N(0, 1)) (eq. 8). As in the released code, whose weight is the default, the KL is the mean over the
dimensions of r; the equation has their sum.

As in the released code: 4 vectors, 10 samples, mu starts at 0, `std_posterior` drawn from U(0, 1) and used as the logarithm
of the variance, SGD as CoOp. Different: it averages the predictions of new samples at test time; here the classes are encoded
once at r = mu, so the saved model is a text head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.coop import Context, CoOp, TrainContext
from fastmerge.methods.method import Tensors
from fastmerge.training import Phase, positions


class Residual(Context):
    """mean, log_variance: of the residual, `[width]`."""

    def __init__(self, generator: torch.Generator, count: int, width: int):
        super().__init__(generator, count, width)
        self.mean = nn.Parameter(torch.zeros(width))
        self.log_variance = nn.Parameter(torch.rand(width, generator=generator))

    def drawn(self, noise: Tensor) -> Tensor:
        """Contexts `[s, m, width]` for standard normal noise `[s, width]`."""
        residual = self.mean + noise * (0.5 * self.log_variance).exp()
        return self.vectors + residual[:, None]

    def divergence(self) -> Tensor:
        """KL(N(mean, variance) || N(0, 1)), the mean over the dimensions: 0-d."""
        return 0.5 * (self.log_variance.exp() + self.mean.square() - 1 - self.log_variance).mean()


class VPT(CoOp):
    """It keeps the learned vectors, and mean and logarithm of the variance of the residual."""

    groups = ("vpt",)
    context: Residual

    @classmethod
    def prompts(cls, config: Config, classes: int, images: int) -> int:
        return config.vpt.samples * classes

    def made(self, generator: torch.Generator) -> Residual:
        return Residual(generator, self.settings.tokens, self.text.width)

    def deployed(self) -> Tensor:
        return self.context.vectors + self.context.mean

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainResidual(self, task, images)


class TrainResidual(TrainContext):
    method: VPT

    def step(self, i: int) -> dict[str, Tensor]:
        generator = self.learner.generator("residual", self.task.index, i)
        noise = torch.randn(self.method.settings.samples, self.method.text.width, generator=generator)
        self.noise = noise.to(self.learner.device, non_blocking=True)  # the same for all parts of a batch
        return super().step(i)

    def task_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        context, k = self.method.context, len(self.classes)
        samples = context.drawn(self.noise)  # [s, m, width]
        count = len(samples)
        rows = self.method.text.rows(samples.repeat_interleave(k, 0), self.classes.repeat(count))
        logs = self.logits(features, rows).unflatten(1, (count, k)).log_softmax(2)
        its = positions(labels, self.classes)[:, None, None].expand(-1, count, 1)
        likelihood = logs.gather(2, its).squeeze(2).logsumexp(1) - math.log(count)
        return self.method.settings.kl * context.divergence() - likelihood.mean()
