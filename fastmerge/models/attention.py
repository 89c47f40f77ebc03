"""Attention that can be differentiated twice, in forward mode and under vmap."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


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
