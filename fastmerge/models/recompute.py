"""Gradient checkpointing (`--checkpoint-gradients`; Chen et al. 2016, arXiv 1604.06174): only the inputs of the
transformer's blocks are kept for the backward pass, which runs each block once more. The numbers are the same bits.

The libraries' own switches run the block again with the weights and contexts of that later time. A forward through
`functional_call` (LoRA) or in bf16 is over by then, so the weights and the precision of the first time are kept here.
Where attention must be differentiable twice or in forward mode (TRM's exact curvature, the tangent space), and in the
Fisher pass, blocks are not run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from fastmerge.errors import UserError
from fastmerge.models.attention import is_differentiable


def blocks_of(backbone: Any, flag: str = "--checkpoint-gradients") -> list[nn.Module]:
    """The transformer blocks of an open_clip tower, a timm model, or a timm trunk in an open_clip tower. flag: needs them.

    Raises:
        UserError: the model has none.
    """
    for place in ("transformer.resblocks", "blocks", "trunk.blocks"):
        found = backbone.tower
        for name in place.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList | nn.Sequential) and len(found):
            return list(found)
    raise UserError(
        f"{flag}: model {backbone.name} has no list of transformer blocks; choose a ViT"
        + ", or --micro-batch" * (flag == "--checkpoint-gradients")
    )


def checkpoint_blocks(backbone: Any) -> None:
    """Run every block of `backbone` again in the backward pass, while `backbone.recompute` is set."""
    backbone.recompute = True
    for block in blocks_of(backbone):
        block.forward = partial(_forward, backbone, block)  # a partial is copied together with its block


@contextlib.contextmanager
def kept_activations(backbone: Any) -> Iterator[None]:
    """In this context, a forward pass keeps all activations."""
    before, backbone.recompute = backbone.recompute, False
    try:
        yield
    finally:
        backbone.recompute = before


def _forward(backbone: Any, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    own = type(block).forward
    if not backbone.recompute or not torch.is_grad_enabled() or is_differentiable():
        return own(block, *args, **kwargs)
    weights = dict(
        _WithoutHooks(block).named_parameters(remove_duplicate=False)
    )  # those of a functional_call, inside one
    again = Again()

    def run(weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with kept_activations(backbone):
            return functional_call(_WithoutHooks(block), weights, args, kwargs)

    return checkpoint(
        run, weights, *args, **kwargs,
        use_reentrant=False,
        preserve_rng_state=False,  # no dropout in eval mode
        context_fn=lambda: (contextlib.nullcontext(), again),
    )  # fmt: skip


class _WithoutHooks(nn.Module):
    """A block without its hooks, which run outside the checkpoint."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


class Again:
    """The function modes that are active now (precision, prompts), as a context to enter later, and repeatedly."""

    def __init__(self):
        self.modes = [_copy(mode) for mode in _get_current_function_mode_stack()]
        self.inside: list[Any] = []

    def __enter__(self):
        self.inside = [_copy(mode) for mode in self.modes]
        for mode in self.inside:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self.inside):
            mode.__exit__(*error)


def _copy(mode: Any) -> Any:
    """A mode that counts is copied as it is now."""
    return mode.again() if hasattr(mode, "again") else mode
