"""WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning"): (1 - alpha) theta_init + alpha theta_T.

theta_T is the last model; earlier models have no influence.
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule


class WiseFT(Rule):
    groups = ("wise_ft",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (last,) = self.zeros("last")
        last.copy_(theta)

    def _write(self, out: Tensor) -> Tensor:
        return fk.lerp(self.base.theta, self.kept["last"], self.settings.alpha, out=out)
