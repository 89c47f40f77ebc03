"""DARE (Yu et al. 2024): drop entries of a task vector with probability p, divide the rest by 1 - p; then average, or TIES.

p 0.1 and scale 1 as in the released code's merging. Masks are functions of (seed, model, position). Where a merged model
stands in for the past (`--protocol running`, `strict`), it is thinned out again at every task, which mergekit's issue 258
warns of: after t tasks only a fraction (1 - p)^t of a task vector's entries survives, each scaled up by 1 / (1 - p)^t.
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
    """The thinned task vectors merged by TIES with the settings of `ties`; p is `dare`'s."""

    groups = ("dare", "ties")

    def __init__(self, base: Base, dare: Any, ties: Any):
        super().__init__(base, ties)
        self.p = dare.p

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        self.add(dropped(self, theta, self.p), None)


def dropped(rule: Rule, theta: Tensor, p: float) -> Tensor:
    """The task vector of `theta` after dropping, new."""
    return fk.dare_delta(theta, p, initial=rule.base.theta, seed=rule.base.seed, subsequence=rule.fed)
