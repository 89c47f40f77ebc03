"""SCE, select, calculate, erase (FuseChat, Wan et al. 2024, arXiv 2408.07990): where models differ, weighed by their energy.

For every tensor: keep the share `density` of the entries whose variance over the models is largest (of those that is not
zero; with density 1 all entries); weigh each model by the sum of the squares it has left; keep of every entry the models with
the sign of the sum; take the mean with these weights. Where that selects no entry, as with one model or in a scalar, all
entries count; mergekit leaves such a tensor as it was. The rest is as in mergekit, whose default density is 1; the paper has
0.1.

The variance selects entries of all earlier models anew, so it keeps every task vector: Theta(T n).
"""

from __future__ import annotations

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.keeps_all import KeepsAll


class SCE(KeepsAll):
    groups = ("sce",)

    def _write(self, out: Tensor) -> Tensor:
        merged = torch.zeros_like(self.base.theta)
        for deltas, its in zip(self.base.tensors(self.kept["tasks"]), self.base.tensors(merged), strict=True):
            its.copy_(elected(deltas.double(), self.settings.density))
        return fk.axpy(self.base.theta, merged, 1.0, out=out)


def elected(deltas: Tensor, density: float) -> Tensor:
    """The merged task vector `[n]` of one tensor's task vectors `[T, n]`, float64."""
    variance = deltas.var(0, correction=0)
    count = int(density * int((variance > 0).sum()))
    if count and density < 1:  # with 1 also what all models agree on, whose variance is zero
        chosen = torch.zeros_like(variance)
        chosen[variance.topk(count).indices] = 1
        deltas = deltas * chosen
    energy = deltas.square().sum(1, keepdim=True)
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    weights = energy * (deltas * sign > 0)
    return (weights * deltas).sum(0) / weights.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
