"""The network in the tangent space of its starting weights (Ortiz-Jimenez et al. 2023; CMM, eq. 2):

    f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0)

One forward-mode pass gives both the value and the product, so a step costs about one extra forward. The backward runs
only through the product, which is linear in theta. The model is not copied: theta_0 is a flat vector.
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
    """`features = linearised(images)` at the present `flat.theta`, called like the backbone; differentiable in theta.

    initial: `[n]`, theta_0; neither copied nor changed.
    """

    def __init__(self, flat: FlatModel, initial: Tensor):
        self.flat, self.initial = flat, initial

    def __call__(self, images: Tensor) -> Tensor:
        """`[b, 3, s, s]` normalised -> `[b, feature_dim]`."""
        return self.at(self.flat.as_dict(self.flat.theta - self.initial), images)

    def at(self, shift: dict[str, Tensor], images: Tensor) -> Tensor:
        """The features for `shift`, theta - theta_0 as named tensors."""
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
    """Compute one Jacobian-vector product as a check.

    Raises:
        UserError: naming the layer that has no forward-mode derivative or that uses batch statistics.
    """
    for name, layer in flat.module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise UserError(
                f"layer {name} ({type(layer).__name__}) is in training mode: its output depends on the whole batch, "
                "so the model has no tangent space. Put the model in eval mode, or train without --cmm.tangent"
            )
    entered: list[str] = []  # layers not left yet; the last one failed
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
