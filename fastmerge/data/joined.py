"""Several data sets as one: the label spaces are joined, and every data set is a domain.

Classes of the same name are one class, so a digit of MNIST is not told from the same digit of SVHN. A class keeps the
prompt templates of the first data set that has it. `--scenario datasets` makes a task of every data set.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmerge.config import EMBEDDED
from fastmerge.data import load_dataset, options_of
from fastmerge.data.class_names import renamed
from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.files import FileReader
from fastmerge.data.order_file import some
from fastmerge.errors import UserError
from fastmerge.wording import counted

CPU = torch.device("cpu")


def load_datasets(
    names: Sequence[str], roots: Sequence[str] | None, *, download: bool, one_domain: bool = False, **options: Any
) -> Dataset:
    """Load the data sets `names`, and join them if there are several.

    roots: a folder for each, or one for all. one_domain: a single data set is one domain, too. options: see
    `load_dataset`; of several data sets each gets those that it takes. Raises UserError for another number of roots, the
    same data twice, or an option that fits none or several where it names a file.
    """
    if not roots:
        places: list[str | None] = [None] * len(names)
    elif len(roots) == 1:
        places = [None if name in EMBEDDED and len(names) > 1 else roots[0] for name in names]
    elif len(roots) == len(names):
        places = list(roots)
    else:
        raise UserError(
            f"--data-root names {counted(len(roots), 'folder')} for {counted(len(names), 'data set')} ({', '.join(names)}); "
            "give one that contains them all, or one for each in the same order"
        )
    if len(names) == 1:
        dataset = load_dataset(names[0], places[0], download=download, **options)
        return _one_domain(dataset, dataset.name) if one_domain else dataset
    same = Counter(
        (name, root and os.path.realpath(os.path.expanduser(root))) for name, root in zip(names, places, strict=True)
    )
    if twice := [name for (name, _), count in same.items() if count > 1]:
        raise UserError(
            f"--dataset: {twice[0]} is named twice with the same folder; give each its own with --data-root"
        )
    skip, template = options.pop("skip_bad_images", False), options.pop("template", None)
    new_names = options.pop("class_names", None)
    given = {key: value for key, value in options.items() if value is not None}
    takers = {key: [name for name in names if key in options_of(name)] for key in given}
    for key, found in takers.items():
        flag = f"--{key.replace('_', '-')} {given[key]}"
        if not found:
            raise UserError(f"{flag}: none of the data sets {', '.join(names)} takes it; leave it out")
        if len(found) > 1 and os.path.exists(os.path.expanduser(str(given[key]))):
            raise UserError(f"{flag}: {' and '.join(found)} would both read this file; use it with one data set")
    parts = [
        load_dataset(
            name,
            root,
            download=download,
            skip_bad_images=skip,
            template=template,
            **{key: value for key, value in given.items() if name in takers[key]},
        )
        for name, root in zip(names, places, strict=True)
    ]
    _check_folders(names, parts)
    joined = join(parts)
    return replace(joined, class_names=renamed(new_names, joined.class_names)) if new_names else joined


def _check_folders(names: Sequence[str], parts: Sequence[Dataset]) -> None:
    """Raise UserError if two data sets read images from one folder, however it was named: a root and the folder that is
    found in it, a link, two loaders for one tree."""
    owner: dict[str, int] = {}
    for i, part in enumerate(parts):
        for read in (part.train.read, part.test.read):
            if not isinstance(read, FileReader):
                continue
            for folder in {os.path.dirname(os.path.join(read.root, name)) for name in read.ids}:
                if (first := owner.setdefault(os.path.realpath(folder), i)) != i:
                    raise UserError(
                        f"--dataset: {names[first]} and {names[i]} both read the images in {folder}; name each data set "
                        "once, or give each its own folder with --data-root"
                    )


def join(parts: Sequence[Dataset]) -> Dataset:
    """One data set with the classes of all `parts`, in their order, and a domain for each part."""
    called = _names(parts)
    return union([_one_domain(part, name) for part, name in zip(parts, called, strict=True)]).dataset


class Union(NamedTuple):
    """The joined data set; for every part its classes and its domains, as indices into those of the joined one, int64."""

    dataset: Dataset
    classes: list[np.ndarray]
    domains: list[np.ndarray]


def union(parts: Sequence[Dataset]) -> Union:
    """One data set with the classes and the domains of all `parts`, in their order. A domain whose name is taken gets a
    number."""
    called = _names(parts)
    index: dict[tuple[str, int], int] = {}  # (name, which of the classes of this name in its data set)
    templates: list[tuple[str, ...]] = []
    labels, shared = [], []
    for part in parts:
        seen: Counter[str] = Counter()
        label = np.empty(len(part.class_names), np.int64)
        for c, name in enumerate(part.class_names):
            key = (name, seen[name])
            seen[name] += 1
            if key in index:
                shared.append(name)
            else:
                index[key] = len(index)
                templates.append(part.templates_of(c))
            label[c] = index[key]
        labels.append(label)
    domain_names: list[str] = []
    domains = []
    for part in parts:
        domains.append(np.arange(len(domain_names), len(domain_names) + len(part.domain_names)))
        for name in part.domain_names:
            domain_names.append(unused(name, domain_names))
    notes = []
    for name, part in zip(called, parts, strict=True):
        origin = (f"{part.origin.layout}; split: {part.origin.split}",) if part.origin else ()
        notes += [f"{name}: {note}" for note in (*origin, *part.notes)]
    if shared:
        shared = list(dict.fromkeys(shared))
        one = "class is in several data sets and counts as one"
        many = "classes are in several data sets and count as one each"
        notes.append(f"{counted(len(shared), one, many)}: {some(shared)}")
    flip = [name for name, part in zip(called, parts, strict=True) if part.flip]
    if flip and len(flip) < len(parts):
        notes.append(f"no flips, which only {some(flip)} allow; --flip mirrors the images of all data sets")
    uniform = len(set(templates)) == 1
    dataset = Dataset(
        name="+".join(called),
        class_names=tuple(name for name, _ in index),
        domain_names=tuple(domain_names),
        train=_joined([part.train for part in parts], labels, domains, called),
        test=_joined([part.test for part in parts], labels, domains, called),
        templates=templates[0] if uniform else tuple(templates),
        flip=len(flip) == len(parts),
        notes=tuple(notes),
    )
    return Union(dataset, labels, domains)


def _names(parts: Sequence[Dataset]) -> list[str]:
    """The name of every part; the second of a name is called NAME#2."""
    called: list[str] = []
    for part in parts:
        number = sum(name.split("#")[0] == part.name for name in called)
        called.append(part.name if not number else f"{part.name}#{number + 1}")
    return called


def unused(name: str, taken: Sequence[str]) -> str:
    """`name`, or the first of 'name 2', 'name 3', ... that is not taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name} {number}"
    return candidate


def _one_domain(dataset: Dataset, name: str) -> Dataset:
    train, test = (replace(part, domains=np.zeros_like(part.domains)) for part in (dataset.train, dataset.test))
    return replace(dataset, domain_names=(name,), train=train, test=test)


def _joined(
    splits: Sequence[Split], labels: Sequence[np.ndarray], domains: Sequence[np.ndarray], names: Sequence[str]
) -> Split:
    lengths = [len(split) for split in splits]
    starts = np.cumsum([0, *lengths])
    place = np.repeat(np.arange(len(splits)), lengths)  # the split of every image
    on_device = all(split.on_device for split in splits)

    def read(indices: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        where = device if on_device else CPU  # the same pixels for every device
        images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8, device=where)
        good = torch.ones(len(indices), dtype=torch.bool)
        for d in np.unique(place[indices]):
            rows = np.flatnonzero(place[indices] == d)
            pixels, fine = splits[d].read(indices[rows] - starts[d], size, where)
            images[torch.from_numpy(rows).to(where)] = pixels
            good[torch.from_numpy(rows)] = fine
        return images.to(device), good

    sources = [split.contents for split in splits]

    def contents() -> str:
        found = [source() if source else "" for source in sources]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    return Split(
        labels=np.concatenate([label[split.labels] for label, split in zip(labels, splits, strict=True)]),
        domains=np.concatenate([own[split.domains] for own, split in zip(domains, splits, strict=True)]),
        ids=[f"{name}/{image}" for name, split in zip(names, splits, strict=True) for image in split.ids],
        read=read,
        skip_bad=any(split.skip_bad for split in splits),
        on_device=on_device,
        contents=contents if any(sources) else None,
    )
