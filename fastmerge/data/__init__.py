"""Data sets by name. A loader is imported on first use. A user's files are only read, never changed."""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import replace
from typing import Any

from fastmerge.data import prompts
from fastmerge.data.class_names import from_file
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
    "imagenet-r": "fastmerge.data.imagenet_r:IMAGENET_R.load",
    "imagenet-a": "fastmerge.data.imagenet_a:IMAGENET_A.load",
    "cub200": "fastmerge.data.cub:CUB.load",
    "cars": "fastmerge.data.cars:CARS.load",
    "domainnet": "fastmerge.data.domainnet:DOMAINNET.load",
    "office31": "fastmerge.data.office:OFFICE31.load",
    "office-home": "fastmerge.data.office:OFFICE_HOME.load",
    "pacs": "fastmerge.data.pacs:PACS.load",
    "tiny-imagenet": "fastmerge.data.tiny_imagenet:TINY_IMAGENET.load",
}


def load_dataset(
    name: str,
    root: str | None = None,
    *,
    download: bool = False,
    skip_bad_images: bool = False,
    template: str | None = None,
    class_names: str | None = None,
    **options: Any,
) -> Dataset:
    """Load the data set `name` from `root` (None for a data set that needs no files).

    download: let a data set that can be downloaded fetch itself into `root`. skip_bad_images: skip and count
    unreadable images instead of stopping at the first one. template: prompt templates in place of the data set's own
    (prompts.py). class_names: a file of names in place of the data set's own (class_names.py). options: keywords of the
    loader, such as `split_file` of `folder`; None means not given. Raises UserError for an unknown name, an option that
    this data set does not have, and missing or damaged data.
    """
    known = options_of(name)
    loader = pkgutil.resolve_name(DATASETS[name])
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        takes = f"it takes: {', '.join(sorted(known))}" if known else "it takes none"
        raise UserError(f"data set {name!r} has no option {', '.join(unknown)}; {takes}. Leave the option out.")
    # Not every data set can be downloaded or have bad files; these two flags belong to the run, not to one data set.
    given |= {k: v for k, v in (("download", download), ("skip_bad_images", skip_bad_images)) if k in known}
    dataset = loader(root, **given)
    if class_names is not None:
        dataset = replace(dataset, class_names=from_file(class_names, dataset.class_names, dataset.keys))
    if template is not None:
        dataset = replace(dataset, templates=prompts.templates(template))
    return dataset


def options_of(name: str) -> set[str]:
    """The options that the loader of the data set takes. Raises UserError for an unknown name."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}.{nearest(name, DATASETS)} There are: {', '.join(DATASETS)}.")
    return set(inspect.signature(pkgutil.resolve_name(DATASETS[name])).parameters) - {"root"}
