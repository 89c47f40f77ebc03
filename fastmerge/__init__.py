"""fastmerge: continual learning by model merging, in one process, to one model. See `python -m fastmerge --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fastmerge.models.saved import Model

__version__ = "0.1.0"


def load(path: str | Path) -> Model:
    """Load the model of a finished run as an `nn.Module`; see `fastmerge.models.saved.load`."""
    from fastmerge.models.saved import load

    return load(path)
