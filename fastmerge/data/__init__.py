"""Data sets by name. A loader is imported on first use. A user's files are only read, never changed."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastmerge.data import prompts
from fastmerge.data.class_names import from_file
from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.own import called, check_loader, imported, make_dataset
from fastmerge.errors import UserError, nearest

__all__ = ["DATASETS", "Dataset", "Split", "load_dataset", "make_dataset", "register_dataset"]

# name -> "module:loader", or a loader (own.py). A loader takes the root first, and declares the options of load_dataset
# that it accepts.
DATASETS: dict[str, str | Callable[..., Dataset]] = {
    "glyphs": "fastmerge.data.glyphs:load",
    "glyphs-hard": "fastmerge.data.glyphs_hard:load",
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
    "mnist": "fastmerge.data.digits:load_mnist",
    "svhn": "fastmerge.data.digits:load_svhn",
    "eurosat": "fastmerge.data.aerial:EUROSAT.load",
    "resisc45": "fastmerge.data.aerial:RESISC45.load",
    "sun397": "fastmerge.data.sun:SUN397.load",
    "dtd": "fastmerge.data.dtd:DTD.load",
    "gtsrb": "fastmerge.data.gtsrb:GTSRB.load",
    "huggingface": "fastmerge.data.huggingface:load",
    "webdataset": "fastmerge.data.webdataset:load",
}


def register_dataset(name: str, loader: Callable[..., Dataset]) -> None:
    """Make `loader` known as `--dataset name` in this process.

    loader(root, **options) returns a `Dataset` (`make_dataset` makes one); root is what `--data-root` gives, or None.
    Parameters called download, skip_bad_images, split_file or test_part get the values of these flags. A loader may be
    registered again; raises UserError for a name of fastmerge's own, a name with a colon or blanks, or no callable.
    """
    if isinstance(DATASETS.get(name), str):
        raise UserError(f"register_dataset: {name!r} is a data set of fastmerge; choose another name.")
    if not name or ":" in name or name.split() != [name]:
        raise UserError(f"register_dataset: {name!r} is no name; expected one word without a colon.")
    check_loader(name, loader)
    DATASETS[name] = loader


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
    loader, known = loader_of(name), options_of(name)
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        takes = f"it takes: {', '.join(sorted(known))}" if known else "it takes none"
        raise UserError(
            f"data set {name!r} has no option {', '.join(unknown)} (--{unknown[0].replace('_', '-')}); {takes}. Leave it out."
        )
    # Not every data set can be downloaded or have bad files; these two flags belong to the run, not to one data set.
    given |= {k: v for k, v in (("download", download), ("skip_bad_images", skip_bad_images)) if k in known}
    own = name not in DATASETS or callable(DATASETS[name])
    dataset = called(name, loader, root, given) if own else loader(root, **given)
    if class_names is not None:
        dataset = replace(dataset, class_names=from_file(class_names, dataset.class_names, dataset.keys))
    if template is not None:
        dataset = replace(dataset, templates=prompts.templates(template))
    return dataset


def options_of(name: str) -> set[str]:
    """The options that the loader of the data set takes. Raises UserError for an unknown name."""
    return set(list(inspect.signature(loader_of(name)).parameters)[1:])


def loader_of(name: str) -> Callable[..., Any]:
    """The loader of a data set by name, or of `package.module:loader`. Raises UserError if there is none."""
    entry = DATASETS.get(name)
    if callable(entry):
        return entry
    if entry is not None:
        return pkgutil.resolve_name(entry)
    if ":" in name:
        return imported(name)
    raise UserError(
        f"unknown data set {name!r}.{nearest(name, DATASETS)} There are: {', '.join(DATASETS)}; or package.module:loader."
    )
