"""Data sets by name. A loader is imported on first use. A user's files are only read, never changed."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

from fastmerge.data.dataset import Dataset, Split
from fastmerge.errors import UserError, nearest

__all__ = ["DATASETS", "Dataset", "Split", "load_dataset"]

# name -> "module:loader"; a loader takes the root and declares the options of load_dataset that it accepts.
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
    """Load the data set `name` from `root` (None for a data set that needs no files).

    download: let a data set that can be downloaded fetch itself into `root`. skip_bad_images: skip and count
    unreadable images instead of stopping at the first one. options: keywords of the loader, such as `split_file` of
    `folder`; None means not given. Raises UserError for an unknown name, an option that this data set does not have,
    and missing or damaged data.
    """
    known = options_of(name)
    loader = pkgutil.resolve_name(DATASETS[name])
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        takes = f"it takes: {', '.join(sorted(known))}" if known else "it takes none"
        raise UserError(f"data set {name!r} has no option {', '.join(unknown)}; {takes}. Leave the option out.")
    # Not every data set can be downloaded or have bad files; these two flags belong to the run, not to one data set.
    given |= {k: v for k, v in (("download", download), ("skip_bad_images", skip_bad_images)) if k in known}
    return loader(root, **given)


def options_of(name: str) -> set[str]:
    """The options that the loader of the data set takes. Raises UserError for an unknown name."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}.{nearest(name, DATASETS)} There are: {', '.join(DATASETS)}.")
    return set(inspect.signature(pkgutil.resolve_name(DATASETS[name])).parameters) - {"root"}
