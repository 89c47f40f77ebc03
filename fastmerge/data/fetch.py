"""Downloads a data set through torchvision, where its loader there can still do so."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fastmerge.data.benchmark import Benchmark
from fastmerge.data.dataset import Dataset
from fastmerge.errors import UserError


def torchvision_download(name: str, root: str | None, fetch: Callable[[str], Any]) -> None:
    """Call `fetch(folder)` on the existing or new folder `root`. Raises UserError if it fails."""
    if root is None:
        return  # the loader says that it needs a folder
    root = os.path.expanduser(root)
    try:
        os.makedirs(root, exist_ok=True)
        fetch(root)
    except (RuntimeError, OSError, EOFError) as error:  # URLError is an OSError
        raise UserError(
            f"data set {name!r}: the download into {root} failed: {error}. Fetch and unpack it by hand, or try again."
        ) from error


def load(
    benchmark: Benchmark, fetch: Callable[[str], Any], root: str | None, download: bool, **options: Any
) -> Dataset:
    """`benchmark.load`, after a download if it is allowed and no layout is found."""
    if download:
        try:
            benchmark.find(os.path.expanduser(root or ""))
        except UserError:
            torchvision_download(benchmark.name, root, fetch)
    return benchmark.load(root, **options)
