"""Ops that are one formula per entry.

lerp   (1 - alpha) a + alpha b                 12 bytes/parameter (fp32)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import backend, check_counter, check_overlap, check_vectors, register, scalar


@register("lerp", mutates=("out", "nonfinite"))
def _lerp(
    a: Tensor, b: Tensor, alpha: float, alpha_tensor: Tensor | None, out: Tensor, nonfinite: Tensor | None
) -> None:
    check_overlap("out", out, a=a, b=b)
    backend("elementwise", a).lerp(a, b, (alpha, alpha_tensor), out, nonfinite)


@torch.no_grad()
def lerp(
    a: Tensor, b: Tensor, alpha: float | Tensor, *, out: Tensor | None = None, nonfinite: Tensor | None = None
) -> Tensor:
    """(1 - alpha) a + alpha b, exact at alpha = 0 and 1 for finite values.

    a, b: [n] fp32/bf16/fp16, any mix; alpha: float or tensor of one element. out: [n], may be `a` or `b` (default: new,
    dtype of a). nonfinite: int64 tensor of one element that receives the number of written values that are NaN or inf.
    Raises TypeError / ValueError naming the argument.
    """
    check_vectors("a", a=a, b=b, out=out)
    check_counter(nonfinite, a.device)
    out = torch.empty_like(a) if out is None else out
    _lerp(a, b, *scalar("alpha", alpha), out, nonfinite)
    return out
