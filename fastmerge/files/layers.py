"""Values that change along the layers of a model: `0.2..0.5..0.9`, the gradients of mergekit.

The values are at equal distances from the first layer to the last, and linear between. A layer is the first whole number
between dots in a name; its place is number / (layers - 1) among the names with the same beginning, or 1 where it is the only
one. Names without a number have the first value. So does mergekit 0.1.5 (plan.py, architecture/auto.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYER = re.compile(r"\.(\d+)\.")
BETWEEN = ".."


@dataclass(frozen=True)
class Gradient:
    values: tuple[float, ...]

    def at(self, place: float) -> float:
        """The value at a place from 0, the first layer, to 1, the last."""
        scaled = place * (len(self.values) - 1)
        low = int(scaled)
        high, share = min(len(self.values) - 1, low + 1), scaled - low
        return (1 - share) * self.values[low] + share * self.values[high]


def places(names: Iterable[str]) -> dict[str, float]:
    """The place of every name in its model, 0 to 1."""
    found, layers = {}, dict[str, int]()
    for name in names:
        match = LAYER.search(name)
        beginning, number = (name[: match.start()], int(match[1])) if match else ("", -1)
        found[name] = beginning, number
        layers[beginning] = max(layers.get(beginning, 0), number + 1)

    def place(beginning: str, number: int) -> float:
        if number < 0:
            return 0.0
        return number / (layers[beginning] - 1) if layers[beginning] > 1 else 1.0

    return {name: place(*where) for name, where in found.items()}
