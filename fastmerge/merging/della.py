"""DELLA (Deep, Bhardwaj & Poria 2024, arXiv 2406.11617): DARE that drops large entries of a task vector less often.

MagPrune: of n entries of a row in the order of their magnitudes, the i-th (i = 0, ..., n - 1) is dropped with probability

    p_i = p + epsilon - 2 epsilon i / (n - 1)

and is divided by 1 - p_i otherwise. `della-linear` averages the task vectors; `della` elects a sign per entry and averages
what has it, as TIES does. A row has the weights of one output; a vector is one row; a row of one entry takes p.

`epsilon` is as in mergekit, half the range of p_i; the paper's epsilon is the range. As in mergekit both ends are reached and
the sign at exactly zero mass is positive. `--della.rescale norm` is mergekit's way: one factor for what is left of a tensor,
so that its L1 norm stays. Different from mergekit: `della-linear` averages, as `dare` does; a filter of a convolution is one
row; of equal magnitudes the later one ranks higher; a draw is a function of (seed, model, position), a multiple of 2^-16.
Four accumulators (`della`) or one (`della-linear`) are enough for any number of tasks. `--protocol strict` drops again from
what the past has left, see dare.py.
"""

from __future__ import annotations

from typing import Any

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.merging.rule import Rule
from fastmerge.merging.ties import ACCUMULATORS

BITS = 16  # of a random number


def check_probabilities(p: float, epsilon: float, where: str) -> None:
    """Raise UserError unless p - epsilon to p + epsilon are probabilities below 1."""
    if p - epsilon < 0 or p + epsilon >= 1:
        raise UserError(
            f"{where}: entries are dropped with probabilities from p - epsilon to p + epsilon; expected 0 or more, and below "
            "1. A smaller epsilon is always possible"
        )


class DellaLinear(Rule):
    groups = ("della",)

    @classmethod
    def check(cls, settings: Any) -> None:
        where = f"--della.p {settings.p} and --della.epsilon {settings.epsilon}"
        check_probabilities(settings.p, settings.epsilon, where)

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (total,) = self.zeros("total")
        fk.axpy(total, self.pruned(theta), 1.0, out=total)

    def _write(self, out: Tensor) -> Tensor:
        return fk.axpy(self.base.theta, self.kept["total"], self.settings.scale / self.count, out=out)

    def pruned(self, theta: Tensor) -> Tensor:
        """The task vector of `theta` after dropping, as a new tensor `[n]`."""
        base, s = self.base, self.settings
        delta = fk.axpy(theta, base.theta, -1.0)
        draws = base.tensors(uniform(delta, base.seed, self.fed, base.position))
        tensors = base.tensors(delta)
        if s.scope == "global":
            parts = [magpruned(torch.cat(tensors)[None], torch.cat(draws)[None], s)[0]]
            parts = list(parts[0].split([len(x) for x in tensors]))
        else:
            shapes = [shape for shape, size in zip(base.shapes, base.sizes, strict=True) if size]
            rows = [shape[0] if s.scope == "row" and len(shape) > 1 else 1 for shape in shapes]
            parts = [
                magpruned(x.view(k, -1), u.view(k, -1), s).view(-1)
                for x, u, k in zip(tensors, draws, rows, strict=True)
            ]
        for mine, new in zip(tensors, parts, strict=True):
            mine.copy_(new)
        return delta


class Della(DellaLinear):
    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        positive, negative, positives, negatives = self.zeros(*ACCUMULATORS)
        fk.ties_update_(positive, negative, positives, negatives, self.pruned(theta))

    def _write(self, out: Tensor) -> Tensor:
        state = (self.kept[name] for name in ACCUMULATORS)
        return fk.ties_finalize(*state, initial=self.base.theta, scale=self.settings.scale, zero="positive", out=out)


def magpruned(delta: Tensor, draws: Tensor, settings: Any) -> Tensor:
    """MagPrune of the rows of `delta` `[rows, n]`, a new tensor. draws: in [0, 1), `[rows, n]`; an entry is dropped where its
    draw is below its probability."""
    n, s = delta.shape[1], settings
    places = delta.abs().argsort(dim=1, stable=True).argsort(dim=1)
    drop = s.p + s.epsilon * (1 - 2 * places / (n - 1)) if n > 1 else torch.full_like(delta, s.p)
    kept = torch.where(draws < drop, 0.0, delta)
    if s.rescale == "probability":
        return kept / (1 - drop)
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept * torch.where(after > 0, before / after, 1.0)


def uniform(like: Tensor, seed: int, subsequence: int, position: int = 0) -> Tensor:
    """Numbers in [0, 1) by position, `[n]` fp32: BITS times every entry is halved, and 1/2 is added to half of them."""
    draws = torch.zeros_like(like)
    for bit in range(BITS):
        draws /= 2
        fk.random_replace_(draws, draws + 0.5, 0.5, seed=seed, subsequence=BITS * subsequence + bit, offset=position)
    return draws
