"""Model Breadcrumbs (Davari & Belilovsky 2024, arXiv 2312.06795): without the small entries and without the outliers.

    theta_init + scale * sum of the masked task vectors; of each tensor the largest share `gamma` is dropped, of the rest the
    largest share `density` is kept

As in mergekit, which has density and gamma; the paper names the two thresholds beta and gamma as percentiles. The defaults
keep what is between the smallest 85 % and the largest 1 %. Where density + gamma is above 1, density holds and fewer
outliers are dropped; with density 1 none. The sum is enough, so it keeps Theta(n).
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule


class Breadcrumbs(Rule):
    groups = ("breadcrumbs",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (total,) = self.zeros("total")
        delta, s = fk.axpy(theta, self.base.theta, -1.0), self.settings
        for mine, out in zip(self.base.tensors(delta), self.base.tensors(total), strict=True):
            kept = int(s.density * len(mine))
            outliers = min(int(s.gamma * len(mine)), len(mine) - kept)
            order = mine.abs().topk(outliers + kept).indices[outliers:]
            out[order] += mine[order]

    def _write(self, out: Tensor) -> Tensor:
        return fk.axpy(self.base.theta, self.kept["total"], self.settings.scale, out=out)
