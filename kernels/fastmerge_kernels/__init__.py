"""Fused merge operations on flat parameter vectors, for CPU (numba) and CUDA (Triton).

All ops take 1-D contiguous fp32/bf16/fp16 tensors, accumulate in fp32 or float64, and are registered as
`torch.ops.fastmerge.*`, so they work inside `torch.compile(fullgraph=True)`. They are not differentiable. `reference` holds
every formula in float64.
"""

from .elementwise import (
    axpy,
    ewc_gradient_,
    fisher_accumulate_,
    fisher_merge_,
    lerp,
    magmax_update_,
    pam_accumulate_,
    pam_coefficient,
    perturb,
)
from .trm import subspace_gradient, trm_direction, trm_merge

__all__ = [
    "axpy",
    "ewc_gradient_",
    "fisher_accumulate_",
    "fisher_merge_",
    "lerp",
    "magmax_update_",
    "pam_accumulate_",
    "pam_coefficient",
    "perturb",
    "subspace_gradient",
    "trm_direction",
    "trm_merge",
]
