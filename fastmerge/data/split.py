"""Divides images into train and test: by a list, or, where there is none, by a rule of our own.

A list names images by paths on another machine. A path is matched from its end, so prefixes do not matter: the longest
common end of folder names decides, and names of parts (`train`, `test`) do not count, since copies differ in them.

Our own rule: of every class folder (of every domain) the 20 % of the images with the smallest sha256 of
`<domain>/<class>/<file>` (`/<class>/<file>` without domains) are for testing, at least one of them and not all. A domain that
gets no test image by this (its class folders have one image each, or the names of files tell domains) gives the image with
the smallest hash, if its domain and its class keep another one for training. The rule depends on nothing but names, so it
gives the same images on every machine. `digest` identifies the result.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from fastmerge.data.split_file import SplitList
from fastmerge.data.tree import ClassFolder, meaning
from fastmerge.errors import UserError

TEST_SHARE = 0.2
Parts = tuple[list[ClassFolder], list[ClassFolder]]  # train, test


def by_hash(folders: Sequence[ClassFolder], domain_of: Callable[[str], str | None] | None = None) -> Parts:
    """Our own rule. A class folder of a single image gives it to training, unless its domain needs it for testing.

    domain_of: the domain of an image by the name of its file, where folders do not tell it.
    """
    ranked = [sorted(folder.images, key=lambda image: _rank(folder, image)) for folder in folders]
    sizes = [min(max(1, round(TEST_SHARE * len(images))), len(images) - 1) for images in ranked]
    chosen = [set(images[:n]) for images, n in zip(ranked, sizes, strict=True)]
    domains: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for i, folder in enumerate(folders):
        for image in ranked[i]:
            domains[(domain_of(image) if domain_of else None) or folder.domain].append((i, image))
    left: Counter[str] = Counter()  # training images by class
    for i, folder in enumerate(folders):
        left[folder.name] += len(folder.images) - len(chosen[i])
    for _, images in sorted(domains.items()) if len(domains) > 1 else ():
        if len(images) == 1 or any(image in chosen[i] for i, image in images):
            continue
        if spare := [(i, image) for i, image in images if left[folders[i].name] > 1]:
            i, image = min(spare, key=lambda at: _rank(folders[at[0]], at[1]))
            chosen[i].add(image)
            left[folders[i].name] -= 1
    train, test = [], []
    for folder, own in zip(folders, chosen, strict=True):
        if rest := sorted(set(folder.images) - own):
            train.append(folder._replace(images=rest))
        if own:
            test.append(folder._replace(images=sorted(own)))
    return train, test


def _rank(folder: ClassFolder, image: str) -> bytes:
    return hashlib.sha256(os.fsencode(f"{folder.domain}/{folder.name}/{image}")).digest()


def digest(test: Iterable[ClassFolder]) -> str:
    """First 12 hex digits of the sha256 over the sorted `<domain>/<class>/<file>` of the test images."""
    names = sorted(os.fsencode(f"{f.domain}/{f.name}/{image}\n") for f in test for image in f.images)
    return hashlib.sha256(b"".join(names)).hexdigest()[:12]


def by_list(split: SplitList, folders: Sequence[ClassFolder], root: str) -> tuple[Parts, tuple[str, ...] | None]:
    """The images of `folders` that the list names, and the classes in the order of its own labels (None: it has none).

    All other images are left out. Raises UserError for an entry that is not on disk or fits several files equally well,
    for a label of two classes, and for a class with two labels.
    """
    index = _Index(folders)
    parts: dict[str, dict[int, list[str]]] = {"train": defaultdict(list), "test": defaultdict(list)}
    used: dict[tuple[int, str], str] = {}
    classes: dict[int | None, str] = {}
    labels: dict[str, int | None] = {}
    first = index.find(split.entries[0].path, split.entries[0].where, root)[0]
    for entry in split.entries:
        folder, image = index.find(entry.path, entry.where, root)
        if (folder, image) in used:
            raise UserError(
                f"{entry.where}: {entry.path!r} is listed twice, also as {used[folder, image]!r}; list it once."
            )
        used[folder, image] = entry.path
        if bool(folders[folder].domain) != bool(folders[first].domain):
            raise UserError(
                f"{entry.where}: {entry.path!r} and {split.entries[0].path!r} differ in depth. Expected <class>/<image>, or "
                "<domain>/<class>/<image>, in every entry."
            )
        parts[entry.part][folder].append(image)
        if entry.label is not None:
            name = folders[folder].name
            if (other := classes.setdefault(entry.label, name)) != name:
                raise UserError(
                    f"{entry.where}: label {entry.label} is {name} here, but {other} before. Correct the list."
                )
            if (label := labels.setdefault(name, entry.label)) != entry.label:
                raise UserError(
                    f"{entry.where}: {name} has label {entry.label} here, but {label} before. Correct the list."
                )
    train, test = (
        [folders[i]._replace(images=sorted(images)) for i, images in sorted(part.items())] for part in parts.values()
    )
    order = tuple(classes[label] for label in sorted(classes, key=int)) if labels else None  # type: ignore[arg-type]
    return (train, test), order


class _Index:
    """Finds the image that a path on another machine means."""

    def __init__(self, folders: Sequence[ClassFolder]) -> None:
        self.folders = folders
        self.images = [frozenset(folder.images) for folder in folders]
        self.by_end: dict[str, list[int]] = defaultdict(list)
        self.ends: list[list[tuple[str, ...]]] = []
        for i, folder in enumerate(folders):
            # a folder may be named otherwise than its class: ImageNet-R has wnids in some copies and names in others
            meant = tuple(_plain(part) for part in meaning(folder.path))
            named = tuple(_plain(part) for part in (folder.domain, folder.name) if part)
            self.ends.append(list(dict.fromkeys((meant, named))))
            for last in dict.fromkeys(end[-1] if end else "" for end in self.ends[i]):
                self.by_end[last].append(i)
        self.known: dict[str, list[int]] = {}

    def find(self, path: str, where: str, root: str) -> tuple[int, str]:
        folder, _, image = path.rpartition("/")
        if folder not in self.known:
            self.known[folder] = self._folders(folder)
        found = [i for i in self.known[folder] if image in self.images[i]]
        if not found:
            raise UserError(
                f"{where}: {path!r} does not exist under {root}. Expected <class>/<image> or <domain>/<class>/<image>, "
                "relative to --data-root; a prefix does not matter. Is the list for this data set?"
            )
        if len(found) > 1:
            paths = {i: self.folders[i].path for i in found}  # now with the names of parts
            whole = {i: (p == folder, _common_end(folder.split("/"), p.split("/"))) for i, p in paths.items()}
            found = [i for i in found if whole[i] == max(whole.values())]
        if len(found) > 1:
            same = ", ".join(f"{self.folders[i].path}/{image}" for i in found[:3])
            raise UserError(f"{where}: {path!r} can be any of {same}. Write more of the path.")
        return found[0], image

    def _folders(self, path: str) -> list[int]:
        """The folders whose names agree longest with the end of `path`."""
        parts = tuple(_plain(part) for part in meaning(path))
        agree = {
            i: max(_common_end(parts, end) for end in self.ends[i])
            for i in self.by_end.get(parts[-1] if parts else "", ())
        }
        best = [i for i, n in agree.items() if n == max(agree.values())]
        exact = [i for i in best if self.folders[i].path.endswith(path.rpartition("/")[2])]  # `Bee` is not `bee`
        return exact or best


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_")


def _common_end(a: Sequence[str], b: Sequence[str]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n
