"""Second moments of the inputs of linear layers: X^T X, summed over the rows (tokens, images) that a forward sees.

A mode intercepts the products of a forward, so any model serves: `F.linear`, a product `x @ W` with a parameter (CLIP's
last projection), and self-attention of nn.MultiheadAttention, which is written out so that the input of its output
projection is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmerge.flat import FlatModel
from fastmerge.models.attention import self_attention
from fastmerge.models.precision import flags

PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


class InputMoments(TorchFunctionMode):
    """In this mode every product with a weight of `named` adds X^T X of its input to `totals`.

    named: weights by name, `[out, in]`, or `[in, out]` in a product x @ W. totals: `[in, in]` fp32 by name; only these are
    computed, or with None all, into new tensors. axes: of each weight seen, the dimension of its input, 1 or 0.
    """

    def __init__(self, named: Mapping[str, Tensor], totals: dict[str, Tensor] | None = None):
        super().__init__()
        self.names = {id(weight): name for name, weight in named.items()}
        self.every, self.totals = totals is None, {} if totals is None else totals
        self.axes: dict[str, int] = {}
        self.same: list[Tensor] = []  # casts of weights; kept, so that their ids stay theirs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            return self.linear(*args, **kwargs)
        if function in PRODUCTS and len(args) == 2 and id(args[1]) in self.names and args[1].dim() == 2:
            self.add(args[1], args[0], axis=0)
        if function is F.multi_head_attention_forward and (given := self_attention(args, kwargs)):
            return given.instead(self.linear, F.scaled_dot_product_attention)
        result = function(*args, **kwargs)
        if function is Tensor.to and id(args[0]) in self.names:  # a weight in the precision of the run
            self.names[id(result)] = self.names[id(args[0])]
            self.same.append(result)
        return result

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in self.names:
            self.add(weight, input, axis=1)
        return F.linear(input, weight, bias)

    def add(self, weight: Tensor, input: Tensor, axis: int) -> None:
        name, rows = self.names[id(weight)], input.detach().reshape(-1, input.shape[-1]).float()
        self.axes[name] = axis
        if self.every and name not in self.totals:
            self.totals[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        if name in self.totals:
            with flags("fp32", rows.device):
                self.totals[name].addmm_(rows.mT, rows)


@torch.no_grad()
def linear_inputs(flat: FlatModel, image_size: int) -> dict[str, tuple[int, int]]:
    """The weights of `flat` whose inputs `InputMoments` sees: name -> (length of the input, its dimension in the weight)."""
    image: Any = flat.theta.detach().new_zeros(1, 3, image_size, image_size)
    with InputMoments(dict(zip(flat.names, flat.parameters, strict=True))) as mode:
        flat.module(image)
    return {name: (len(total), mode.axes[name]) for name, total in mode.totals.items()}
