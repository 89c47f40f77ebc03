"""RandMix: every entry from one of the models, each equally likely (a baseline of the MagMax paper).

As a stream: the t-th model takes over a fraction 1 / t of the entries, drawn by position, so no two models are held at once.
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule


class RandomMix(Rule):
    needs_base = False

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (mixed,) = self.zeros("mixed")
        fk.random_replace_(mixed, theta, 1 / self.count, seed=self.base.seed, subsequence=self.fed)

    def _write(self, out: Tensor) -> Tensor:
        return out.copy_(self.kept["mixed"])
