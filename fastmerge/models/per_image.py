"""Per-image squared gradients of the weights of linear maps, in one backward pass over a batch.

For y = x W^T with tokens t, the gradient of image i's loss with respect to W is sum_t dy_it x_it^T: one batched product
of tensors that the backward pass already has (Goodfellow 2015, arXiv 1510.01799). `vmap` of `grad` gives the same
numbers, but it runs attention unfused and computes whole gradients of fused matrices where only some rows are needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fastmerge.models.lora import Block

ROOM = 1 << 28  # bytes of per-image gradients in memory at once
ATTENTION = inspect.signature(F.multi_head_attention_forward)
# arguments that an image tower does not set; if one is set, vmap is used instead
UNUSED = "bias_k bias_v add_zero_attn dropout_p key_padding_mask need_weights attn_mask is_causal".split()


def flat(values) -> Iterator:
    """Yield `values`, and the items of lists and tuples among them."""
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)


class Linear(torch.autograd.Function):
    """F.linear of x `[b, t, d]`. Its backward adds the squares to `parts`: (first row, rows, sum `[rows, d]`) each."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, parts) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parts = parts
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        for first, rows, total in ctx.parts:
            chunk = max(1, ROOM // total.nbytes)
            for dy, its in zip(grad[..., first : first + rows].split(chunk), x.split(chunk), strict=True):
                total += (dy.mT @ its).square_().sum(0)
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None


class SquaredGradients(TorchFunctionMode):
    """In this mode, the backward of a forward through `named` (`functional_call`) adds up squares for `blocks`.

    out: `[m]` fp32, the blocks in sequence; the squared gradients, summed over the images, are added to it. seen: for
    each use of a weight, the leading dimension of the linear map's input, or 0 if the use is not a linear map.
    """

    def __init__(self, named: dict[str, Tensor], blocks: Sequence[Block], out: Tensor):
        super().__init__()
        self.weights = [named[name].requires_grad_() for name in dict.fromkeys(b.name for b in blocks)]
        self.names = {id(named[b.name]): b.name for b in blocks}
        self.parts: dict[str, list] = {b.name: [] for b in blocks}
        self.seen: dict[str, list[int]] = {b.name: [] for b in blocks}
        for block, part in zip(blocks, out.split([b.rows * b.columns for b in blocks]), strict=True):
            self.parts[block.name].append((block.first, block.rows, part.view(block.rows, block.columns)))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            return self.linear(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            given = ATTENTION.bind(*args, **kwargs)
            given.apply_defaults()
            given = given.arguments
            same = given["query"] is given["key"] is given["value"] and given["query"].dim() == 3
            plain = same and not any(isinstance(given[x], Tensor) or given[x] for x in UNUSED)
            if plain and id(given["in_proj_weight"]) in self.names:
                return self.attention(**given), None
        result = function(*args, **kwargs)
        if any(isinstance(x, Tensor) for x in flat([result])):  # ignore reads of a shape or a dtype
            for name in {self.names.get(id(x)) for x in flat([*args, *kwargs.values()])} - {None}:
                self.seen[name].append(0)
        return result

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of `loss`, summed over the images; no other gradient is computed or kept."""
        torch.autograd.grad(loss, self.weights, allow_unused=True)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name = self.names.get(id(weight))
        if name is None:
            return F.linear(x, weight, bias)
        self.seen[name].append(len(x))
        y = Linear.apply(x.reshape(len(x), -1, x.shape[-1]), weight, bias, self.parts[name])
        return y.view(*x.shape[:-1], -1)

    def attention(
        self, query, num_heads, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, **rest
    ) -> Tensor:
        """Self-attention of nn.MultiheadAttention; query `[t, b, d]`, tokens first."""
        q, k, v = (
            self.linear(query.transpose(0, 1), in_proj_weight, in_proj_bias).unflatten(-1, (3, num_heads, -1)).unbind(2)
        )
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)


@torch.no_grad()
def served(module: nn.Module, named: dict[str, Tensor], blocks: Sequence[Block], image: Tensor) -> bool:
    """Whether every weight is used once, in a linear map with images as dimension 0; image `[1, 3, s, s]`."""
    mode = SquaredGradients(named, blocks, image.new_zeros(sum(b.rows * b.columns for b in blocks)))
    with mode:
        functional_call(module, named, (image,))
    return all(seen == [1] for seen in mode.seen.values())
