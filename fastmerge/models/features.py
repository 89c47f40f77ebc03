"""Features: the function from images to features that a method trains, evaluates and saves.

A method returns its `Features` and evaluation calls them. The saved model stores `kind` and `tensors`, and `restore`
rebuilds the function from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.models.adapter import ClipAdapter, linear_map
from fastmerge.models.backbone import Backbone
from fastmerge.models.heads import Head
from fastmerge.models.linearised import Linearised
from fastmerge.models.precision import tf32
from fastmerge.models.prompt_pools import POOLS, Pool
from fastmerge.models.prompts import with_tokens
from fastmerge.models.trainable import Prompted


@dataclass(frozen=True)
class Features:
    """kind: name for `restore`. function: normalised images `[b, 3, s, s]` -> `[b, feature_dim]`. tensors: what the
    function needs besides the backbone's weights. head: classifies these features in place of the learner's head; for
    evaluation beside it (`Method.also_evaluated`), since the saved model has the learner's."""

    kind: str
    backbone: Backbone
    function: Callable[[Tensor], Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    head: Head | None = None

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(images)


def plain(backbone: Backbone) -> Features:
    """The backbone itself."""
    return Features("backbone", backbone, backbone)


def with_head(backbone: Backbone, head: Head) -> Features:
    """The backbone itself, classified by another head."""
    return Features("backbone", backbone, backbone, head=head)


def linearised(backbone: Backbone, function: Linearised) -> Features:
    """The backbone in the tangent space of its starting weights."""
    return Features("linearised", backbone, function, {"initial": function.initial})


def adapted(backbone: Backbone, adapter: ClipAdapter) -> Features:
    """An adapter behind the backbone."""
    return Features("clip-adapter", backbone, lambda images: adapter(backbone(images)), dict(adapter.state_dict()))


def mapped(backbone: Backbone, adapter: nn.Module) -> Features:
    """A linear map of the features, without bias."""
    return Features("linear-adapter", backbone, lambda images: adapter(backbone(images)), dict(adapter.state_dict()))


def projected(backbone: Backbone, projection: Tensor) -> Features:
    """Random features of RanPAC: relu(f P), P `[d, M]`."""

    def function(images: Tensor) -> Tensor:
        with tf32(False):
            return torch.relu(backbone(images) @ projection)

    return Features("random-projection", backbone, function, {"projection": projection})


def prompted(backbone: Backbone, pool: Pool) -> Features:
    """The frozen backbone with prompts."""
    return Features(pool.kind, backbone, Prompted.function(backbone, pool), dict(pool.state_dict()))


def with_deep_tokens(backbone: Backbone, tokens: Tensor) -> Features:
    """The frozen backbone with the same tokens for all images, `[blocks, p, width]`: of the inputs of its first blocks."""
    return Features("deep-tokens", backbone, lambda images: with_tokens(backbone, images, tokens), {"tokens": tokens})


def restore(kind: str, backbone: Backbone, tensors: dict[str, Tensor]) -> Features:
    """Rebuild the features that were saved with this kind and these tensors.

    Raises:
        UserError: the kind is unknown.
    """
    if kind == "backbone":
        return plain(backbone)
    if kind == "linearised":
        return linearised(backbone, Linearised(FlatModel(backbone, tensors["initial"].dtype), tensors["initial"]))
    if kind == "clip-adapter":
        return adapted(backbone, ClipAdapter.of(tensors))
    if kind == "linear-adapter":
        return mapped(backbone, linear_map(tensors["weight"]))
    if kind == "random-projection":
        return projected(backbone, tensors["projection"])
    if kind == "deep-tokens":
        return with_deep_tokens(backbone, tensors["tokens"])
    if kind in POOLS:
        return prompted(backbone, POOLS[kind](tensors))
    raise UserError(f"this version of fastmerge does not know features of kind {kind!r}; install a newer one")
