"""Scenarios: a data set split into a sequence of tasks, and the manifest that records the split.

Class-incremental ('cil'): tasks are consecutive slices of the class order. Domain-incremental ('dil'): one task per
domain, one label space. 'datasets': one task per domain, each with its own classes, some of which may return in later
tasks; the domains are joined data sets (joined.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastmerge.config import LATER_CLASSES
from fastmerge.data import order_file, wordnet
from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.joined import union, unused
from fastmerge.data.order_file import some
from fastmerge.data.tree import WNID
from fastmerge.errors import UserError, nearest
from fastmerge.wording import counted

KINDS = ("cil", "dil", "datasets")
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
    """kind: 'cil', 'dil' or 'datasets'. class_order: every class index once, in the order of their appearance.

    domain_order: the domain index of every task, or empty (cil).
    """

    kind: str
    dataset: Dataset
    class_order: tuple[int, ...]
    tasks: tuple[Task, ...]
    domain_order: tuple[int, ...] = ()

    def seen(self, t: int) -> tuple[int, ...]:
        """Classes of the tasks 0..t in class order (dil: all classes)."""
        if self.kind == "dil":
            return self.class_order
        seen = {c for task in self.tasks[: t + 1] for c in task.classes}
        return tuple(c for c in self.class_order if c in seen)

    def followed_by(self, other: Scenario) -> Scenario:
        """These tasks, then those of `other`, of the same kind, over the joined data set.

        These tasks keep their classes; a later domain has all classes. A class of `other` that is known is the same class
        and stands where it stood in the class order. Flips are those of `other`, whose tasks are trained next.
        """
        dataset, classes, domains = union([self.dataset, other.dataset])
        new, every = classes[1], tuple(range(len(dataset.class_names)))
        tasks = list(self.tasks)
        for task in other.tasks:
            name = unused(f"task {len(tasks) + 1}" if self.kind == "cil" else task.name, [t.name for t in tasks])
            own = every if self.kind == "dil" else tuple(new[list(task.classes)].tolist())
            rows = (task.train + len(self.dataset.train), task.test + len(self.dataset.test))
            tasks.append(Task(len(tasks), name, own, *rows))
        order = tuple(dict.fromkeys((*self.class_order, *new[list(other.class_order)].tolist())))
        later = domains[1][list(other.domain_order)].tolist()
        dataset = replace(dataset, flip=other.dataset.flip)
        return Scenario(self.kind, dataset, order, tuple(tasks), (*self.domain_order, *later))

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
    dataset: Dataset,
    kind: str,
    tasks: int | None,
    class_order: str = "natural",
    *,
    first_classes: int | None = None,
    sizes: Sequence[int] | None = None,
    fewest_domains: int = 2,
) -> Scenario:
    """`dataset` as a sequence of tasks.

    class_order: see `read_order`. With 'dil' and 'datasets' it orders the domains.
    tasks, first_classes, sizes: see `task_sizes`. 'dil': the number of domains or None; sizes are not used.
    fewest_domains: 1 where the tasks follow those of another run.

    Raises UserError for sizes that do not fit, more tasks than classes, a class without train images, a task without
    test images, a file that is not a permutation, or 'dil' with one domain.
    """
    if kind not in KINDS:
        raise UserError(f"unknown scenario {kind!r}.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}.")
    _check_train_images(dataset)
    if kind != "cil":
        return _by_domain(dataset, kind, tasks, class_order, fewest_domains)
    order = read_order(class_order, dataset.class_names, "class", dataset.keys)
    ends = np.cumsum(task_sizes(dataset, tasks, first_classes, sizes)).tolist()
    slices = [order[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    tasks = len(slices)
    task_of_class = np.empty(len(order), np.int64)
    for t, classes in enumerate(slices):
        task_of_class[list(classes)] = t
    train, test = (_group(task_of_class[split.labels], tasks) for split in (dataset.train, dataset.test))
    names = [f"task {t + 1}" for t in range(tasks)]
    return Scenario("cil", dataset, order, _tasks(names, slices, train, test, "Add some, or use fewer tasks"))


def _by_domain(dataset: Dataset, kind: str, tasks: int | None, domain_order: str, fewest: int) -> Scenario:
    n, what = len(dataset.domain_names), "domain" if kind == "dil" else "data set"
    if n < fewest:
        raise UserError(f"{dataset.name} has one {what} only; use --scenario cil, or data with a folder per domain.")
    if tasks not in (None, n):
        raise UserError(
            f"--tasks {tasks}: there is one task per {what}, and {dataset.name} has {counted(n, what)} "
            f"({', '.join(dataset.domain_names)}); leave --tasks out."
        )
    order = read_order(domain_order, dataset.domain_names, what)
    train, test = (_group(split.domains, n) for split in (dataset.train, dataset.test))
    train, test = ([groups[d] for d in order] for groups in (train, test))
    classes = [tuple(range(len(dataset.class_names)))] * n
    if kind == "datasets":
        classes = [tuple(np.unique(dataset.train.labels[rows]).tolist()) for rows in train]
        for d, own, rows in zip(order, classes, test, strict=True):
            if missing := sorted(set(dataset.test.labels[rows].tolist()) - set(own)):
                raise UserError(
                    f"{dataset.domain_names[d]}: no train image of class "
                    f"{some([dataset.class_names[c] for c in missing])}. Every class needs at least one."
                )
    advice = f"Add images of this {what}, or choose test images with --split-file, or hold out more with --validation"
    sequence = _tasks([dataset.domain_names[d] for d in order], classes, train, test, advice)
    return Scenario(kind, dataset, tuple(dict.fromkeys(c for own in classes for c in own)), sequence, order)


def _tasks(
    names: Sequence[str], classes: Sequence[tuple[int, ...]], train: Sequence, test: Sequence, advice: str
) -> tuple[Task, ...]:
    """advice: what to do about a task without images, for the message."""
    for part, groups in (("train", train), ("test", test)):
        if empty := [name for name, group in zip(names, groups, strict=True) if not len(group)]:
            raise UserError(f"no {part} image for {some(empty)}: a task needs train and test images. {advice}.")
    return tuple(Task(t, *parts) for t, parts in enumerate(zip(names, classes, train, test, strict=True)))


def task_sizes(
    dataset: Dataset, tasks: int | None, first: int | None = None, sizes: Sequence[int] | None = None
) -> list[int]:
    """Number of classes of every task of a class-incremental run.

    tasks: their number; sizes differ by at most one, larger ones first. first: classes of the first task; the rest is
    split over tasks - 1 tasks like that, or without `tasks` into tasks of LATER_CLASSES ("B50-Inc10"). sizes: explicit;
    the last one repeats until no class is left, and the last task takes the remainder (PILOT, `utils/data_manager.py`).

    Raises UserError naming the flag that does not fit the number of classes.
    """
    n, name = len(dataset.class_names), dataset.name
    has = f"{name} has {counted(n, 'class', 'classes')}"
    if sizes is not None:
        flag, start, later = f"--task-sizes {' '.join(map(str, sizes))}", list(sizes), sizes[-1]
    elif first is not None and tasks is None:
        flag, start, later = f"--first-classes {first}", [first], LATER_CLASSES
    elif first is not None and tasks is not None:
        if not 1 < tasks <= n - first + 1:
            raise UserError(
                f"--first-classes {first} --tasks {tasks}: {has}; there must be a second task, and a "
                "class for every task."
            )
        return [first, *evenly(n - first, tasks - 1)]
    elif tasks is None or not 1 <= tasks <= n:
        raise UserError(f"--tasks {tasks}: {has}; choose {'1 task' if n == 1 else f'1 to {n} tasks'}.")
    else:
        return evenly(n, tasks)
    left = n - sum(start)
    if left < 0 or (sizes is None and not left):
        raise UserError(f"{flag}: {has}" + (f", not {sum(start)}." if left else ", none for task 2."))
    found = start + [later] * (left // later) + [left % later] * (left % later > 0)
    if tasks not in (None, len(found)):
        raise UserError(f"--tasks {tasks}: {flag} gives {counted(len(found), 'task')} of {name}; leave --tasks out.")
    return found


def evenly(classes: int, tasks: int) -> list[int]:
    """Sizes that differ by at most one, larger ones first."""
    size, larger = divmod(classes, tasks)
    return [size + (t < larger) for t in range(tasks)]


def uneven_sizes(scenario: Scenario) -> list[int] | None:
    """The number of classes of every task, or None if the number of tasks says it all."""
    sizes = [len(task.classes) for task in scenario.tasks]
    even = scenario.kind != "cil" or sizes == evenly(sum(sizes), len(sizes))
    return None if even else sizes


NUMBERINGS = ("natural", "name-sorted", "wnid-sorted")
SEEDED = ("shuffle", "inverse")


def read_order(spec: str, names: Sequence[str], what: str, keys: Sequence[str] = ()) -> tuple[int, ...]:
    """The order of `names` that `spec` gives, as natural indices. what: 'class', 'domain' or 'data set', for messages.

    spec: [NUMBERING:]ORDER. NUMBERING says which class is number 0, since tools number classes differently and the same
    permutation then gives other tasks: 'natural'; 'name-sorted' (by code point, a blank as `_`: magmax, CMM); 'wnid-sorted'
    (L2P, InfLoRA, PILOT). ORDER: nothing, for the numbering itself; SEED, for `numpy.random.RandomState(SEED).permutation`
    (iCaRL, PyCIL, PILOT: 1993); 'inverse:SEED', its inverse (mammoth's --permute_classes); 'shuffle:SEED', Python's
    `random.seed(SEED); random.shuffle` (CODA-Prompt, LibContinual); or a file (order_file.py), 'names:FILE' or
    'indices:FILE' where it could be both.

    keys: what identifies the classes on disk; 'wnid-sorted' needs them to be WordNet ids, or names of ImageNet-1K.
    """
    numbering, rest = "natural", spec
    if not os.path.isfile(os.path.expanduser(spec)):
        first, colon, after = spec.partition(":")
        if first in NUMBERINGS:
            numbering, rest = first, after
            if colon and not after:
                raise UserError(f"--class-order {spec}: expected a seed or a file after the colon, or no colon.")
    place = _numbering(numbering, spec, names, what, keys)
    numbered = (
        _permutation(rest, spec, [names[i] for i in place], what, [keys[i] for i in place if keys])
        if rest
        else range(len(names))
    )
    return tuple(place[i] for i in numbered)


def _numbering(numbering: str, spec: str, names: Sequence[str], what: str, keys: Sequence[str]) -> list[int]:
    """The natural indices in the order of the numbering."""
    order = list(range(len(names)))
    if numbering == "name-sorted":
        order.sort(key=lambda i: names[i].replace(" ", "_"))
    if numbering == "wnid-sorted":
        wnids = list(keys)
        if not wnids or not all(WNID.fullmatch(key) for key in wnids):
            by_name = {name: wnid for wnid, name in wordnet.class_names().items()} if what == "class" else {}
            wnids = [by_name.get(name, "") for name in names]
            if lack := [name for name, wnid in zip(names, wnids, strict=True) if not wnid]:
                raise UserError(
                    f"--class-order {spec}: the WordNet id of {what} {some(lack)} is unknown; it is for data sets whose "
                    "folders are wnids or whose classes have ImageNet-1K names."
                )
        order.sort(key=wnids.__getitem__)
    return order


def _permutation(rest: str, spec: str, names: Sequence[str], what: str, keys: Sequence[str]) -> Sequence[int]:
    """The order that a seed or a file gives."""
    n = len(names)
    if seeded := re.fullmatch(r"(?:(shuffle|inverse):)?(-?\d+)", rest):
        kind, seed = seeded[1], int(seeded[2])
        if not 0 <= seed < 2**32:
            raise UserError(f"--class-order {spec}: a seed must be between 0 and 2**32 - 1.")
        if kind == "shuffle":
            shuffled = list(range(n))
            random.Random(seed).shuffle(shuffled)
            return shuffled
        order = np.random.RandomState(seed).permutation(n)  # as np.random.seed(seed), then permutation
        return (np.argsort(order) if kind == "inverse" else order).tolist()
    reading, path = None, os.path.expanduser(rest)
    if (given := re.fullmatch(r"(names|indices):(.+)", rest)) and not os.path.isfile(path):
        reading, path = given[1], os.path.expanduser(given[2])
    if not os.path.isfile(path):
        raise UserError(
            f"--class-order {spec}: expected {', '.join(NUMBERINGS)}, an integer seed such as 1993, shuffle:SEED, "
            f"inverse:SEED, or an existing file.{nearest(rest, [*NUMBERINGS, *SEEDED])}"
        )
    return order_file.read(path, names, what, reading, keys)


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
            f"{counted(len(few), 'class has', 'classes have')} fewer than {FEW_TEST_IMAGES} test images, so the mean over "
            f"images (micro) and the mean over tasks (macro) can differ: {some(few)}"
        )
    if double := [name for name, count in Counter(names).items() if count > 1]:
        found.append(
            f"{counted(len(double), 'name belongs', 'names belong')} to several classes, which a text head "
            f"cannot tell apart: {some(double)}"
        )
    return found
