"""Scenarios: a data set split into a sequence of tasks, and the manifest that records the split.

Class-incremental ('cil'): tasks are consecutive slices of the class order. Domain-incremental ('dil'): one task per
domain, one label space.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastmerge.data import order_file
from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.order_file import some
from fastmerge.errors import UserError, nearest

FEW_TEST_IMAGES = 5  # a class with fewer gets a warning: one image changes its accuracy by more than 20 %


@dataclass(frozen=True, eq=False)
class Task:
    """classes: natural class indices, sorted as in the class order (dil: all classes).

    train, test: int64 indices into `dataset.train` and `dataset.test`, ascending.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Scenario:
    """kind: 'cil' or 'dil'. class_order: every class index once, in the order of their appearance.

    domain_order: the domain index of every task (dil), or empty (cil).
    """

    kind: str
    dataset: Dataset
    class_order: tuple[int, ...]
    tasks: tuple[Task, ...]
    domain_order: tuple[int, ...] = ()

    def seen(self, t: int) -> tuple[int, ...]:
        """Classes of the tasks 0..t, in the order of their appearance."""
        return tuple(dict.fromkeys(c for task in self.tasks[: t + 1] for c in task.classes))

    def joined(self) -> Scenario:
        """The scenario with all tasks joined into one, for joint training."""
        train, test = (np.unique(np.concatenate([getattr(t, part) for t in self.tasks])) for part in ("train", "test"))
        return replace(self, tasks=(Task(0, "all tasks", self.class_order, train, test),))

    def manifest(self) -> dict[str, Any]:
        """The record of the scenario, for JSON: order and its hash, classes and counts per task, hash of the splits."""
        data, names = self.dataset, self.dataset.class_names
        order = self.class_order if self.kind == "cil" else self.domain_order
        return {
            "dataset": data.name,
            "scenario": self.kind,
            "classes": len(names),
            "class_order": list(self.class_order),
            "domain_order": [data.domain_names[d] for d in self.domain_order],
            "order_sha256": order_hash(order),
            "tasks": [
                {
                    "index": task.index,
                    "name": task.name,
                    "classes": [names[c] for c in task.classes],
                    "train": len(task.train),
                    "test": len(task.test),
                }
                for task in self.tasks
            ],
            "train": len(data.train),
            "test": len(data.test),
            "sha256": split_hash(data.train, data.test),
            "images_sha256": contents_hash(data.train, data.test),
            "origin": data.origin._asdict() if data.origin else None,
            "warnings": [*data.notes, *_warnings(data)],
        }


def build_scenario(
    dataset: Dataset, kind: str, tasks: int | None, class_order: str = "natural", fewest_domains: int = 2
) -> Scenario:
    """`dataset` as a sequence of tasks.

    class_order: 'natural'; an integer s for `numpy.random.RandomState(s).permutation` (1993 gives the order of iCaRL,
    PyCIL and PILOT); or a file that lists all classes by index or name (order_file.py); `names:FILE` and
    `indices:FILE` where they could be both. With 'dil' it orders
    the domains.
    fewest_domains: with 'dil'; 1 where the tasks follow those of another run.
    tasks: number of tasks; sizes differ by at most one class, larger ones first. 'dil': number of domains, or None.

    Raises UserError for more tasks than classes, a class without train images, a task without test images, a file that
    is not a permutation, or 'dil' with one domain.
    """
    if kind not in ("cil", "dil"):
        raise UserError(f"unknown scenario {kind!r}.{nearest(kind, ('cil', 'dil'))} There are: cil, dil.")
    _check_train_images(dataset)
    if kind == "dil":
        return _domain_incremental(dataset, tasks, class_order, fewest_domains)
    n = len(dataset.class_names)
    if tasks is None or not 1 <= tasks <= n:
        raise UserError(f"--tasks {tasks}: {dataset.name} has {n} classes; choose 1 to {n} tasks.")
    order = read_order(class_order, dataset.class_names, "class")
    slices = [order[start:stop] for start, stop in task_bounds(n, tasks)]
    task_of_class = np.empty(n, np.int64)
    for t, classes in enumerate(slices):
        task_of_class[list(classes)] = t
    train, test = (_group(task_of_class[split.labels], tasks) for split in (dataset.train, dataset.test))
    return Scenario("cil", dataset, order, _tasks([f"task {t + 1}" for t in range(tasks)], slices, train, test))


def _domain_incremental(dataset: Dataset, tasks: int | None, domain_order: str, fewest: int) -> Scenario:
    n = len(dataset.domain_names)
    if n < fewest:
        raise UserError(f"{dataset.name} has one domain only; use --scenario cil, or data with a folder per domain.")
    if tasks not in (None, n):
        raise UserError(
            f"--tasks {tasks}: a domain-incremental run has one task per domain, and {dataset.name} has {n} domains "
            f"({', '.join(dataset.domain_names)}); leave --tasks out."
        )
    order = read_order(domain_order, dataset.domain_names, "domain")
    classes = tuple(range(len(dataset.class_names)))
    train, test = (_group(split.domains, n) for split in (dataset.train, dataset.test))
    train, test = ([groups[d] for d in order] for groups in (train, test))
    sequence = _tasks([dataset.domain_names[d] for d in order], [classes] * n, train, test)
    return Scenario("dil", dataset, classes, sequence, order)


def _tasks(
    names: Sequence[str], classes: Sequence[tuple[int, ...]], train: Sequence, test: Sequence
) -> tuple[Task, ...]:
    for part, groups in (("train", train), ("test", test)):
        if empty := [name for name, group in zip(names, groups, strict=True) if not len(group)]:
            raise UserError(
                f"no {part} image for {some(empty)}: a task needs train and test images. Add some, or use fewer tasks."
            )
    return tuple(Task(t, *parts) for t, parts in enumerate(zip(names, classes, train, test, strict=True)))


def task_bounds(classes: int, tasks: int) -> list[tuple[int, int]]:
    """(start, stop) per task in the class order: sizes differ by at most one, larger first, every class covered."""
    size, larger = divmod(classes, tasks)
    starts = [t * size + min(t, larger) for t in range(tasks + 1)]
    return list(zip(starts[:-1], starts[1:], strict=True))


def read_order(spec: str, names: Sequence[str], what: str) -> tuple[int, ...]:
    """The order of `names` that `spec` gives; see build_scenario. what: 'class' or 'domain', for messages."""
    n = len(names)
    if spec == "natural":
        return tuple(range(n))
    if re.fullmatch(r"-?\d+", spec):
        seed = int(spec)
        if not 0 <= seed < 2**32:
            raise UserError(f"--class-order {spec}: a seed must be between 0 and 2**32 - 1.")
        return tuple(np.random.RandomState(seed).permutation(n).tolist())  # as np.random.seed(seed), then permutation
    reading, path = None, os.path.expanduser(spec)
    if (given := re.fullmatch(r"(names|indices):(.+)", spec)) and not os.path.isfile(path):
        reading, path = given[1], os.path.expanduser(given[2])
    if not os.path.isfile(path):
        raise UserError(
            f"--class-order {spec}: neither 'natural', nor an integer seed such as 1993, nor an existing file."
            + nearest(spec, ["natural"])
        )
    return order_file.read(path, names, what, reading)


def order_hash(order: Sequence[int]) -> str:
    """First 12 hex digits of the sha256 of the order as JSON, the convention of published class orders."""
    return hashlib.sha256(json.dumps(list(order)).encode()).hexdigest()[:12]


def split_hash(*splits: Split) -> str:
    """sha256 over id, label and domain of every image, in order."""
    digest = hashlib.sha256()
    for split in splits:
        for image, label, domain in zip(split.ids, split.labels.tolist(), split.domains.tolist(), strict=True):
            digest.update(f"{image}\t{label}\t{domain}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def contents_hash(*splits: Split) -> str | None:
    """sha256 over the bytes of the images as `Split.contents` gives them; None where they cannot change."""
    sources = dict.fromkeys(split.contents for split in splits if split.contents)  # two splits may share one
    return hashlib.sha256("".join(source() for source in sources).encode()).hexdigest() if sources else None


def _group(keys: np.ndarray, groups: int) -> list[np.ndarray]:
    """For every key 0..groups-1, its positions in ascending order."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.cumsum(np.bincount(keys, minlength=groups))[:-1])


def _check_train_images(dataset: Dataset) -> None:
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    if empty := [dataset.class_names[c] for c in np.flatnonzero(counts == 0)]:
        raise UserError(
            f"{dataset.name}: no train image of class {some(empty)}. Every class needs at least one: add images, or "
            "remove the class from the test part."
        )


def _warnings(dataset: Dataset) -> list[str]:
    names, found = dataset.class_names, []
    counts = np.bincount(dataset.test.labels, minlength=len(names))
    if few := [f"{names[c]} ({counts[c]})" for c in np.flatnonzero(counts < FEW_TEST_IMAGES)]:
        found.append(
            f"{len(few)} classes have fewer than {FEW_TEST_IMAGES} test images, so the mean over images (micro) and the mean "
            f"over tasks (macro) can differ: {some(few)}"
        )
    if double := [name for name, count in Counter(names).items() if count > 1]:
        found.append(
            f"{len(double)} names belong to several classes each, which a text head cannot tell apart: {some(double)}"
        )
    return found
