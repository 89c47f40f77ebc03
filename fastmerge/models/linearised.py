"""The network in the tangent space of its starting weights (Ortiz-Jimenez et al. 2023; CMM, eq. 2):

    f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0)

One forward-mode pass gives value and product together, so a step costs about as much again as its forward; the backward
runs through the product alone, which is linear in theta. No copy of the model is made: theta_0 is a flat vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fastmerge.errors import UserError, first_line
from fastmerge.flat import FlatModel
from fastmerge.models.attention import differentiable_attention
from fastmerge.models.trainable import AllWeights


class Linearised:
    """`features = linearised(images)`, like the backbone, at the present `flat.theta`; differentiable by it.

    initial: `[n]`, theta_0; it is neither copied nor changed.
    """

    def __init__(self, flat: FlatModel, initial: Tensor):
        self.flat, self.initial = flat, initial

    def __call__(self, images: Tensor) -> Tensor:
        """`[b, 3, s, s]` normalised -> `[b, feature_dim]`."""
        return self.at(self.flat.as_dict(self.flat.theta - self.initial), images)

    def at(self, shift: dict[str, Tensor], images: Tensor) -> Tensor:
        """The features for theta - theta_0 given as named tensors."""
        module = self.flat.module

        def features(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(module, parameters, (images,))

        with differentiable_attention():  # fused attention has no forward-mode rule
            value, product, *_ = jvp(features, (self.flat.as_dict(self.initial),), (shift,))
        return value + product


class TangentSpace(AllWeights):
    """All weights, trained in the tangent space of theta_0."""

    def __init__(self, flat: FlatModel, tangent: Linearised):
        super().__init__(flat)
        self.tangent = tangent

    def features(self, images: Tensor) -> Tensor:
        return self.tangent(images)


def check_linearisable(flat: FlatModel, image_size: int) -> None:
    """Try one product.

    Raises:
        UserError: naming the layer that has no forward-mode derivative, or that a batch's statistics flow through.
    """
    for name, layer in flat.module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise UserError(
                f"layer {name} ({type(layer).__name__}) is in training mode: its output is no function of one image, "
                "so the model has no tangent space. Put the model in eval mode, or train without --cmm.tangent"
            )
    entered: list[str] = []  # and not left: the last one is where it failed
    hooks = []
    for name, layer in flat.module.named_modules():
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))
        hooks.append(layer.register_forward_hook(lambda *_: entered.__delitem__(-1)))
    theta = flat.theta.detach()
    images = torch.zeros(2, 3, image_size, image_size, device=theta.device, dtype=theta.dtype)
    try:
        with torch.no_grad():
            Linearised(flat, theta).at(flat.as_dict(theta), images)
    except (RuntimeError, NotImplementedError) as error:
        layer = flat.module.get_submodule(entered[-1]) if entered else flat.module
        raise UserError(
            f"layer {entered[-1] if entered else '(the model)'} ({type(layer).__name__}) has no forward-mode derivative "
            f"({first_line(error)}), so the model cannot be trained in its tangent space: use --cmm.no-tangent, or a ViT"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
