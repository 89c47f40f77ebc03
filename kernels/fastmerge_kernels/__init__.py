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
from .lists import dare_merge, fisher_average, magmax_merge, weighted_sum
from .sampling import dare_delta, random_mix, random_replace_
from .stock import segment_norms, stock_finalize, stock_merge, stock_ratio, stock_update_
from .threshold import magnitude_digit, magnitude_histogram, magnitude_threshold
from .ties import ties_finalize, ties_merge, ties_update_
from .trm import subspace_gradient, trm_direction, trm_merge

__all__ = [
    "axpy",
    "dare_delta",
    "dare_merge",
    "ewc_gradient_",
    "fisher_accumulate_",
    "fisher_average",
    "fisher_merge_",
    "lerp",
    "magmax_merge",
    "magmax_update_",
    "magnitude_digit",
    "magnitude_histogram",
    "magnitude_threshold",
    "pam_accumulate_",
    "pam_coefficient",
    "perturb",
    "random_mix",
    "random_replace_",
    "segment_norms",
    "stock_finalize",
    "stock_merge",
    "stock_ratio",
    "stock_update_",
    "subspace_gradient",
    "ties_finalize",
    "ties_merge",
    "ties_update_",
    "trm_direction",
    "trm_merge",
    "weighted_sum",
]
