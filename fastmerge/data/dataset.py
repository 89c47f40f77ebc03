"""The data set interface: two splits of labelled images that can be read at any size.

A new data set needs one file with a `load(root, ...) -> Dataset` and one line in `fastmerge.data.DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.wording import counted


@dataclass(frozen=True, eq=False)
class Split:
    """The train or the test part. The order of the images is fixed: position i is the same image on every machine.

    labels: [n] int64, class index in natural order; domains: [n] int64, domain index (0 where there is one domain);
    ids: [n] stable names, such as paths relative to the root (part of the manifest's hash).

    read(indices [k] int64, size S, device) returns images uint8 [k, 3, S, S] on the device and good bool [k] on the
    CPU. An index gives the same pixels at every call, whatever the other indices; several threads call `read`.
    If an image cannot be read, `read` raises a `UserError` that names it; with `skip_bad` its pixels are 0 and good is
    False. on_device: `read` computes the pixels on the device. Otherwise it decodes them on the host, they are the same
    for every device, and `ImageCache` may decode them in the background.

    contents() gives a hash of the images' bytes; None where they cannot change (embedded, or checked when loaded).
    """

    labels: np.ndarray
    domains: np.ndarray
    ids: Sequence[str]
    read: Callable[[np.ndarray, int, torch.device], tuple[Tensor, Tensor]]
    skip_bad: bool = False
    on_device: bool = False
    contents: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        if not (self.labels.shape == self.domains.shape == (len(self.ids),)):
            raise ValueError(
                f"labels {self.labels.shape}, domains {self.domains.shape}, {len(self.ids)} ids: lengths must agree"
            )
        if self.labels.dtype != np.int64 or self.domains.dtype != np.int64:
            raise TypeError(f"labels {self.labels.dtype} and domains {self.domains.dtype}: expected int64")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> Split:
        """The split of the images at `indices` [k] int64."""
        return replace(
            self,
            labels=self.labels[indices],
            domains=self.domains[indices],
            ids=[self.ids[i] for i in indices],
            read=lambda rows, size, device: self.read(indices[rows], size, device),
        )


class Origin(NamedTuple):
    """Where the images of a published data set come from. layout: the layout that was found, and where. split: what divides
    train and test. comparable: published results with the same images and split, and well-known ones with others."""

    layout: str
    split: str
    comparable: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits, with the names of their classes and domains.

    templates: prompt templates with one `{}` for the class name; or a tuple of them for every class (joined.py). flip:
    whether a mirrored image keeps its class (False for characters). notes: what a reader of the results should know
    about this copy of the data; they go into the manifest as warnings. keys: what identifies the classes on disk, in natural
    order: folders or WordNet ids; empty where there is nothing of the kind. origin: of a published data set in files.
    """

    name: str
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    train: Split
    test: Split
    templates: tuple[str, ...] | tuple[tuple[str, ...], ...]
    flip: bool
    notes: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    origin: Origin | None = None

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            for what, index, names in (
                ("label", split.labels, self.class_names),
                ("domain", split.domains, self.domain_names),
            ):
                if len(index) and not 0 <= index.min() <= index.max() < len(names):
                    raise ValueError(f"{self.name} {part}: {what} outside 0..{len(names) - 1}")
        per_class = [self.templates_of(c) for c in range(len(self.class_names))]
        for template in dict.fromkeys(template for templates in per_class for template in templates):
            if template.count("{}") != 1:
                raise ValueError(f"{self.name}: template {template!r} needs exactly one '{{}}'")
        if self.keys and len(self.keys) != len(self.class_names):
            raise ValueError(f"{self.name}: {len(self.keys)} keys for {len(self.class_names)} classes")

    def templates_of(self, index: int) -> tuple[str, ...]:
        """The prompt templates of one class."""
        own = self.templates[index] if isinstance(self.templates[0], tuple) else self.templates
        return cast(tuple[str, ...], own)

    def most_populous(self, number: int) -> Dataset:
        """The data set of the `number` classes with the most training images, in natural order; of classes with equally
        many the earlier ones.

        Raises UserError if there are fewer classes.
        """
        classes = len(self.class_names)
        if number > classes:
            raise UserError(
                f"--top-classes {number}: {self.name} has {counted(classes, 'class', 'classes')}; choose 1 to {classes}."
            )
        counts = np.bincount(self.train.labels, minlength=classes)
        kept = np.sort(np.argsort(-counts, kind="stable")[:number])
        label = np.full(classes, -1)
        label[kept] = np.arange(number)
        train, test = (
            replace(part, labels=label[part.labels])
            for part in (s.subset(np.flatnonzero(label[s.labels] >= 0)) for s in (self.train, self.test))
        )
        names = tuple(self.class_names[c] for c in kept)
        least = counts[kept].min()
        total = counted(classes, "class", "classes")
        note = f"--top-classes: the {number} of {total} with the most training images ({least} or more)"
        templates = self.templates
        if isinstance(templates[0], tuple):
            templates = tuple(self.templates_of(c) for c in kept)
        return replace(
            self,
            class_names=names,
            templates=templates,
            train=train,
            test=test,
            notes=(*self.notes, note),
            keys=tuple(self.keys[c] for c in kept) if self.keys else (),
            origin=self._part_of_origin(f"results on the same {counted(number, 'class', 'classes')} only"),
        )

    def held_out(self, part: float) -> Dataset:
        """Replace the test split: hold out the fraction `part` of the training images of every class and domain.

        This allows choosing settings without the test images. At least one image of each group stays in training. A
        fixed permutation selects the images, the same in every run.
        """
        order = np.random.RandomState(0).permutation(len(self.train))
        groups = (self.train.labels * len(self.domain_names) + self.train.domains)[order]
        held = np.zeros(len(order), bool)
        for group in np.unique(groups):
            members = order[groups == group]
            held[members[: min(round(part * len(members)), len(members) - 1)]] = True
        train, test = (self.train.subset(np.flatnonzero(rows)) for rows in (~held, held))
        whole = counted(len(self.train), "training image")
        note = f"--validation holds out {len(test)} of {whole}; accuracies are on what is held out"
        origin = self._part_of_origin("none, since the accuracies are on training images")
        return replace(self, train=train, test=test, notes=(*self.notes, note), origin=origin)

    def _part_of_origin(self, comparable: str) -> Origin | None:
        whole = self.origin
        return whole and whole._replace(comparable=f"{comparable} (all of the data: {whole.comparable})")
