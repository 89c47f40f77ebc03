"""The exponential moving average of the models (Dziadzio et al., CVPR 2025, TIME, arXiv 2412.06712):

    theta <- (1 - weight) theta + weight theta_t,   theta_init at the start

The paper finds it the best choice for both where training starts and what is deployed. It begins at the zero-shot weights,
so the first model is averaged too; from the first model on it would be CoMA (`merging/fisher.py`). We found no released
code, so where the average begins and its weight are our reading.
"""

from __future__ import annotations

from typing import ClassVar

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import WithMerged


class EMA(WithMerged):
    """It reads theta_init before the first model alone, and `restart` replaces it."""

    groups: ClassVar[tuple[str, ...]] = ("ema",)
    needs_base = False
    begins_at_base = True

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        self.check_restarted()
        if self.empty:
            self.restart(self.base.theta)
        fk.lerp(self.kept["merged"], theta, self.settings.weight, out=self.kept["merged"])
