"""Squared per-image gradients of the weights, summed over a batch in one backward pass.

For y = x W^T with tokens t, the gradient of image i's loss with respect to W is sum_t dy_it x_it^T: one batched product
of tensors that the backward pass already has (Goodfellow 2015, arXiv 1510.01799). A parameter that is added to the
tokens or multiplied with them is expanded to one copy per image, whose gradients autograd computes. `vmap` of `grad`
gives the same numbers, but it runs attention unfused and holds whole gradients of every image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fastmerge.models.attention import self_attention

# bytes of per-image gradients in memory at once: what a CPU's cache holds; on a GPU enough to keep it busy
ROOM = {"cpu": 1 << 22, "cuda": 1 << 26}
SAME_ENTRIES = {"view", "reshape", "unsqueeze", "flatten", "to", "contiguous"}  # of a parameter, for its expansion
IN_PLACE = {"add_", "mul_", "__iadd__", "__imul__"}
BROADCAST = {"add", "__add__", "__radd__", "mul", "__mul__", "__rmul__"} | IN_PLACE
PRODUCTS = {"matmul", "__matmul__"}

# (rows, sum): the squares of `gradient[rows]` are added to `sum`, a view of the result. `...` means all rows.
Part = tuple[Any, Tensor]


def flat(values) -> Iterator:
    """Yield `values`, and the items of lists and tuples among them."""
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)


class Linear(torch.autograd.Function):
    """F.linear of x `[b, t, d]`. Its backward adds the squares to the parts of weight and bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, of_weight: list[Part], of_bias: list[Part]):
        ctx.save_for_backward(x, weight)
        ctx.parts = of_weight, of_bias
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.parts
        for rows, total in of_weight:
            dy = grad.mT[:, rows]
            chunk = max(1, ROOM.get(total.device.type, 1 << 26) // total.nbytes)
            for its_dy, its_x in zip(dy.split(chunk), x.split(chunk), strict=True):
                total += (its_dy @ its_x).float().square_().sum(0)
        for rows, total in of_bias:
            add_squares(total, grad.sum(1, dtype=torch.float32)[:, rows])
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


class Expanded(torch.autograd.Function):
    """A parameter `[...]` as one copy per image, `[b, ...]`. Its backward adds the squares to `parts`."""

    @staticmethod
    def forward(ctx, p: Tensor, b: int, parts: list[Part]) -> Tensor:
        ctx.parts = parts
        return p.expand(b, *p.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        for rows, total in ctx.parts:
            add_squares(total, grad[:, rows])
        return None, None, None


def add_squares(total: Tensor, gradients: Tensor) -> None:
    """total `[...]` += the sum over images of gradients `[b, ...]` squared, in fp32."""
    total += gradients.float().square().sum(0)


class SquaredGradients(TorchFunctionMode):
    """In this mode, the backward of a forward through `named` (`functional_call`) adds up squares.

    parts: for each weight to differentiate, where the squares of its gradient are added, summed over the images.
    seen: for each use of such a weight, the number of images in it, or 0 for a use that this mode cannot split by image.
    """

    def __init__(self, named: dict[str, Tensor], parts: dict[str, list[Part]]):
        super().__init__()
        self.parts = parts
        self.weights = [named[name].requires_grad_() for name in parts]
        self.names = {id(named[name]): name for name in parts}
        self.seen: dict[str, list[int]] = {name: [] for name in parts}
        self.same: list[Tensor] = []  # views and casts of weights; kept, so that their ids stay theirs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(id(x) in self.names for x in flat([*args, *kwargs.values()])):
            return function(*args, **kwargs)
        if function is F.linear:
            return self.linear(*args, **kwargs)
        if function is F.layer_norm:
            return self.layer_norm(*args, **kwargs)
        if function is torch.conv2d and self.is_patches(*args, **kwargs):
            return self.patches(*args, **kwargs)
        if function is F.multi_head_attention_forward and (given := self_attention(args, kwargs)):
            return given.instead(self.linear, F.scaled_dot_product_attention)
        kind = getattr(function, "__name__", "")
        result = NotImplemented
        if kind == "to" and not self.known(args[0]):  # takes only the dtype and device of a weight
            return function(*args, **kwargs)
        if kind in SAME_ENTRIES and self.known(args[0]):
            view = function(*args, **kwargs)
            if view.shape == args[0].shape or self.is_whole(args[0]):
                return self.alias(view, args[0])
            self.use(args[0], 0)
            return view
        if kind == "expand" and self.known(args[0]):
            result = self.expand(*args)
        elif kind in PRODUCTS and len(args) == 2:
            result = self.product(*args)
        elif kind in BROADCAST and len(args) == 2 and not kwargs:
            result = self.broadcast(function, *args)
        if result is NotImplemented:
            result = function(*args, **kwargs)
            if any(isinstance(x, Tensor) for x in flat([result])):  # ignore reads of a shape or a dtype
                for x in flat([*args, *kwargs.values()]):
                    self.use(x, 0)
        return result

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of `loss`, summed over the images; no other gradient is computed or kept."""
        torch.autograd.grad(loss, self.weights, allow_unused=True)

    def known(self, x: Any) -> bool:
        return id(x) in self.names

    def use(self, x: Tensor | None, images: int) -> list[Part]:
        """Note a use of a weight with this many images; return its parts, none for what is not differentiated."""
        name = self.names.get(id(x))
        if name is None or x is None:
            return []
        self.seen[name].append(images)
        return [(rows, total.view(x.shape) if rows is ... else total) for rows, total in self.parts[name]]

    def is_whole(self, x: Tensor) -> bool:
        """Whether all of a weight is differentiated, not only some of its rows."""
        return all(rows is ... for rows, _ in self.parts[self.names[id(x)]])

    def alias(self, view: Tensor, of: Tensor) -> Tensor:
        """Let `view` stand for the weight `of`, whose entries it has in the same order."""
        if view is not of:
            self.names[id(view)] = self.names[id(of)]
            self.same.append(view)
        return view

    def per_image(self, p: Tensor, b: int, dims: int) -> Tensor:
        """p as `[b, ...]` with `dims` dimensions in all, aligned from the right."""
        copies = Expanded.apply(p, b, self.use(p, b))
        shape = p.shape[p.dim() - (dims - 1) :] if p.dim() >= dims else (1,) * (dims - 1 - p.dim()) + tuple(p.shape)
        return copies.reshape(b, *shape)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not (self.known(weight) or self.known(bias)):
            return F.linear(input, weight, bias)
        x, b = input, len(input)
        parts = self.use(weight, b), self.use(bias, b)
        y = Linear.apply(x.reshape(b, -1, x.shape[-1]), weight, bias, *parts)
        return y.view(*x.shape[:-1], -1)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight."""
        if not self.known(weight) or self.known(x) or not self.is_whole(weight) or weight.dim() != 2 or x.dim() < 2:
            return NotImplemented
        b = len(x)
        parts = [(rows, total.mT) for rows, total in self.use(weight, b)]
        y = Linear.apply(x.reshape(b, -1, x.shape[-1]), weight.mT, None, parts, [])
        return y.view(*x.shape[:-1], -1)

    def is_patches(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
        """Whether a convolution cuts the image into patches, so that it is a linear map of each."""
        pair = [
            (v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation) if not isinstance(v, str)
        ]
        return pair == [tuple(weight.shape[2:]), (0, 0), (1, 1)] and groups == 1

    def patches(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        b, size, (rows, columns) = len(input), weight.shape[2:], input.shape[2:]
        x = F.unfold(input, size, stride=size).mT  # [b, patches, channels * pixels]
        parts = [(r, total.flatten(1)) for r, total in self.use(weight, b)], self.use(bias, b)
        y = Linear.apply(x, weight.flatten(1), bias, *parts)
        return y.mT.unflatten(2, (rows // size[0], columns // size[1]))

    def layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
        y, b = F.layer_norm(input, normalized_shape, None, None, eps), len(input)
        if weight is not None:
            y = y * (self.per_image(weight, b, input.dim()) if self.known(weight) else weight)
        if bias is not None:
            y = y + (self.per_image(bias, b, input.dim()) if self.known(bias) else bias)
        return y

    def expand(self, p: Tensor, *sizes) -> Tensor:
        """p.expand(b, ...): a token for every image."""
        sizes = tuple(flat(sizes))
        if len(sizes) < 2 or sizes[0] < 1 or (len(sizes) == p.dim() and p.shape[0] != 1):
            return NotImplemented
        return self.per_image(p, sizes[0], len(sizes)).expand(sizes)

    def broadcast(self, function, x: Any, y: Any) -> Tensor:
        """x + y or x * y, where one is a weight and the other has the images as dimension 0."""
        p, tokens = (x, y) if self.known(x) else (y, x)
        if self.known(tokens) or not isinstance(tokens, Tensor) or (p is x and function.__name__ in IN_PLACE):
            return NotImplemented
        if not tokens.dim() or p.dim() > tokens.dim() or (p.dim() == tokens.dim() and p.shape[0] != 1):
            return NotImplemented
        copies = self.per_image(p, len(tokens), tokens.dim())
        return function(copies, tokens) if p is x else function(tokens, copies)


@torch.no_grad()
def served(module: nn.Module, named: dict[str, Tensor], parts: dict[str, list[Part]], image: Tensor) -> list[str]:
    """The weights that `SquaredGradients` serves: each is used once, split by image. image: `[1, 3, s, s]`."""
    images = 5  # a number that is unlikely to be another dimension
    mode = SquaredGradients(named, parts)
    with mode:
        functional_call(module, named, (image.expand(images, -1, -1, -1),))
    return [name for name, seen in mode.seen.items() if seen == [images]]
