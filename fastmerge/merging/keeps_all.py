"""Rules whose formula needs all models at once: they keep every task vector, Theta(T n)."""

from __future__ import annotations

from typing import Any

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.rule import Rule


class KeepsAll(Rule):
    """kept: `tasks` `[T, n]`, the task vectors, or with `needs_base` False the models."""

    def _take(self, theta: Tensor, about: Any) -> None:
        new = fk.axpy(theta, self.base.theta, -1.0) if self.needs_base else theta.clone()
        self.kept["tasks"] = torch.cat([self.kept["tasks"], new[None]]) if "tasks" in self.kept else new[None]
