"""Fisher-weighted merging (Matena & Raffel 2022), CoFiMA and CoMA (Marouf et al. 2024).

    theta <- ((1 - lam) F theta + lam F_t theta_t) / F',   F' = (1 - lam) F + lam F_t;   plain interpolation where F' = 0

accumulate  lam    new F          meaning
sum         1/t    F' (the mean)  sum_t F_t theta_t / sum_t F_t, Fisher merging of all models
ema         set    F'             the recursion of CMM's merge
last        set    F_t            CoFiMA: only the last two Fishers, as released (CoFiMA issue 3)

CoMA is plain interpolation with lam. The released CoFiMA clamps its Fishers to at most 1e-4 and divides 0 by 0; we do
neither. The released Fisher merging (MergeLM) adds 1e-6 to every entry: `--fisher.floor`.
"""

from __future__ import annotations

import fastmerge_kernels as fk
from torch import Tensor

from fastmerge.merging.rule import Rule, WithMerged


class Fisher(WithMerged):
    """The merged model needs its Fisher, so `restart` and `forget` keep the Fisher."""

    groups = ("fisher",)
    needs_base = False
    needs_fisher = True

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        if fisher is None:
            raise ValueError("fisher: this rule needs the diagonal Fisher of every model, update(theta, fisher)")
        self.check_restarted()
        merged, kept = self.zeros("merged", "fisher")
        s = self.settings
        lam = 1.0 if self.count == 1 else 1 / self.count if s.accumulate == "sum" else s.lam
        fk.fisher_merge_(merged, kept, theta, fisher, lam)
        if s.accumulate == "last":
            kept.copy_(fisher)


class CoFiMA(Fisher):
    """Fisher merging with the settings of `cofima`."""

    groups = ("cofima",)
    unread = ("fisher.accumulate", "fisher.lam")


class CoMA(Rule):
    groups = ("coma",)
    needs_base = False

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (merged,) = self.zeros("merged")
        fk.lerp(merged, theta, 1.0 if self.count == 1 else self.settings.lam, out=merged)

    def _write(self, out: Tensor) -> Tensor:
        return out.copy_(self.kept["merged"])
