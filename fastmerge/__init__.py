"""fastmerge: continual learning by model merging, in one process, to one model. See `python -m fastmerge --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from torch import Tensor

    from fastmerge.data.dataset import Dataset
    from fastmerge.models.saved import Model

__version__ = "0.1.0"


def load(path: str | Path) -> Model:
    """Load the model of a finished run as an `nn.Module`; see `fastmerge.models.saved.load`."""
    from fastmerge.models.saved import load

    return load(path)


def merge(models: list[Any], rule: str, **options: Any) -> dict[str, Tensor]:
    """Merge checkpoints, paths or state dicts, by a rule; see `fastmerge.files.merge.merge`."""
    from fastmerge.files.merge import merge

    return merge(models, rule, **options)


def register_dataset(name: str, loader: Callable[..., Dataset]) -> None:
    """Make `loader` known as `--dataset name`; see `fastmerge.data.register_dataset`."""
    from fastmerge.data import register_dataset

    register_dataset(name, loader)
