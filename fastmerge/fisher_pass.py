"""The diagonal Fisher of the model on a task: the mean over its images of the squared gradient of -log p(label | image).

By default the labels are drawn from the model's own prediction, which gives the Fisher information (Martens 2020), and
gradients are per image, by `torch.func.vmap` of `grad` (for LoRA's projections by `models/per_image.py`).
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
from fastmerge.models.per_image import ROOM, SquaredGradients, served
from fastmerge.models.trainable import AllWeights
from fastmerge.training import Batches, Learner, Phase, positions


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
        self._served: bool | None = None

    @torch.no_grad()  # torch.func.grad enables gradients for its own inputs; head rows need none
    def step(self, i: int) -> dict[str, Tensor]:
        learner, size = self.learner, self.learner.config.training.batch_size
        rows = self.batches.rows(i)[: self.total - i * size]
        pixels, labels = self.images.batch(rows)
        images = learner.plain(pixels)
        targets = positions(labels, self.classes) if self.labels == "data" else self.drawn(images, i)
        squares = (
            None if self.settings.per == "batch" else self.projections if self.served(images[:1]) else self.per_image
        )
        loss, gradient = self.fisher.new_zeros(()), torch.zeros(0)
        for part, share in learner.parts(len(images)):
            if squares is not None:
                loss += share * squares(images[part], targets[part])
                continue
            found, value = grad_and_value(self.loss)(self.weights, images[part], targets[part])
            gradient = found * share if not len(gradient) else gradient.add_(found, alpha=share)
            loss += share * value
        if squares is None:
            fk.fisher_accumulate_(self.fisher, gradient, len(rows) / self.total)
        return {"loss": loss}

    def per_image(self, images: Tensor, targets: Tensor) -> Tensor:
        """Add the squared gradients of a batch, computed by vmap; return the mean loss."""
        losses, chunk = [], max(1, ROOM // self.fisher.nbytes)
        with differentiable_attention():  # fused attention has no vmap rule
            for part in zip(images[:, None].split(chunk), targets[:, None].split(chunk), strict=True):
                gradients, values = vmap(grad_and_value(self.loss), in_dims=(None, 0, 0))(self.weights, *part)
                for gradient in gradients:
                    fk.fisher_accumulate_(self.fisher, gradient, 1 / self.total)
                losses.append(values)
        return torch.cat(losses).mean()

    def served(self, image: Tensor) -> bool:
        """Whether `projections` can be used: only for adapted weights, each in one linear map. Checked once."""
        if self._served is None:
            named = self.learner.flat.as_dict(self.learner.theta)
            module = self.learner.flat.module
            self._served = isinstance(self.adapted, Projections) and served(module, named, self.adapted.blocks, image)
        return self._served

    @torch.enable_grad()
    def projections(self, images: Tensor, targets: Tensor) -> Tensor:
        """The same as `per_image` for adapted projections, with one backward pass for the batch."""
        assert isinstance(self.adapted, Projections)
        named, squares = self.learner.flat.as_dict(self.learner.theta), torch.zeros_like(self.fisher)
        with SquaredGradients(named, self.adapted.blocks, squares) as mode:
            features = functional_call(self.learner.flat.module, named, (images,))
        loss = F.cross_entropy(self.learner.head(features, self.classes), targets, reduction="sum")
        mode.backward(loss)
        self.fisher.add_(squares, alpha=1 / self.total)
        return loss.detach() / len(images)

    def loss(self, weights: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Mean -log p over a batch; targets: columns of the task's classes `[b]`."""
        features = functional_call(self.learner.flat.module, self.adapted.named(weights), (images,))
        return F.cross_entropy(self.learner.head(features, self.classes), targets)

    @torch.no_grad()
    def drawn(self, images: Tensor, i: int) -> Tensor:
        """Draw labels `[b]` from the model's prediction, on the CPU so that the draw does not depend on the device."""
        chances = self.learner.head(self.learner.backbone(images), self.classes).softmax(1).cpu()
        generator = self.learner.generator("fisher", self.task.index, i)
        return torch.multinomial(chances, 1, generator=generator)[:, 0].to(images.device)

    def result(self) -> Tensor:
        """The Fisher plus the floor, `[n]` or `[m]` fp32. Call it once, after the last step."""
        return self.fisher.add_(self.settings.floor) if self.settings.floor else self.fisher

    def tensors(self) -> dict[str, Tensor]:
        return {"fisher": self.fisher}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.fisher.copy_(tensors["fisher"])
