"""Attention that can be differentiated twice, in forward mode and under vmap; self-attention written out in its products."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SIGNATURE = inspect.signature(F.multi_head_attention_forward)
# arguments that an image tower does not set
UNUSED = (
    "bias_k bias_v add_zero_attn dropout_p key_padding_mask need_weights attn_mask is_causal use_separate_proj_weight "
    "static_k static_v"
).split()


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """In this context, attention has second and forward-mode derivatives. torch's fused kernels and the inference fast
    path of nn.MultiheadAttention have none (pytorch issues 98164, 117629)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def is_differentiable() -> bool:
    """Whether `differentiable_attention` is in force."""
    return not torch.backends.cuda.flash_sdp_enabled()


def self_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of `F.multi_head_attention_forward` by name, if the call is self-attention without masks, biases of
    keys or weights to return; else None."""
    given = SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    found = given.arguments
    same = found["query"] is found["key"] is found["value"] and found["query"].dim() == 3
    return found if same and not any(isinstance(found[x], Tensor) or found[x] for x in UNUSED) else None


def written_out(
    linear: Callable[..., Tensor],
    mix: Callable[..., Tensor],
    tokens: Tensor,
    num_heads: int,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
) -> Tensor:
    """Self-attention of nn.MultiheadAttention on tokens `[b, t, d]`. weights: in_proj `[3 d, d]` and its bias, out_proj
    `[d, d]` and its bias. linear, mix: F.linear and F.scaled_dot_product_attention, or what stands for them."""
    in_weight, in_bias, out_weight, out_bias = weights
    q, k, v = linear(tokens, in_weight, in_bias).unflatten(-1, (3, num_heads, -1)).unbind(2)
    mixed = mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return linear(mixed.transpose(1, 2).flatten(2), out_weight, out_bias)
