"""DualGPM (Liang & Li, ECML-PKDD 2023; used by InfLoRA): the input space that old tasks need, for one linear layer.

An orthonormal basis of it is kept while it has at most half of the dimensions, then one of its complement (`retain`),
which only shrinks. So at most half of the space is stored. Computed in float64 on the CPU.

The criterion is that of InfLoRA's released code: it takes the singular values of the second moment X^T X, which are squares
of those of X, and squares them again. So `threshold` is a share of the sum of fourth powers, not of the energy of the
paper's eq. 5 and 9; the same number keeps fewer directions. After the first task the released code stores the old space
itself as `retain` where it has more than half of the dimensions; we store its complement there, as later on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """basis: `[d, k]` fp32, orthonormal columns; of the old tasks' input space, or with `retain` of its complement."""

    basis: Tensor
    retain: bool

    def free(self, moment: Tensor) -> Tensor:
        """The part of `moment` `[d, d]` outside the old input space, float64 on the CPU."""
        basis, moment = self.basis.cpu().double(), moment.cpu().double()
        inside = basis @ (basis.mT @ moment)
        return inside if self.retain else moment - inside


def grown(memory: Memory | None, moment: Tensor, threshold: float) -> Memory:
    """The memory after a task whose inputs have this second moment `[d, d]`; memory: before it, None at the first task."""
    moment = moment.cpu().double()
    squares = torch.linalg.svdvals(moment).square()
    if memory is None:
        left, values = left_vectors(moment)
        count = int((values.square().cumsum(0) / squares.sum() < threshold).sum())
        return halved(left[:, : max(count, 1)], False)
    left, values = left_vectors(memory.free(moment))
    shares = values.square() / squares.sum()
    # the share outside the old space after taking in 0, 1, ... directions
    outside = shares.sum() - torch.cat([shares.new_zeros(1), shares.cumsum(0)])
    basis = memory.basis.cpu().double()
    if not memory.retain:
        count = int((1 - outside[:-1] < threshold).sum())
        return halved(torch.cat([basis, left[:, :count]], 1)[:, : len(basis)], False)
    count = min(int((outside[:-1] >= 1 - threshold).sum()), basis.shape[1])
    rest = basis - left[:, :count] @ (left[:, :count].mT @ basis)
    return stored(left_vectors(rest)[0][:, : basis.shape[1] - count], True)


def halved(basis: Tensor, retain: bool) -> Memory:
    """The basis, or its complement where that is smaller."""
    rows, columns = basis.shape
    if columns <= rows / 2:
        return stored(basis, retain)
    return stored(left_vectors(basis)[0][:, columns:], not retain)


def stored(basis: Tensor, retain: bool) -> Memory:
    """In the layout of a loaded one, since products in another layout differ in their last bits."""
    return Memory(basis.float().contiguous(), retain)


def tensors_of(memory: dict[str, Memory]) -> dict[str, Tensor]:
    """The memories of layers by name as tensors for a file: bases `[in, k]`, and under `retain` whether each is one of the
    complement, in the order of the names."""
    bases = {f"basis.{name}": one.basis for name, one in sorted(memory.items())}
    retain = [one.retain for _, one in sorted(memory.items())]
    return bases | {"retain": torch.tensor(retain, dtype=torch.bool)} if bases else {}


def memories_of(tensors: dict[str, Tensor]) -> dict[str, Memory]:
    """The inverse of `tensors_of`; other tensors are left alone."""
    names = sorted(name for name in tensors if name.startswith("basis."))
    retain = tensors["retain"].tolist() if names else []
    pairs = zip(names, retain, strict=True)
    return {name.removeprefix("basis."): Memory(tensors[name].cpu().clone(), kept) for name, kept in pairs}


def left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors `[d, d]`, the largest entry of each positive, and the singular values, in falling order."""
    left, values, _ = torch.linalg.svd(matrix)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    return left * torch.where(largest < 0, -1.0, 1.0), values
