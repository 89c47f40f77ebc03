"""What a training phase trains: one flat parameter, and the features that depend on it.

`AllWeights` trains the backbone's own vector, `LowRank` (models/lora.py) an adapter of its projections, `Beside` a small
module behind a frozen backbone, and `Prompted` prompts inside one. The method chooses the optimiser and the schedule
(`training.Train`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmerge.flat import FlatModel
from fastmerge.models.backbone import Backbone
from fastmerge.models.per_image import Part
from fastmerge.models.prompt_pools import Pool


class Trainable(ABC):
    """theta: `[p]` fp32, the one parameter that the optimiser sees; `theta.grad` always exists."""

    theta: nn.Parameter

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Normalised images `[b, 3, s, s]` -> `[b, feature_dim]`, differentiable with respect to `theta`."""

    def fold(self) -> None:
        """End of training: write the result into the learner's model where needed."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint inside the phase needs besides the learner and the method."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`."""


class AllWeights(Trainable):
    """All weights of the backbone, so m = n. base: the weights that `shift` starts from."""

    base: Tensor

    def __init__(self, flat: FlatModel):
        self.flat, self.theta = flat, flat.theta

    def features(self, images: Tensor) -> Tensor:
        return self.flat.module(images)

    def gather(self, theta: Tensor) -> Tensor:
        return theta.clone()

    def scatter(self, weights: Tensor, theta: Tensor) -> None:
        theta.copy_(weights)

    def shift(self) -> Tensor:
        return self.theta - self.base

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        return self.flat.as_dict(weights)

    def parts(self, vector: Tensor) -> dict[str, list[Part]]:
        """Views of `vector` `[m]`: for every weight the rows that are adapted, and where they are in the vector."""
        return {name: [(..., view)] for name, view in zip(self.flat.names, self.flat.views(vector), strict=True)}

    def at(self, weights: Tensor, images: Tensor) -> Tensor:
        """The features with the adapted weights replaced by `weights` `[m]`."""
        return functional_call(self.flat.module, self.named(weights), (images,))


class Beside(Trainable):
    """A small module behind a frozen backbone: the backbone runs without autograd, so it costs no gradient memory.

    module: features `[b, d]` -> features `[b, d]`; its trainable parameters are views of `theta` from now on. The method
    that owns this object returns `theta` in its `state_dict()`.
    """

    def __init__(self, backbone: Callable[[Tensor], Tensor], module: nn.Module):
        self.backbone, self.flat = backbone, FlatModel(module)
        self.theta = self.flat.theta

    def features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = self.backbone(images)
        return self.flat.module(frozen)


class PassesThrough(nn.Module):
    """Parameters that a head or the text tower uses: the features pass through unchanged. For `Beside`."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class Prompted(Trainable):
    """Prompts in a frozen backbone. The method that owns `pool` returns its tensors in its `state_dict()`."""

    def __init__(self, backbone: Backbone, pool: Pool):
        self.backbone, self.pool, self.flat = backbone, pool, FlatModel(pool)
        self.theta = self.flat.theta

    def features(self, images: Tensor) -> Tensor:
        return self.function(self.backbone, self.pool)(images)

    def in_training(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features of a training batch, and the pool's term of the loss."""
        prompt, penalty = self.pool.in_training(query(self.backbone, images))
        return self.backbone.prompted(images, prompt), penalty

    @staticmethod
    def function(backbone: Backbone, pool: Pool) -> Callable[[Tensor], Tensor]:
        """Images to features, as at test time."""
        return lambda images: backbone.prompted(images, pool(query(backbone, images)))


@torch.no_grad()
def query(backbone: Backbone, images: Tensor) -> Tensor:
    """What chooses the prompts of an image: its feature without any, `[b, feature_dim]`."""
    return backbone(images)
