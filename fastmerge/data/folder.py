"""Images in class folders. Reads these layouts in place and never modifies them:

    {train,test|val}/<class>/<image>
    {train,test|val}/<domain>/<class>/<image>
    <domain>/{train,test|val}/<class>/<image>
    <class>/<image>, or <domain>/<class>/<image>, with a split file

A split file (`split_file.py`) lists the images for training and for testing; all other images are left out.

A class is named after its folder, with `_` replaced by a space. If all folders are WordNet ids (ImageNet-R, -A, -100),
classes have their ImageNet-1K names. Classes are the union over domains and parts, in code-point order of the folder
names, so a class that is missing from one domain shifts no label. Images are sorted by domain, class, name.

`train`, `test` and `val` match in upper and lower case; if both `test` and `val` exist, `test` is used. Hidden files
are ignored unless a split file lists them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fastmerge.data import wordnet
from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.files import FileReader, data_root, listing
from fastmerge.data.split_file import read as read_split_file
from fastmerge.errors import UserError

LAYOUTS = """Supported layouts:
  {train,test|val}/<class>/<image>
  {train,test|val}/<domain>/<class>/<image>
  <domain>/{train,test|val}/<class>/<image>
  <class>/<image> or <domain>/<class>/<image>, with --split-file FILE"""


class ClassFolder(NamedTuple):
    """One folder of images: `path` relative to the root, with '/'; `domain` is '' if there is only one."""

    domain: str
    name: str
    path: str
    images: list[str]


def load(
    root: str | None,
    *,
    split_file: str | None = None,
    skip_bad_images: bool = False,
    flip: bool = False,
) -> Dataset:
    """Load the data set under `root`. flip: whether a mirrored image keeps its class, which the folders do not tell.

    Raises UserError for an unknown layout (with the paths tried), a class folder without images, or a bad split file.
    """
    root = data_root("folder", root)
    notes: list[str] = []
    if split_file is not None:
        train, test = _split_by_file(root, os.path.expanduser(split_file))
    else:
        train, test = _split_by_folders(root, notes)
    folders, class_names = {f.name for f in (*train, *test)}, None
    if all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        known = wordnet.class_names()
        class_names = {wnid: known.get(wnid, wnid) for wnid in folders}
        unknown = len(folders - known.keys())
        notes.append(
            "class folders are WordNet ids: classes have their ImageNet-1K names"
            + (f", but {unknown} not in ImageNet-1K keep their ids" if unknown else "")
        )
    return assemble(
        os.path.basename(os.path.abspath(root)) or "folder",
        root,
        train,
        test,
        skip_bad=skip_bad_images,
        flip=flip,
        templates=("a photo of a {}.",),
        notes=notes,
        class_names=class_names,
    )


def assemble(
    name: str,
    root: str,
    train: list[ClassFolder],
    test: list[ClassFolder],
    *,
    skip_bad: bool,
    flip: bool,
    templates: tuple[str, ...],
    notes: Iterable[str] = (),
    class_names: dict[str, str] | None = None,
) -> Dataset:
    """Make a Dataset of class folders. class_names: folder -> class name, if replacing `_` by a space is not enough."""
    folders = sorted({f.name for f in (*train, *test)})
    domains = sorted({f.domain for f in (*train, *test)})
    label, domain = {f: i for i, f in enumerate(folders)}, {d: i for i, d in enumerate(domains)}

    def split(part: list[ClassFolder]) -> Split:
        part = sorted(part)
        counts = [len(f.images) for f in part]
        ids = [f"{f.path}/{image}" for f in part for image in f.images]
        read = FileReader(root, ids, skip_bad)
        return Split(
            labels=np.repeat(np.array([label[f.name] for f in part], np.int64), counts),
            domains=np.repeat(np.array([domain[f.domain] for f in part], np.int64), counts),
            ids=ids,
            read=read,
            skip_bad=skip_bad,
            contents=read.contents,
        )

    names = tuple(class_names[f] if class_names else f.replace("_", " ") for f in folders)
    return Dataset(
        name, names, tuple(d or name for d in domains), split(train), split(test), templates, flip, tuple(notes)
    )


def _split_by_folders(root: str, notes: list[str]) -> tuple[list[ClassFolder], list[ClassFolder]]:
    looked: list[str] = []
    parts = find_parts(root, looked, notes)
    if parts is None:
        train, test = _domains_outside(root, looked, notes)
    elif all(_holds_domains(os.path.join(root, part)) for part in parts):
        train, test = (
            [f for d in _folders(root, part) for f in class_folders(root, f"{part}/{d}", d)] for part in parts
        )
    else:
        train, test = (class_folders(root, part) for part in parts)
    for what, found, other in (("train", train, test), ("test", test, train)):
        if only := sorted({(f.domain, f.name) for f in found} - {(f.domain, f.name) for f in other}):
            shown = ", ".join("/".join(filter(None, key)) for key in only[:5])
            notes.append(f"{len(only)} class folders only in {what}: {shown}{', ...' if len(only) > 5 else ''}")
    domains = {d: {f.name for f in train if f.domain == d} for d in sorted({f.domain for f in train})}
    if len(domains) > 1 and not set.intersection(*domains.values()):
        notes.append(f"no class is in every domain ({', '.join(domains)})")
    return train, test


def _domains_outside(root: str, looked: list[str], notes: list[str]) -> tuple[list[ClassFolder], list[ClassFolder]]:
    train, test, others = [], [], []
    for name in _folders(root):
        if parts := find_parts(os.path.join(root, name), looked, notes):
            train += class_folders(root, f"{name}/{parts[0]}", name)
            test += class_folders(root, f"{name}/{parts[1]}", name)
        else:
            others.append(name)
    if not train:
        raise UserError("no train and test images found. " + looked_for(looked) + "\n" + LAYOUTS)
    if others:
        notes.append(f"folders left out because they have no train and test folders: {', '.join(others)}")
    return train, test


def looked_for(looked: list[str]) -> str:
    shown = looked[:50] + [f"and {len(looked) - 50} more folders"] * (len(looked) > 50)
    return "Looked for:" + "".join(f"\n  {path}" for path in shown)


def find_parts(
    folder: str, looked: list[str], notes: list[str], tests: tuple[str, ...] = ("test", "val"), layouts: str = LAYOUTS
) -> tuple[str, str] | None:
    """Return the names of the train and the test folder in `folder`, or None. Upper and lower case match.

    Appends the paths tried to `looked`. Raises UserError if only one of the two exists.
    """
    looked.append(os.path.join(folder, f"{{{','.join(('train', *tests))}}}"))
    by_lower = {name.lower(): name for name in _folders(folder)}
    train, test = by_lower.get("train"), [by_lower[part] for part in tests if part in by_lower]
    if (train is None) != (not test):
        missing = f"no folder {' or '.join(tests)}" if train else "no folder train"
        raise UserError(f"{folder} has a folder {train or test[0]}, but {missing}. {looked_for(looked)}\n{layouts}")
    if len(test) > 1:
        notes.append(f"{folder}: {test[0]} is used for testing, {', '.join(test[1:])} is left out")
    return (train, test[0]) if train else None


def _folders(*path: str) -> list[str]:
    return listing(os.path.join(*path))[1]


def _holds_domains(part: str) -> bool:
    """Whether the folders in `part` contain class folders, judged by the first one that is not empty."""
    for name in _folders(part):
        images, folders = listing(os.path.join(part, name))
        if images or folders:
            return not images
    return False


def class_folders(root: str, path: str, domain: str = "") -> list[ClassFolder]:
    """The class folders in `root/path`. Raises UserError for one without images."""
    loose, folders = listing(os.path.join(root, path))
    full = os.path.join(root, *path.split("/"))
    if loose and not folders:
        raise UserError(
            f"{full}: {len(loose)} images are in no class folder; sort them into <class>/ folders.\n{LAYOUTS}"
        )
    if not folders:
        raise UserError(f"{full} is empty: expected class folders in it.\n{LAYOUTS}")
    found = [ClassFolder(domain, name, f"{path}/{name}", listing(os.path.join(full, name))[0]) for name in folders]
    if empty := [f.name for f in found if not f.images]:
        others = f"; {len(empty) - 1} other folders have none either" if len(empty) > 1 else ""
        inside = _folders(full, empty[0])
        instead = f" but the folders {', '.join(inside[:3])}" if inside else ""
        raise UserError(
            f"empty class folder: {os.path.join(full, empty[0])} contains no images{instead}{others}. "
            f"Put images there or remove the folder.\n{LAYOUTS}"
        )
    return found


def _split_by_file(root: str, split_file: str) -> tuple[list[ClassFolder], list[ClassFolder]]:
    part_of: dict[str, str] = {}
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}  # part -> class folder -> images
    on_disk: dict[str, frozenset[str]] = {}
    depth = None
    for part, path, where in read_split_file(split_file):
        folder, _, image = path.rpartition("/")
        depth = path.count("/") if depth is None else depth
        if depth not in (1, 2) or path.count("/") != depth:
            raise UserError(
                f"{where}: expected <class>/<image>, or <domain>/<class>/<image> in every entry, got {path!r}."
            )
        if path in part_of:
            raise UserError(f"{where}: {path!r} is listed twice (first for {part_of[path]}); list every image once.")
        full = os.path.join(root, folder)
        if folder not in on_disk:
            on_disk[folder] = frozenset(os.listdir(full)) if os.path.isdir(full) else frozenset()
        if image not in on_disk[folder]:
            raise UserError(
                f"{where}: {os.path.join(full, image)} does not exist. Write paths relative to --data-root {root}."
            )
        part_of[path] = part
        parts[part].setdefault(folder, []).append(image)
    if missing := [part for part, folders in parts.items() if not folders]:
        raise UserError(f"split file {split_file} lists no image for {' and '.join(missing)}.")
    train, test = (
        [
            ClassFolder("/".join(folder.split("/")[-2:-1]), folder.split("/")[-1], folder, sorted(images))
            for folder, images in part.items()
        ]
        for part in parts.values()
    )
    return train, test
