"""Backbone: an image tower with one small interface for open_clip and timm.

`features = backbone(images)` and `features, tokens = backbone.class_tokens(images)`; images are normalised floats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.errors import UserError
from fastmerge.models.compiled import Compiled
from fastmerge.models.normalisation import Normalisation
from fastmerge.models.precision import computing, flags
from fastmerge.models.prompts import Prompt, prompting


class Backbone(nn.Module):
    """The image tower alone. Subclasses set the family and read the class tokens.

    name: as the user gives it; family: the library. weights: their source; weights_sha256: hash of their values.
    image_size: pixels; mean, std: of `normalisation`, which also says where they come from. feature_dim, width: length
    of a feature, a token; layers: blocks. prefix: of every block, `[2, p, width]` keys and values, or none (add_prefix).
    """

    family: str
    compiled: Compiled | None = None
    recompute = False  # whether a backward pass runs the blocks again, see models/recompute.py
    precision = "fp32"  # of products inside the tower, see models/precision.py; a run sets it
    tower: Any  # a module of open_clip or timm, with undeclared attributes

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        *,
        weights: str,
        image_size: int,
        mean,
        std,
        feature_dim: int,
        source: str = "",
    ):
        super().__init__()
        self.name, self.weights = name, weights
        self.tower = tower
        self.image_size, self.feature_dim = image_size, feature_dim
        self.normalisation = Normalisation(tuple(mean), tuple(std), source)
        self.mean, self.std = self.normalisation.mean, self.normalisation.std
        self.width, self.layers, self.has_class_token = 0, 0, False  # set by subclasses with class tokens
        self.prefix = nn.ParameterList()
        self.requires_grad_(True)
        self.float()
        self.weights_sha256 = hash_tensors(self.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        """`[b, 3, s, s]` normalised -> `[b, feature_dim]`, not L2-normalised, in the dtype of the images."""
        return self._run("features", images, self._own())

    def add_prefix(self, prefix: Iterable[Tensor]) -> None:
        """Prefix tuning (Li & Liang 2021): `prefix`, `[2, p, width]` for every block, is from now on a part of the model, and
        all of it that can be trained."""
        self.requires_grad_(False)
        self.prefix = nn.ParameterList(prefix)

    def _own(self) -> Prompt | None:
        return (
            Prompt({i: (own[0][None], own[1][None]) for i, own in enumerate(self.prefix)}) if len(self.prefix) else None
        )

    def without_prefix(self, images: Tensor) -> Tensor:
        """The features of the weights alone."""
        return self._run("features", images)

    def prompted(self, images: Tensor, prompt: Prompt) -> Tensor:
        """The features with prompts in the transformer, see models/prompts.py. Inserted tokens run uncompiled."""
        return self._run("features", images, prompt)

    def class_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[b, feature_dim]` and the class token after every block, `[layers, b, width]`, in one forward.

        Raises:
            UserError: the model has no class token.
        """
        self.check_class_tokens()
        return self._run("class tokens", images, self._own())

    def check_class_tokens(self) -> None:
        """Raise UserError if the model has no class token."""
        if not self.has_class_token:
            raise UserError(
                f"model {self.name} has no class token, which prediction consistency (TRM, eq. 7) compares: "
                "choose a ViT with a class token, or switch the term off with --trm.lambda1 0"
            )

    def last_projection(self) -> list[str]:
        """Names of the parameters of the last linear map: CLIP's visual projection, else the last linear layer."""
        if isinstance(getattr(self.tower, "proj", None), nn.Parameter):
            return ["tower.proj"]
        linear = [name for name, layer in self.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise UserError(
                f"model {self.name} has no linear layer to align: switch alignment off, --cmm.align-epochs 0"
            )
        return [f"{linear[-1]}.{name}" for name, _ in self.get_submodule(linear[-1]).named_parameters()]

    def _run(self, what: str, images: Tensor, prompt: Prompt | None = None) -> Any:
        hooks = prompt is not None and bool(prompt.tokens)
        with flags(self.precision, images.device):
            return (self._compute if hooks or self.compiled is None else self.compiled)(what, images, prompt)

    def _compute(self, what: str, images: Tensor, prompt: Prompt | None = None) -> Any:
        with computing(self.precision), prompting(self, prompt):
            if what == "features":
                return self._features(images).to(images.dtype)
            features, tokens = self._class_tokens(images)
            return features.to(images.dtype), tokens.to(images.dtype)

    def compile_with(self, usual: Callable[[int], bool], say: Callable[[str], None]) -> None:
        """Compile forward passes of a usual number of images, see models/compiled.py. Copies stay uncompiled."""
        self.compiled = Compiled(self._compute, usual, say)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"compiled": None}  # it is bound to this module

    def _features(self, images: Tensor) -> Tensor:
        return self.tower(images)

    def _class_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} sets has_class_token but does not define _class_tokens")


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and values in sorted order: the same weights give the same hash from any file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
