"""Model Stock (Jang et al. 2024) in O(T): theta_init + t * mean task vector; t from their mean cosine.

Each tensor has its own t. A negative mean cosine counts as 0, because the formula has no meaning there
(see `fastmerge_kernels.stock`).
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule


class ModelStock(Rule):
    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        total, units = self.zeros("total", "units")
        moved = fk.stock_update_(total, units, theta, initial=self.base.theta, segments=self.base.bounds)
        self.kept["moved"] = self.kept["moved"] + moved if "moved" in self.kept else moved

    def _write(self, out: Tensor) -> Tensor:
        return fk.stock_finalize(
            self.kept["total"],
            self.kept["units"],
            self.count,
            initial=self.base.theta,
            moved=self.kept["moved"],
            segments=self.base.bounds,
            out=out,
        )
