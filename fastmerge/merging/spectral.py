"""What rules need of a singular value decomposition. They compute in float64, on the device of the weights.

Directions whose singular value is zero up to fp32's rounding are arbitrary: they are left out. A task vector of LoRA has
them, and a weight that did not move has no others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmerge.errors import UserError

EPSILON = torch.finfo(torch.float32).eps


class NotFinite(UserError):
    """A matrix has NaN or inf, so it has no singular values and no inverse."""


def check_finite(matrix: Tensor, name: str) -> None:
    """Raise NotFinite, about the task vector of the tensor `name`."""
    if not bool(matrix.isfinite().all()):
        raise NotFinite(
            f"{name}: its task vector has NaN or inf, so it has no singular values; leave that model out, or train it "
            "again with a smaller learning rate"
        )


def singular(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U `[rows, k]`, S `[k]`, V^T `[k, columns]` of `matrix`, float64, S falling; k is the rank. name: of the tensor.

    Raises:
        NotFinite: the matrix has NaN or inf.
    """
    check_finite(matrix, name)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = int((values > EPSILON * max(matrix.shape) * values[0]).sum())
    return left[:, :rank], values[:rank], right[:rank]


def orthogonal(matrix: Tensor, name: str) -> Tensor:
    """The nearest matrix with singular values 1: U V^T (the orthogonal Procrustes problem). name: of the tensor."""
    left, _, right = singular(matrix, name)
    return left @ right
