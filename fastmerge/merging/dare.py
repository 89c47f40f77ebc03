"""DARE (Yu et al. 2024): drop task-vector entries with probability p, divide the rest by 1 - p; then average or TIES.

The defaults p = 0.1 and scale 1 follow the released merging code. A mask depends on (seed, model, position). If a
merged model represents the past (`--protocol running`, `strict`), every task drops more of its entries; mergekit's
issue 258 warns of this. After t tasks only a fraction (1 - p)^t of a task vector's entries survives, scaled by
1 / (1 - p)^t.
"""

from __future__ import annotations

from typing import Any

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Base, Rule
from fastmerge.merging.ties import Ties


class Dare(Rule):
    groups = ("dare",)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (total,) = self.zeros("total")
        fk.axpy(total, dropped(self, theta, self.settings.p), 1.0, out=total)

    def _write(self, out: Tensor) -> Tensor:
        return fk.axpy(self.base.theta, self.kept["total"], self.settings.scale / self.count, out=out)


class DareTies(Ties):
    """TIES on the task vectors after dropping. p is a setting of `dare`; the other settings are those of `ties`."""

    groups = ("dare", "ties")
    unread = ("dare.scale",)

    def __init__(self, base: Base, dare: Any, ties: Any):
        super().__init__(base, ties)
        self.p = dare.p

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        self.add(dropped(self, theta, self.p), None)


def dropped(rule: Rule, theta: Tensor, p: float) -> Tensor:
    """The task vector of `theta` after dropping, as a new tensor."""
    return fk.dare_delta(theta, p, initial=rule.base.theta, seed=rule.base.seed, subsequence=rule.fed)
