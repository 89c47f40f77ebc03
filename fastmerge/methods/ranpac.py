"""RanPAC (McDonnell et al., NeurIPS 2023, arXiv 2307.02251): ridge regression on random features of the frozen model.

    python -m fastmerge --method ranpac
    python -m fastmerge --method ranpac ranpac:projection=5000

h = relu(f P), P `[d, M]` standard normal (eq. 6). After every task, over all images of all tasks so far,

    G = sum h h^T,   Q = sum h y^T (y one-hot),   W = (G + lambda I)^-1 Q                      (eq. 7, 8; Algorithm 1)

and the logits are W^T h. lambda is one of 10^-8, ..., 10^8: as in the released code, 80 % of the task's images fit W, and the
lambda with the smallest squared error on the others is taken; then all images are used. Images are not augmented.

Phase 1 of Algorithm 1, which the paper calls optional, trains an adapter in the first task. We leave it out, so this is the
paper's "no Phase 1": the backbone never changes, and the order of the tasks changes nothing but lambda.

Differences from the released code: it keeps all features of a task to try lambda; we keep the Gram matrix of the 20 % too,
from which the same error follows. It solves in fp32 by LU, where small lambdas give noise if a task has fewer than M images;
we solve in fp64 by Cholesky and pass over a lambda for which the matrix is not positive definite in the precision of its
sums, which are fp32. One-hot targets of classes that are not known yet do not enter the error, since they are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.features import Features, projected
from fastmerge.models.heads import LinearHead
from fastmerge.statistics_pass import StatisticsPass, Sums
from fastmerge.training import Batches, Learner, Phase

RIDGES = [10.0**p for p in range(-8, 9)]
FIT = 0.8  # of a task's images, to choose lambda


class RanPAC(Method):
    """It keeps P `[d, M]`, G `[M, M]` and Q^T `[rows of the head, M]`, all fp32."""

    groups = ("ranpac",)
    head = "linear"
    lora = False
    frozen = True
    trains = False

    def __init__(self, learner: Learner):
        super().__init__(learner)
        m, d = learner.config.ranpac.projection, learner.backbone.feature_dim
        learner.head = LinearHead(m, len(learner.head.get_buffer("row"))).to(learner.device)
        self.projection = torch.randn(d, m, generator=learner.generator("projection")).to(learner.device)
        self.gram = torch.zeros(m, m, device=learner.device)
        self.targets = torch.zeros(0, m, device=learner.device)

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass

    def train(self, task: Task, images: TaskImages, during: Tensors) -> None:
        return None

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Regress(self, task, images)

    def features(self) -> Features:
        return projected(self.learner.backbone, self.projection)

    def state_dict(self) -> Tensors:
        return {"projection": self.projection, "gram": self.gram, "targets": self.targets}

    def load_state_dict(self, tensors: Tensors) -> None:
        self.projection, self.gram = tensors["projection"].clone(), tensors["gram"].clone()
        self.targets = tensors["targets"].clone()


class GramSums(Sums):
    """G and Q^T of the part that fits W (index 0) and of the held-out part (1).

    gram: `[2, M, M]`, targets: `[2, r, M]`, r rows of the head. n: images of the task.
    """

    def __init__(self, method: RanPAC, n: int):
        head, m = method.learner.head, method.projection.shape[1]
        self.method, self.fit, self.batch = method, int(FIT * n), method.learner.config.training.batch_size
        self.row, rows = head.get_buffer("row"), len(head.get_parameter("bias"))
        self.gram = torch.zeros(2, m, m, device=method.learner.device)
        self.targets = torch.zeros(2, rows, m, device=method.learner.device)

    def add(self, features: Tensor, labels: Tensor, i: int) -> None:
        h = torch.relu(features @ self.method.projection)
        y = F.one_hot(self.row[labels], self.targets.shape[1]).to(h.dtype)
        border = min(max(self.fit - i * self.batch, 0), len(h))
        for part, rows in enumerate((slice(0, border), slice(border, len(h)))):
            self.gram[part].addmm_(h[rows].T, h[rows])
            self.targets[part].addmm_(y[rows].T, h[rows])

    def tensors(self) -> Tensors:
        return {"gram": self.gram, "targets": self.targets}


class Regress(StatisticsPass):
    """The pass, and one more step that chooses lambda and solves for W."""

    sums: GramSums

    def __init__(self, method: RanPAC, task: Task, images: TaskImages):
        batches = Batches(method.learner, task, images, "statistics", epochs=1)
        super().__init__(method.learner, task, images, batches, GramSums(method, len(images)))
        self.method = method
        self.steps += 1

    @torch.no_grad()
    def step(self, i: int) -> dict[str, Tensor]:
        if i < self.steps - 1:
            return super().step(i)
        method, sums = self.method, self.sums
        gram, targets = method.gram + sums.gram.sum(0), sums.targets.sum(0)
        targets[: len(method.targets)] += method.targets
        ridge = chosen(sums.gram, sums.targets)
        for tried in RIDGES[RIDGES.index(ridge) :]:
            weight = solved(gram, targets, tried)
            if weight is not None:
                self.learner.head.get_parameter("weight").data.copy_(weight)
                method.gram, method.targets = gram, targets
                return {"ridge": torch.tensor(tried)}
        raise UserError(
            f"{self.task.name}: the Gram matrix of the random features is not finite: the features of the model overflow. "
            "Try --precision fp32, or other weights"
        )


def chosen(gram: Tensor, targets: Tensor) -> float:
    """The lambda with the smallest squared error on the held-out part; see `GramSums` for the arguments.

    With W from the first part and S = sum y y^T of the second, the error is tr(W^T G W) - 2 tr(W^T Q) + tr(S); the last term
    does not depend on lambda.
    """
    errors: dict[float, Tensor] = {}
    for ridge in RIDGES:
        weight = solved(gram[0], targets[0], ridge)
        if weight is not None:
            errors[ridge] = ((weight @ gram[1].double() - 2 * targets[1].double()) * weight).sum()
    return RIDGES[0] if not errors else list(errors)[int(torch.stack(list(errors.values())).argmin())]


def solved(gram: Tensor, targets: Tensor, ridge: float) -> Tensor | None:
    """W^T = Q^T (G + lambda I)^-1, `[r, M]` fp64; None if G + lambda I is not positive definite.

    gram: G `[M, M]`; targets: Q^T `[r, M]`.
    """
    matrix = gram.to(torch.float64, copy=True)
    matrix.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(targets.double().T, factor).T if bool(failed == 0) else None
