"""TSV-Merge, task singular vectors (Gargiulo et al., CVPR 2025, arXiv 2412.00081): low rank, then without interference.

    matrices:       theta_init + scale * P_U diag(S_1, ..., S_T) P_V,   P_U, P_V the nearest orthogonal matrices to
                    [U_1 ... U_T] and [V_1 ... V_T]^T, each task with its first floor(m / T) singular vectors, at least 1
    other tensors:  theta_init + scale * mean of the task vectors

m is the smaller side of the matrix. T x m / T directions are at most m, so it keeps Theta(n) for any number of tasks: with
every new task the old ones lose their last directions, as in the batch formula. The scale is 1 as in the paper. Directions
whose singular value is zero take no part; in the released code they turn the others.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.rule import Rule
from fastmerge.merging.spectral import orthogonal, singular


class TSV(Rule):
    """kept: the mean task vector `[n]`, and of every matrix `u.K` `[t, rows, d]`, `s.K` `[t, d]`, `v.K` `[t, d, columns]`
    for t models with d directions each."""

    groups = ("tsv",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        delta = fk.axpy(theta, self.base.theta, -1.0)
        (mean,) = self.zeros("mean")
        fk.lerp(mean, delta, 1 / self.count, out=mean)
        for k, matrix in self.base.matrices(delta).items():
            (rows, columns), size = matrix.shape, max(1, min(matrix.shape) // self.count)
            new = [delta.new_zeros(1, rows, size), delta.new_zeros(1, size), delta.new_zeros(1, size, columns)]
            left, values, right = singular(matrix, self.base.name(k))
            found = min(size, len(values))
            new[0][0, :, :found], new[1][0, :found], new[2][0, :found] = left[:, :found], values[:found], right[:found]
            for name, mine in zip("usv", new, strict=True):
                if (old := self.kept.get(f"{name}.{k}")) is not None:
                    mine = torch.cat([old[:, :, :size] if name == "u" else old[:, :size], mine])
                self.kept[f"{name}.{k}"] = mine

    def _write(self, out: Tensor) -> Tensor:
        scale = self.settings.scale
        fk.axpy(self.base.theta, self.kept["mean"], scale, out=out)
        initial, merged = self.base.matrices(self.base.theta), self.base.matrices(out)
        for k in merged:
            left, values, right = (self.kept[f"{name}.{k}"].double() for name in "usv")
            if values.any():
                name = self.base.name(k)
                left, right = orthogonal(torch.cat(list(left), 1), name), orthogonal(torch.cat(list(right)), name)
                merged[k].copy_(initial[k] + scale * (left * values.flatten()) @ right)
        return out
