"""Several data sets as one, and one scenario after another. Classes of the same name are the same class; domains stay
apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.scenario import Scenario, Task


class Joined(NamedTuple):
    """The joined data set. For every part: its classes and domains as indices into those of the joined data set, int64,
    and the position of its first image in the train and in the test split."""

    dataset: Dataset
    classes: list[np.ndarray]
    domains: list[np.ndarray]
    train_starts: list[int]
    test_starts: list[int]


def join(parts: Sequence[Dataset]) -> Joined:
    """One data set with the images of all parts, in turn. Templates and flips are those of the last part. A domain whose
    name is taken gets a number."""
    class_names: list[str] = []
    domain_names: list[str] = []
    classes, domains = [], []
    for part in parts:
        known = {name: c for c, name in reversed(list(enumerate(class_names)))}
        own = []
        for name in part.class_names:  # a name that one part has twice stays two classes
            if name not in known:
                class_names.append(name)
            own.append(known.get(name, len(class_names) - 1))
        classes.append(np.array(own, np.int64))
        start = len(domain_names)
        for name in part.domain_names:
            domain_names.append(unused(name, domain_names))
        domains.append(np.arange(start, len(domain_names), dtype=np.int64))
    sources = list(
        dict.fromkeys(split.contents for part in parts for split in (part.train, part.test) if split.contents)
    )

    def contents() -> str:
        return hashlib.sha256("".join(source() for source in sources).encode()).hexdigest()

    def joined(splits: Sequence[Split]) -> Split:
        return Split(
            labels=np.concatenate([own[split.labels] for own, split in zip(classes, splits, strict=True)]),
            domains=np.concatenate([own[split.domains] for own, split in zip(domains, splits, strict=True)]),
            ids=[name for split in splits for name in split.ids],
            read=reader(splits),
            skip_bad=any(split.skip_bad for split in splits),
            on_device=all(split.on_device for split in splits),
            contents=contents if sources else None,
        )

    train, test = [part.train for part in parts], [part.test for part in parts]
    dataset = Dataset(
        name=" + ".join(part.name for part in parts),
        class_names=tuple(class_names),
        domain_names=tuple(domain_names),
        train=joined(train),
        test=joined(test),
        templates=parts[-1].templates,
        flip=parts[-1].flip,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
    return Joined(dataset, classes, domains, starts(train), starts(test))


def unused(name: str, taken: Sequence[str]) -> str:
    """`name`, or the first of 'name 2', 'name 3', ... that is not taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name} {number}"
    return candidate


def starts(splits: Sequence[Split]) -> list[int]:
    """The position of the first image of every split when they follow each other."""
    return [sum(len(split) for split in splits[:i]) for i in range(len(splits))]


def reader(splits: Sequence[Split]) -> Callable[[np.ndarray, int, torch.device], tuple[Tensor, Tensor]]:
    """`Split.read` of the splits in turn."""
    first = np.array(starts(splits))

    def read(indices: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        part = np.searchsorted(first, indices, side="right") - 1
        found = []
        for number in np.unique(part):
            rows = torch.from_numpy(np.flatnonzero(part == number))
            found.append((rows, *splits[number].read(indices[rows.numpy()] - first[number], size, device)))
        if len(found) == 1:
            return found[0][1:]
        images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8, device=device)
        good = torch.zeros(len(indices), dtype=torch.bool)
        for rows, pixels, fine in found:
            images[rows.to(device)], good[rows] = pixels, fine
        return images, good

    return read


def followed_by(first: Scenario, second: Scenario) -> Scenario:
    """The tasks of `first`, then those of `second`, over the joined data set. Both are of one kind.

    The tasks of `first` keep their classes; a later domain has all classes. A class of `second` that `first` has too is
    the same class and stands where it stood in the class order.
    """
    data, classes, domains, train, test = join([first.dataset, second.dataset])
    new = classes[1]
    every = tuple(range(len(data.class_names)))
    order = tuple(dict.fromkeys((*first.class_order, *new[list(second.class_order)].tolist())))
    tasks = list(first.tasks)
    for task in second.tasks:
        index = len(tasks)
        name = f"task {index + 1}" if first.kind == "cil" else unused(task.name, [t.name for t in tasks])
        own = tuple(new[list(task.classes)].tolist()) if first.kind == "cil" else every
        tasks.append(Task(index, name, own, task.train + train[1], task.test + test[1]))
    later = domains[1][list(second.domain_order)].tolist()
    return replace(
        first, dataset=data, class_order=order, tasks=tuple(tasks), domain_order=(*first.domain_order, *later)
    )
