"""OPCM, orthogonal projection for continual merging (Tang et al. 2025, arXiv 2501.09522): one model after the other.

    tau <- (lam tau + P(delta_t)) / lam_t,   lam_t = ||lam tau + P(delta_t)|| / mean_i ||delta_i||,   theta = theta_init + tau

P acts on matrices: in the basis of the singular vectors U, V of tau it removes the diagonal of U^T delta V, and its leading
block, of as many directions as have at most the share `alpha` of the sum of tau's singular values. So the merged task vector
always has the mean norm of those it was made of. As in the released code (fusion_bench) with alpha 0.5; but P acts on all
tensors with two dimensions, the released one on the weights of nn.Linear, and directions whose singular value is zero are
left alone.

It is sequential by definition and keeps tau, lam and the sum of norms, so `--protocol running` equals `full`.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.rule import WithMerged
from fastmerge.merging.spectral import check_finite, singular


class OPCM(WithMerged):
    """kept: `merged` `[n]`, tau; `sizes` `[2]` float64: lam, and the sum of the task vectors' norms. `forget` keeps `sizes`
    and the number of models."""

    groups = ("opcm",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        self.check_restarted()
        delta = fk.axpy(theta, self.base.theta, -1.0)
        norm = delta.double().norm()
        if self.count == 1:
            self.kept = {"merged": delta, "sizes": torch.stack([torch.ones_like(norm), norm])}
            return
        merged, (lam, norms) = self.kept["merged"], self.kept["sizes"]
        new = self.base.matrices(delta)
        for k, matrix in self.base.matrices(merged).items():
            new[k].copy_(projected(new[k], matrix, self.settings.alpha, self.base.name(k)))
        total = fk.axpy(delta, merged, lam.float())
        size, mean = total.double().norm(), (norms + norm) / self.count
        lam = torch.where((size > 0) & (mean > 0), size / mean, 1.0)
        self.kept = {"merged": total / lam.float(), "sizes": torch.stack([lam, norms + norm])}

    def _write(self, out: Tensor) -> Tensor:
        return fk.axpy(self.base.theta, self.kept["merged"], 1.0, out=out)

    def restart(self, theta: Tensor) -> None:
        self.kept["merged"] = fk.axpy(theta, self.base.theta, -1.0)


def projected(delta: Tensor, merged: Tensor, alpha: float, name: str) -> Tensor:
    """P(delta), float64 `[rows, columns]`. name: of the tensor.

    Raises:
        NotFinite: one of them has NaN or inf.
    """
    check_finite(delta, name)
    left, values, right = singular(merged, name)
    leading = int((values.cumsum(0) <= alpha * values.sum()).sum())
    inside = left.mT @ delta.double() @ right.mT
    removed = torch.diag(inside.diagonal())
    removed[:leading, :leading] = inside[:leading, :leading]
    return delta.double() - left @ removed @ right
