"""Iso-C, isotropic merging in the common subspace (Marczak et al. 2025, arXiv 2502.04959): equal singular values.

    matrices:        theta_init + scale * mean(S) U V^T,   U S V^T = sum of the task vectors   (eq. 7)
    other tensors:   theta_init + scale * mean of the task vectors

The sum is enough, so it keeps Theta(n). The paper chooses the scale on validation data for every number of tasks; the
default is 1. The mean is over the singular values that are not zero; the released code takes all, and so raises directions
that are rounding noise where the rank is below the size, as with LoRA.
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule
from fastmerge.merging.spectral import singular


class IsoC(Rule):
    groups = ("iso_c",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (total,) = self.zeros("total")
        fk.weighted_sum([theta, self.base.theta, total], [1.0, -1.0, 1.0], out=total)

    def _write(self, out: Tensor) -> Tensor:
        total, scale = self.kept["total"], self.settings.scale
        fk.axpy(self.base.theta, total, scale / self.count, out=out)
        initial, merged = self.base.matrices(self.base.theta), self.base.matrices(out)
        for k, matrix in self.base.matrices(total).items():
            left, values, right = singular(matrix, self.base.name(k))
            if len(values):
                merged[k].copy_(initial[k] + scale * values.mean() * (left @ right))
        return out
