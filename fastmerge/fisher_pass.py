"""The diagonal Fisher of the model on a task: the mean over its images of the squared gradient of -log p(label | image).

By default the labels are drawn from the model's own prediction, which gives the Fisher information (Martens 2020), and
gradients are per image: one forward and one backward pass of a batch give their squares (`models/per_image.py`), for
weights that it does not serve `torch.func.vmap` of `grad`.
`--fisher.labels data` takes the true labels: the "empirical Fisher" of CoFiMA and P&M. `--fisher.per batch` squares the
mean gradient of a batch, as released code often does; the result is smaller by up to the batch size (van de Ven 2025).
Images are not augmented. As in training, the candidates are the task's own classes.
"""

from __future__ import annotations

import math

import fastmerge_kernels as fk
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.models.attention import differentiable_attention
from fastmerge.models.lora import Projections
from fastmerge.models.per_image import Part, SquaredGradients, add_squares, served
from fastmerge.models.recompute import kept_activations
from fastmerge.models.trainable import AllWeights
from fastmerge.training import Batches, Learner, Phase, positions

ROOM = 1 << 26  # bytes of per-image gradients that vmap makes at once


class FisherPass(Phase):
    """One pass over a task's images in steps; theta does not change. Afterwards `result()` returns the Fisher.

    labels: overrides `--fisher.labels`. adapted: compute the Fisher of these weights only, `[m]`.
    """

    name = "fisher"
    batches: Batches

    def __init__(
        self,
        learner: Learner,
        task: Task,
        images: TaskImages,
        *,
        labels: str | None = None,
        adapted: Projections | AllWeights | None = None,
    ):
        self.learner, self.task, self.images = learner, task, images
        self.settings = learner.config.fisher
        self.labels = labels or self.settings.labels
        self.adapted = adapted or AllWeights(learner.flat)
        self.weights = self.adapted.gather(learner.theta) if isinstance(adapted, Projections) else learner.theta
        self.batches = Batches(learner, task, images, "fisher", epochs=1)
        self.total = min(len(images), self.settings.images or len(images))
        self.steps = math.ceil(self.total / learner.config.training.batch_size)
        self.classes = torch.tensor(task.classes, device=learner.device)
        self.fisher = torch.zeros_like(self.weights)
        self._served: list[str] | None = None

    @torch.no_grad()  # torch.func.grad enables gradients for its own inputs; head rows need none
    def step(self, i: int) -> dict[str, Tensor]:
        with kept_activations(self.learner.backbone):
            return self._step(i)

    def _step(self, i: int) -> dict[str, Tensor]:
        learner, size = self.learner, self.learner.config.training.batch_size
        rows = self.batches.rows(i)[: self.total - i * size]
        pixels, labels = self.images.batch(rows)
        images = learner.plain(pixels)
        targets = positions(labels, self.classes) if self.labels == "data" else self.drawn(pixels, i)
        loss, gradient = self.fisher.new_zeros(()), torch.zeros_like(self.fisher)
        if self.settings.per == "batch":
            for part, share in learner.parts.of(len(images), "fisher"):
                found, value = grad_and_value(self.loss)(self.weights, images[part], targets[part])
                gradient.add_(found, alpha=share)
                loss += share * value
            learner.ranks.add_(gradient, loss)
            learner.parts.changes()
            fk.fisher_accumulate_(self.fisher, gradient, len(rows) / self.total)
        else:
            for part, share in learner.parts.of(len(images), "fisher"):
                loss += share * self.per_image(images[part], targets[part], gradient)
            learner.ranks.add_(gradient, loss)
            learner.parts.changes()
            self.fisher.add_(gradient, alpha=1 / self.total)
        return {"loss": loss}

    def per_image(self, images: Tensor, targets: Tensor, squares: Tensor) -> Tensor:
        """Add the squared gradients of every image to `squares` `[m]`; return the mean loss."""
        flat = self.learner.flat
        named, parts = flat.as_dict(self.learner.theta), self.adapted.parts(squares)
        if self._served is None:
            self._served = served(flat.module, named, parts, images[:1])
        by_factors = {name: parts[name] for name in parts if name in self._served}
        rest = {name: parts[name] for name in parts if name not in by_factors}
        losses = self.by_vmap(named, rest, images, targets) if rest else torch.zeros(0)
        return self.by_factors(named, by_factors, images, targets) if by_factors else losses.mean()

    @torch.enable_grad()
    def by_factors(
        self, named: dict[str, Tensor], parts: dict[str, list[Part]], images: Tensor, targets: Tensor
    ) -> Tensor:
        """Add the squares for the weights that are served; return the mean loss."""
        with SquaredGradients(named, parts) as mode:
            features = functional_call(self.learner.flat.module, named, (images,))
        loss = F.cross_entropy(self.learner.head(features, self.classes), targets, reduction="sum")
        mode.backward(loss)
        return loss.detach() / len(images)

    def by_vmap(
        self, named: dict[str, Tensor], parts: dict[str, list[Part]], images: Tensor, targets: Tensor
    ) -> Tensor:
        """Add the squares for any weights; return the losses `[b]`."""
        some = {name: named[name].detach() for name in parts}
        losses, chunk = [], max(1, ROOM // sum(weight.nbytes for weight in some.values()))

        def loss(some: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            features = functional_call(self.learner.flat.module, named | some, (image,))
            return F.cross_entropy(self.learner.head(features, self.classes), target)

        with differentiable_attention():  # fused attention has no vmap rule
            for image, target in zip(images[:, None].split(chunk), targets[:, None].split(chunk), strict=True):
                gradients, values = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(some, image, target)
                for name in parts:
                    for rows, total in parts[name]:
                        add_squares(total, gradients[name][:, rows])
                losses.append(values)
        return torch.cat(losses)

    def loss(self, weights: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Mean -log p over a batch; targets: columns of the task's classes `[b]`."""
        features = functional_call(self.learner.flat.module, self.adapted.named(weights), (images,))
        return F.cross_entropy(self.learner.head(features, self.classes), targets)

    @torch.no_grad()
    def drawn(self, pixels: Tensor, i: int) -> Tensor:
        """Draw labels `[b]` from the model's prediction. The random numbers come from the CPU, so that they do not depend on
        the device; the same draws as `torch.multinomial`, but the host does not wait for the prediction."""
        features = self.learner.without_gradient(self.learner.backbone, pixels)
        chances = self.learner.head(features, self.classes).softmax(1)
        generator = self.learner.generator("fisher", self.task.index, i)
        waits = torch.empty(chances.shape, dtype=chances.dtype).exponential_(generator=generator)
        return (chances / waits.to(chances.device, non_blocking=True)).argmax(1)

    def result(self) -> Tensor:
        """The Fisher plus the floor, `[n]` or `[m]` fp32. Call it once, after the last step."""
        return self.fisher.add_(self.settings.floor) if self.settings.floor else self.fisher

    def tensors(self) -> dict[str, Tensor]:
        return {"fisher": self.fisher}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.fisher.copy_(tensors["fisher"])
