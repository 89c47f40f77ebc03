"""RandMix (a baseline of the MagMax paper): every entry comes from one of the models, all equally likely.

The t-th model replaces each entry with probability 1 / t, drawn by position, so only the current mix is kept.
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
