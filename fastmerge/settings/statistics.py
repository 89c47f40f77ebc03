"""Settings of the methods that keep statistics of features."""

from __future__ import annotations

from dataclasses import dataclass

from fastmerge.declaration import setting


@dataclass
class RanPACSettings:
    projection: int = setting(
        10000,
        "M, the number of random features. The Gram matrix has M x M numbers.",
        tiny=1000,
        at_least=1,
        largest=100_000,
        source="paper",
    )
