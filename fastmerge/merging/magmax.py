"""MagMax, also "MaxAbs" (Marczak et al. 2024): theta_init + scale * the task-vector entry of largest magnitude.

As in the released code, the defaults for both sequential and independent training are scale 0.5 and ties to the later
model.
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule


class MagMax(Rule):
    groups = ("magmax",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (largest,) = self.zeros("largest")
        if self.settings.ties == "later":
            fk.magmax_update_(largest, theta, initial=self.base.theta)
        else:  # in a tie the op keeps its second argument, so swap the two
            new = fk.axpy(theta, self.base.theta, -1.0)
            self.kept["largest"] = fk.magmax_update_(new, largest)

    def _write(self, out: Tensor) -> Tensor:
        return fk.axpy(self.base.theta, self.kept["largest"], self.settings.scale, out=out)
