"""KnOTS-TIES (Stoica et al., ICLR 2025, arXiv 2410.19735): TIES on task vectors in one basis for all tasks.

For every matrix, U S [V_1 ... V_T]^T is the singular value decomposition of all task vectors side by side. TIES acts on the
S V_i^T = U^T delta_i, where updates of low rank meet; U turns the result back. Trimming counts only directions whose singular
value is above 1e-5, as in the released code. The settings are those of `ties`; the released ones are density 0.2 over the
whole vector, the mean of what agrees, and for ViT-B a scale of 0.6 that was chosen on validation data. The released code
merges only the projections that LoRA adapted and adds a bias as a column; here TIES takes other tensors as they are.

U depends on all tasks, so it keeps every task vector: Theta(T n), with `--lora-rank` of the adapted weights alone.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.keeps_all import KeepsAll
from fastmerge.merging.spectral import check_finite
from fastmerge.merging.ties import ACCUMULATORS, Ties, divided

SUPPORTED = 1e-5  # the smallest singular value of a direction that counts (released code)


class Knots(KeepsAll, Ties):
    def _write(self, out: Tensor) -> Tensor:
        turned = list(self.kept["tasks"].clone())
        views, sizes, bases = [self.base.matrices(x) for x in turned], list(self.base.sizes), {}
        for k in views[0]:
            left = bases[k] = common(torch.cat([x[k] for x in views], 1), self.base.name(k))
            sizes[k] = left.shape[1] * views[0][k].shape[1]
            for x in views:
                inside = left.mT @ x[k].double()
                x[k].zero_()[: len(inside)].copy_(inside)
        merged = self.elected(turned, sizes)
        fk.axpy(self.base.theta, merged, self.settings.scale, out=out)
        initial, new, aligned = (self.base.matrices(x) for x in (self.base.theta, out, merged))
        for k, left in bases.items():
            new[k].copy_(initial[k] + self.settings.scale * left @ aligned[k][: left.shape[1]].double())
        return out

    def elected(self, turned: list[Tensor], sizes: list[int]) -> Tensor:
        """TIES of the vectors, `[n]`. sizes: the entries of each tensor that trimming counts."""
        state = [torch.zeros_like(self.base.theta) for _ in ACCUMULATORS]
        for x in turned:
            self.accumulate(state, x, None, sizes)
        return fk.ties_finalize(*divided(state, self.settings.merge), zero=self.settings.zero)


def common(side: Tensor, name: str) -> Tensor:
    """U, float64 `[rows, k]`, of the task vectors of the tensor `name` side by side, `[rows, T columns]`.

    Raises:
        NotFinite: they have NaN or inf.
    """
    check_finite(side, name)
    left, values, _ = torch.linalg.svd(side.double(), full_matrices=False)
    return left[:, : int((values > SUPPORTED).sum())]
