"""Task arithmetic (Ilharco et al. 2023): theta_init + scale * sum of the task vectors; default scale 0.4 as released.

The scale does not shrink with the number of tasks T, so choose it for T: 1 / T gives the average.
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule


class TaskArithmetic(Rule):
    groups = ("task_arithmetic",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (total,) = self.zeros("total")
        fk.weighted_sum([theta, self.base.theta, total], [1.0, -1.0, 1.0], out=total)

    def _write(self, out: Tensor) -> Tensor:
        return fk.axpy(self.base.theta, self.kept["total"], self.settings.scale, out=out)
