"""Downloads a data set through torchvision, where its loader there can still do so."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Downloadable(Benchmark):
    """A benchmark that torchvision can download. source: the name of its class in `torchvision.datasets`. parts: keywords
    of that class, one call for each."""

    source: str = field(kw_only=True)
    parts: tuple[dict[str, Any], ...] = field(kw_only=True, default=({},))

    def load(
        self,
        root: str | None,
        *,
        download: bool = False,
        split_file: str | None = None,
        test_part: str | None = None,
        skip_bad_images: bool = False,
    ) -> Dataset:
        """See Benchmark.load. download: fetch the images into `root` if no layout is found there."""
        if download:
            try:
                self.find(os.path.expanduser(root or ""))
            except UserError:
                torchvision_download(self.name, root, self._fetch)
        return super().load(root, split_file=split_file, test_part=test_part, skip_bad_images=skip_bad_images)

    def _fetch(self, folder: str) -> None:
        from torchvision import datasets

        for options in self.parts:
            getattr(datasets, self.source)(folder, download=True, **options)
