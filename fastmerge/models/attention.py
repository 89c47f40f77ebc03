"""Attention that can be differentiated twice, in forward mode and under vmap; self-attention written out in its products."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


class SelfAttention(NamedTuple):
    """What a call of nn.MultiheadAttention computes with. tokens: `[b, t, d]`; in_weight `[3 d, d]`, out_weight `[d, d]`, and
    their biases."""

    tokens: Tensor
    num_heads: int
    in_weight: Tensor
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None

    def written_out(self, linear: Callable[..., Tensor], mix: Callable[..., Tensor]) -> Tensor:
        """The result in its products, `[b, t, d]`. linear, mix: F.linear and F.scaled_dot_product_attention, or what stands
        for them."""
        q, k, v = linear(self.tokens, self.in_weight, self.in_bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        mixed = mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return linear(mixed.transpose(1, 2).flatten(2), self.out_weight, self.out_bias)

    def instead(self, linear: Callable[..., Tensor], mix: Callable[..., Tensor]) -> tuple[Tensor, None]:
        """The same, as `F.multi_head_attention_forward` returns it: tokens first, and no attention weights."""
        return self.written_out(linear, mix).transpose(0, 1), None


def self_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SelfAttention | None:
    """A call of `F.multi_head_attention_forward`, if it is self-attention without masks, biases of keys or weights to return;
    else None."""
    given = SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    found = given.arguments
    query = found["query"]
    if query is not found["key"] or query is not found["value"] or query.dim() != 3:
        return None
    if any(isinstance(found[x], Tensor) or found[x] for x in UNUSED):
        return None
    weights = (found[f"{part}_{kind}"] for part in ("in_proj", "out_proj") for kind in ("weight", "bias"))
    return SelfAttention(query.transpose(0, 1), found["num_heads"], *weights)
