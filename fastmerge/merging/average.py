"""Weight averaging, the uniform soup (Wortsman et al. 2022, "Model soups"): the running mean of the models."""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule


class Average(Rule):
    needs_base = False

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (mean,) = self.zeros("mean")
        fk.lerp(mean, theta, 1 / self.count, out=mean)

    def _write(self, out: Tensor) -> Tensor:
        return out.copy_(self.kept["mean"])
