"""RegMean (Jin et al., ICLR 2023, arXiv 2212.09849): the weights whose outputs are nearest to those of all models.

For a linear layer with inputs X_i of model i and G_i = X_i^T X_i, least squares give

    W^T = (sum_i G_i)^-1 sum_i G_i W_i^T,   off-diagonal entries of G_i multiplied by alpha      (eq. 2; section 3.2)

and all other tensors are averaged. One model at a time, with G the sum over the earlier ones:
W^T <- W^T + (G + G_t)^-1 G_t (W_t^T - W^T), G <- G + G_t, solved in float64. So it keeps the merged model and one G per
layer. Weights of inputs that are zero in all images are averaged. As in the released code alpha is 0.9, and G is a mean
over the data of a task, so tasks of any size count alike.

With alpha below 1 the sum of the G_i has an inverse. With alpha 1 it may have none, such as after fewer images than inputs.
Then its pseudo-inverse takes its place, which leaves out eigenvalues below n eps times the largest (n inputs, eps of fp32).
In these directions, about which no image says anything, the result is the average. The released code inverts the sum as it
is.
"""

from __future__ import annotations

from typing import Any

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.rule import WithMerged
from fastmerge.merging.spectral import EPSILON, NotFinite

Moments = dict[int, tuple[int, Tensor]]  # number of the tensor -> (dimension of its input, G `[in, in]` fp32)


class RegMean(WithMerged):
    """kept: `merged` `[n]`, and `gram.K` `[in, in]` of every linear layer. `restart` and `forget` keep these sums."""

    groups = ("regmean",)
    needs_base = False
    needs_moments = True

    def _take(self, theta: Tensor, moments: Any) -> None:
        if moments is None:
            raise ValueError(
                "regmean: this rule needs the second moments of the inputs of every model, update(theta, moments)"
            )
        self.check_restarted()
        (merged,) = self.zeros("merged")
        before = self.base.matrices(merged.clone())
        fk.lerp(merged, theta, 1.0 if self.count == 1 else 1 / self.count, out=merged)
        mean, new = self.base.matrices(merged), self.base.matrices(theta)
        for k, (axis, moment) in moments.items():
            gram = moment * self.settings.alpha
            gram.diagonal().copy_(moment.diagonal())
            total = self.kept.get(f"gram.{k}", torch.zeros_like(gram)) + gram
            self.kept[f"gram.{k}"] = total
            if self.count > 1:
                old, its, out = (x[k] if axis == 1 else x[k].mT for x in (before, new, mean))
                if not bool(total.isfinite().all()):
                    raise NotFinite(
                        f"{self.base.name(k)}: the second moments of its inputs have NaN or inf; compute them again"
                    )
                out.copy_(nearest(old, its, gram, total, out, self.settings.alpha))


def nearest(old: Tensor, new: Tensor, gram: Tensor, total: Tensor, mean: Tensor, alpha: float) -> Tensor:
    """W `[rows, in]` float64. gram: of the new model; total: of all, the new one included; mean: `[rows, in]`, where no image
    says anything. alpha: with which the off-diagonal entries of both were multiplied."""
    total, dead = total.double(), total.diagonal() == 0
    change, cut = gram.double() @ (new.double() - old.double()).mT, EPSILON * len(total)
    if 1 - alpha > cut:  # no eigenvalue is below 1 - alpha once the diagonal is scaled to ones
        step, failed = torch.linalg.solve_ex(total + torch.diag(dead.double()), change)
        if not int(failed):
            return torch.where(dead, mean.double(), old.double() + step.mT)
    inverse = torch.linalg.pinv(total, rtol=cut, hermitian=True)
    found = old.double() + (inverse @ change).mT
    return mean.double() + (found - mean.double()) @ (inverse @ total)
