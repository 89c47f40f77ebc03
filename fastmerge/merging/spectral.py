"""What rules need of a singular value decomposition. They compute in float64, on the device of the weights.

Directions whose singular value is zero up to fp32's rounding are arbitrary: they are left out. A task vector of LoRA has
them, and a weight that did not move has no others.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[rows, k]`, S `[k]`, V^T `[k, columns]` of `matrix`, float64, S falling; k is the rank."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = int((values > EPSILON * max(matrix.shape) * values[0]).sum())
    return left[:, :rank], values[:rank], right[:rank]


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values 1: U V^T (the orthogonal Procrustes problem)."""
    left, _, right = singular(matrix)
    return left @ right
