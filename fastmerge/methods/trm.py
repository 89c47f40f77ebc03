"""TRM, Trajectory Regularized Merging (arXiv 2605.08311; equation numbers of its first version).

    python -m fastmerge --method trm --trm.replace anchored --trm.lambda1 0.1 --trm.lambda2 0.01

Training phase: fine-tune the merged model theta_{t-1} to theta_t. Merging phase: search alpha and beta of

    theta(alpha, beta) = theta_{t-1} + alpha d + beta P,  d = theta_t - theta_{t-1},  P a random unit vector _|_ d  (eq. 3-5)
    L_tra = L_task + lambda1 L_pre + lambda2 L_curv,       L_curv = -||grad L_task||^2                            (eq. 6-14)

on task t's images. No autograd graph runs through the merge: with g' = grad(L_task + lambda1 L_pre), g = grad L_task and
h = Hessian(L_task) g, all with respect to theta,

    dL_tra/dalpha = <g' - 2 lambda2 h, d>,   dL_tra/dbeta = <g' - 2 lambda2 h, P>

Both are exact. One fused pass computes them; it makes d, P and the mask in registers from theta_{t-1}, theta_t and a
seed.

Random replacement (end of the method section). Read literally, a fraction replace_ratio of theta_init's entries comes
from theta_{t-1} or theta_t, and the task vectors are added to the result. A replaced entry then gets its task vector
twice, and the mean distance from theta_init grows 1.6-fold per task (`--trm.replace literal`; see
tests/test_method_trm.py). So the default is `anchored`: a replaced entry keeps its value from theta_{t-1} or theta_t,
and the search moves the others. `none` only searches the plane. theta_init cancels in both, so only `literal` keeps it.

Our choices where the paper is silent: the search sees images without augmentation, so the teacher's class tokens are
computed once per task; the squared norm of eq. 7 is averaged over the batch; Adam updates alpha, beta with a fixed lr.
"""

from __future__ import annotations

import math
from typing import Any

import fastmerge_kernels as fk
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jvp

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.attention import differentiable_attention
from fastmerge.models.backbone import Backbone
from fastmerge.training import Batches, Learner, Phase, Train, load_optimiser, optimiser_tensors, positions


class TRM(Method):
    """It keeps only the model, and theta_init under `--trm.replace literal`.

    During a task: `previous`, theta_{t-1}.
    """

    groups = ("trm",)

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.trm
        self.initial = learner.theta.clone() if self.settings.replace == "literal" else None

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return config.training.merge_epochs

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        if config.trm.lambda1 and config.training.merge_epochs:
            backbone.check_class_tokens()
            if config.trm.layer_b is not None and config.trm.layer_b > backbone.layers:
                raise UserError(
                    f"--trm.layer-b {config.trm.layer_b}: {backbone.name} has {backbone.layers} layers; "
                    f"expected 1 to {backbone.layers}"
                )

    def begin(self, task: Task) -> Tensors:
        return {"previous": self.learner.theta.clone()}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Train(self.learner, task, images)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase | None:
        if task.index == 0 and not self.settings.merge_first:
            return None
        return Search(self, task, images, during["previous"])

    def state_dict(self) -> Tensors:
        return {} if self.initial is None else {"initial": self.initial}

    def load_state_dict(self, tensors: Tensors) -> None:
        if self.initial is not None:
            self.initial.copy_(tensors["initial"])


def layer_weights(layers: int, b: int) -> Tensor:
    """omega_l of eq. 7, `[layers]` fp32: q(l) = e before layer b and e^(l-b) from b on (l = 1..L), divided by its sum."""
    q = torch.tensor([math.e if layer < b else math.exp(layer - b) for layer in range(1, layers + 1)])
    return q / q.sum()


def consistency(tokens: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """L_pre of eq. 7, mean over the batch. tokens, teacher: `[L, b, width]`; weights: `[L]`."""
    return ((tokens - teacher).square().sum(2) * weights[:, None]).sum(0).mean()


class Search(Phase):
    """The merging phase: alpha and beta by gradient descent on eq. 14 (eq. 15). previous: theta_{t-1}, `[n]`."""

    name = "merge"
    batches: Batches

    def __init__(self, method: TRM, task: Task, images: TaskImages, previous: Tensor):
        self.method, self.task, self.images = method, task, images
        self.learner, self.settings = method.learner, method.settings
        self.batches = Batches(self.learner, task, images, self.name, self.learner.config.training.merge_epochs)
        self.steps = self.batches.steps
        self.classes = torch.tensor(task.classes, device=self.learner.device)
        self.previous, self.current = previous, self.learner.theta.clone()  # theta_{t-1}, theta_t
        start = torch.tensor([self.settings.alpha, self.settings.beta], dtype=torch.float64, device=self.learner.device)
        self.coefficients = torch.nn.Parameter(start)  # alpha, beta
        self.optimiser = torch.optim.Adam([self.coefficients], lr=self.settings.lr)
        self.teacher: Tensor | None = None
        self._epoch = -1

    # -- the merge -------------------------------------------------------------------------------------------------

    def aim(self, i: int) -> None:
        """Choose the random numbers of step i's epoch and compute the products of r and d that define P (one pass)."""
        epoch = i // self.batches.per_epoch if self.settings.direction == "epoch" else 0
        if epoch != self._epoch:
            self._epoch = epoch
            self.random: dict[str, Any] = {
                "seed": self.learner.seed_for("trm", self.task.index),
                "subsequence": epoch,
                "replace": self.settings.replace,
                "ratio": self.settings.replace_ratio,
            }
            self.direction = fk.trm_direction(self.previous, self.current, **self.random)

    def place(self) -> None:
        """theta <- theta(alpha, beta), one pass."""
        alpha, beta = self.coefficients.detach()
        fk.trm_merge(
            self.previous, self.current, alpha, beta, self.direction,
            **self.random, initial=self.method.initial, out=self.learner.theta,
        )  # fmt: skip

    # -- the objective ---------------------------------------------------------------------------------------------

    def teach(self) -> Tensor:
        """Class tokens (cls(theta_t) + cls(theta_{t-1})) / 2 of every image: `[L, n, width]` fp32, kept for the search."""
        backbone, theta = self.learner.backbone, self.learner.theta
        tokens = torch.zeros(backbone.layers, len(self.images), backbone.width, device=theta.device, dtype=theta.dtype)
        with torch.no_grad():
            for weights in (self.current, self.previous):
                theta.copy_(weights)
                settings = self.learner.config.training
                for rows in torch.arange(len(self.images)).split(settings.micro_batch or settings.batch_size):
                    pixels, _ = self.images.batch(rows)
                    tokens[:, rows] += 0.5 * backbone.class_tokens(self.learner.plain(pixels))[1]
        return tokens

    def task_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.learner.head(features, self.classes), positions(labels, self.classes))

    def curvature_gradient(self, images: Tensor, labels: Tensor, g: Tensor) -> Tensor:
        """h = Hessian(L_task) g at the present theta; the gradient of ||g||^2 is 2h. `g`, result: `[n]`."""
        flat, theta = self.learner.flat, self.learner.theta

        def loss(theta: Tensor) -> Tensor:
            return self.task_loss(functional_call(flat.module, flat.as_dict(theta), (images,)), labels)

        if self.settings.curvature == "exact":
            with differentiable_attention():
                return jvp(grad(loss), (theta,), (g,))[1]
        # s g has 1e-3 of theta's norm, where fp32 rounding and the cubic term are both small (tests bound the error)
        s = 1e-3 * theta.norm() / g.norm().clamp_min(torch.finfo(g.dtype).tiny)
        return (grad(loss)(theta + s * g) - grad(loss)(theta - s * g)) / (2 * s)

    def step(self, i: int) -> dict[str, Tensor]:
        settings = self.settings
        if settings.direction == "epoch" and i and i % self.batches.per_epoch == 0:
            self.coefficients.data[1] = settings.beta  # beta belonged to the old P
        self.aim(i)
        if self.teacher is None and settings.lambda1:
            self.teacher = self.teach()
            self.weights = layer_weights(len(self.teacher), settings.layer_b or len(self.teacher) // 2).to(self.teacher)
        rows = self.batches.rows(i)
        pixels, labels = self.images.batch(rows)
        images = self.learner.plain(pixels)
        self.place()

        g, total, l_task, l_pre = self.gradients(images, labels, rows)
        energy = g.square().sum()
        loss = l_task - settings.lambda2 * energy
        if l_pre is not None:
            loss += settings.lambda1 * l_pre
        h = None
        if settings.lambda2:
            for part, share in self.learner.parts(len(images)):
                value = self.curvature_gradient(images[part], labels[part], g)
                h = (value if share == 1 else value.mul_(share)) if h is None else h.add_(value, alpha=share)
        slopes = fk.subspace_gradient(
            total, self.previous, self.current, self.direction,
            **self.random, gradient2=h, scale2=-2 * settings.lambda2,
        )  # fmt: skip
        alpha, beta = self.coefficients.detach().clone()
        self.coefficients.grad = slopes[:2].to(self.coefficients.dtype)
        self.optimiser.step()
        terms = {"loss": loss, "L_task": l_task, "gradient_energy": energy, "alpha": alpha, "beta": beta}
        return terms | ({} if l_pre is None else {"L_pre": l_pre})

    def gradients(self, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of L_task and of L_task + lambda1 L_pre at the present theta, both `[n]`, and the two losses (no L_pre
        without a teacher)."""
        flat, backbone, lambda1 = self.learner.flat, self.learner.backbone, self.settings.lambda1
        parts = self.learner.parts(len(images))
        g = total = torch.zeros(0)
        l_task, l_pre = flat.gradient.new_zeros(()), flat.gradient.new_zeros(())
        for number, (part, share) in enumerate(parts):
            flat.zero_grad()
            if self.teacher is None:
                task = self.task_loss(backbone(images[part]), labels[part]) * share
                task.backward()
            else:
                features, tokens = backbone.class_tokens(images[part])
                pre = consistency(tokens, self.teacher[:, rows[part].to(tokens.device)], self.weights) * share
                task = self.task_loss(features, labels[part]) * share
                task.backward(retain_graph=True)
                l_pre += pre.detach()
            l_task += task.detach()
            g = flat.gradient.clone() if number == 0 else g.add_(flat.gradient)
            if self.teacher is not None:
                (lambda1 * pre).backward()  # accumulates: flat.gradient is that of both
            if len(parts) == 1:
                return g, flat.gradient, l_task, None if self.teacher is None else l_pre
            total = flat.gradient.clone() if number == 0 else total.add_(flat.gradient)
        return g, total, l_task, None if self.teacher is None else l_pre

    def finish(self) -> None:
        """theta_t <- theta(alpha, beta)."""
        self.aim(max(self.steps - 1, 0))
        self.place()
        self.learner.flat.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        own = {"current": self.current, "coefficients": self.coefficients.detach()}
        return own | optimiser_tensors(self.optimiser)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.current.copy_(tensors["current"])
        self.coefficients.data.copy_(tensors["coefficients"])
        load_optimiser(self.optimiser, tensors)
