"""What a report says of one tensor: norm, cosine to every input, sign conflicts, share of changed entries. Sums are
float64."""

from __future__ import annotations

from typing import Any

import torch

from fastmerge.files.rules import Part


class Measure:
    """Task vectors are differences from the base, or the weights themselves where the rule has no base."""

    def __init__(self, models: int):
        self.dots, self.squares = torch.zeros(models, dtype=torch.float64), torch.zeros(models, dtype=torch.float64)
        self.square, self.conflicts, self.changed, self.count = 0.0, 0, 0, 0

    def add(self, part: Part) -> None:
        based = part.base is not part.models[0]
        base = part.base.double() if based else torch.zeros(part.out.numel(), dtype=torch.float64)
        merged = part.out.double() - base
        up = torch.zeros(merged.numel(), dtype=torch.bool)
        down = torch.zeros_like(up)
        for k, model in enumerate(part.models):
            delta = model.double() - base
            self.dots[k] += delta @ merged
            self.squares[k] += delta @ delta
            up |= delta > 0
            down |= delta < 0
        self.square += float(merged @ merged)
        self.conflicts += int((up & down).sum())
        self.changed += int((merged != 0).sum())
        self.count += merged.numel()

    def values(self) -> dict[str, Any]:
        """norm: of the merged task vector. cosines: to every model's. conflicts: share of entries where task vectors
        have both signs. changed: share of entries that the merge changes."""
        norms = (self.squares * self.square).sqrt()
        cosines = torch.where(norms > 0, self.dots / norms, 0.0)
        return {
            "norm": self.square**0.5,
            "cosines": [round(c, 6) for c in cosines.tolist()],
            "conflicts": self.conflicts / max(1, self.count),
            "changed": self.changed / max(1, self.count),
        }
