"""TIES (Yadav et al. 2023): trim task vectors to their largest entries, elect a sign per entry, average what agrees.

Four accumulators are enough for any number of tasks. The defaults follow the paper: density 0.2, trimming over the
whole vector, the majority sign at exactly zero mass, and scale 1 (no validation set; MagMax's code uses 0.55).
`--ties.scope tensor` trims every tensor separately, as mergekit and peft do. `--ties.keep "at least"` keeps all entries
tied at the threshold, as in the released code (which also keeps one more entry). `--ties.merge sum` adds what agrees in
place of its average (released code: dis-sum; mergekit: normalize false). Padding is not counted.
"""

from __future__ import annotations

from typing import ClassVar

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.rule import Rule

ACCUMULATORS = ("positive", "negative", "positive_count", "negative_count")


class Ties(Rule):
    groups: ClassVar[tuple[str, ...]] = ("ties",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        self.add(theta, self.base.theta)

    def add(self, theta: Tensor, initial: Tensor | None) -> None:
        """Trim and accumulate theta - initial."""
        self.accumulate(self.zeros(*ACCUMULATORS), theta, initial, self.base.sizes)

    def accumulate(self, state: list[Tensor], theta: Tensor, initial: Tensor | None, sizes: list[int]) -> None:
        """Trim theta - initial and add it to `state`. sizes: the entries of each tensor of which trimming takes a share."""
        s, bounds = self.settings, self.base.bounds
        if s.scope == "global":
            (bounds, _), sizes = self.base.whole(), [sum(sizes)]
        counts = [min(n, max(1, int(s.density * n))) for n in sizes]
        limits, cut = fk.magnitude_threshold(theta, counts, initial=initial, segments=bounds, keep=s.keep)
        positive, negative, positives, negatives = state
        fk.ties_update_(
            positive, negative, positives, negatives, theta, initial=initial, threshold=limits, cut=cut, segments=bounds
        )

    def _write(self, out: Tensor) -> Tensor:
        state = divided([self.kept[name] for name in ACCUMULATORS], self.settings.merge)
        return fk.ties_finalize(
            *state, initial=self.base.theta, scale=self.settings.scale, zero=self.settings.zero, out=out
        )


def divided(state: list[Tensor], merge: str) -> list[Tensor]:
    """The accumulators with the divisors that `merge` takes: how many agree for the mean, 1 for the sum."""
    if merge == "mean":
        return state
    ones = torch.ones_like(state[0])
    return [*state[:2], ones, ones]
