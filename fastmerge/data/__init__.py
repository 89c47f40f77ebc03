"""Data sets by name. Nothing is imported before it is asked for, and a user's files are only ever read."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

from fastmerge.data.dataset import Dataset, Split
from fastmerge.errors import UserError, nearest

__all__ = ["DATASETS", "Dataset", "Split", "load_dataset"]

# name -> "module:loader"; a loader is called with the root and those of load_dataset's options that it declares.
DATASETS: dict[str, str] = {
    "glyphs": "fastmerge.data.glyphs:load",
    "folder": "fastmerge.data.folder:load",
    "imagenet1k": "fastmerge.data.imagenet:load",
    "cifar100": "fastmerge.data.cifar:load_cifar100",
    "cifar10": "fastmerge.data.cifar:load_cifar10",
}


def load_dataset(
    name: str, root: str | None = None, *, download: bool = False, skip_bad_images: bool = False, **options: Any
) -> Dataset:
    """The data set `name` found under `root` (None: the data set brings its own data).

    download allows a data set that can be fetched to fetch itself into `root`. skip_bad_images: go on without
    unreadable images and count them, instead of stopping at the first. options: the loader's own keywords, such as
    `split_file` of `folder`; None means not given. Raises UserError for an unknown name, an option that this data set
    does not have, and data that are missing or damaged.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}.{nearest(name, DATASETS)} There are: {', '.join(DATASETS)}.")
    loader = pkgutil.resolve_name(DATASETS[name])
    known = set(inspect.signature(loader).parameters) - {"root"}
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        takes = f"it takes: {', '.join(sorted(known))}" if known else "it takes none"
        raise UserError(f"data set {name!r} has no option {', '.join(unknown)}; {takes}. Leave the option out.")
    # Not every data set can be downloaded or have bad files; these two flags are about the run, not about one data set.
    given |= {k: v for k, v in (("download", download), ("skip_bad_images", skip_bad_images)) if k in known}
    return loader(root, **given)
