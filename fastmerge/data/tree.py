"""Class folders on disk: how images, classes, domains, and train and test parts are arranged. Only lists, never writes.

Levels that carry no meaning are skipped: a folder `images` inside a class (Tiny-ImageNet) or a domain (Office-31). The
names of parts match in upper and lower case. A WordNet id is always a class, never a domain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastmerge.data.archives import archives
from fastmerge.data.files import listing
from fastmerge.errors import UserError
from fastmerge.wording import counted

TESTS = ("test", "val", "valid", "validation")  # the usual names of a part for testing, best first
WNID = re.compile(r"n\d{8}")
LAYOUTS = """Supported layouts:
  {train,test|val}/<class>/<image>
  {train,test|val}/<domain>/<class>/<image>
  <domain>/{train,test|val}/<class>/<image>
  <class>/<image> or <domain>/<class>/<image>, with --split-file FILE"""


class ClassFolder(NamedTuple):
    """Images of one class and domain in one folder. path: relative to the root, with '/'. domain: '' if there is only one.

    name: what identifies the class: the name of the folder, or an id such as a wnid. Several may share a path.
    """

    domain: str
    name: str
    path: str
    images: list[str]


def subfolders(*path: str) -> list[str]:
    return listing(os.path.join(*path))[1]


def looked_for(looked: Sequence[str]) -> str:
    shown = [*looked[:50], *[f"and {len(looked) - 50} more folders"] * (len(looked) > 50)]
    return "Looked for:" + "".join(f"\n  {path}" for path in shown)


def find_parts(
    folder: str,
    looked: list[str],
    notes: list[str],
    tests: Sequence[str] = TESTS,
    layouts: str = LAYOUTS,
    test_part: str | None = None,
) -> tuple[str, str] | None:
    """Return the names of the train and the test folder in `folder`, or None.

    Of several folders for testing, the first of `tests` whose images are in class folders is taken: the test images of
    many benchmarks are published without labels. test_part: take this one. Appends the paths tried to `looked`, and what
    was left out to `notes`. Raises UserError if only one of the two exists, or there is no `test_part`.
    """
    shown = tests[:2] if tests == TESTS else tests
    looked.append(os.path.join(folder, f"{{{','.join(('train', *shown))}}}"))
    by_lower = {name.lower(): name for name in subfolders(folder)}
    train, found = by_lower.get("train"), [by_lower[part] for part in tests if part in by_lower]
    if train is None and not found:
        return None
    if train is None or not found:
        missing = f"no folder {' or '.join(shown)}" if train else "no folder train"
        packed = archives([folder])
        raise UserError(
            f"{folder} has a folder {train or found[0]}, but {missing}. {looked_for(looked)}\n{layouts}{packed}"
        )
    if test_part is not None:
        test = by_lower.get(test_part.lower())
        if test is None or test == train:
            raise UserError(
                f"--test-part {test_part}: {folder} has no such folder for testing. It has: {', '.join(found)}."
            )
        left_out = [part for part in found if part != test]
    else:
        labelled = [part for part in found if not unlabelled(os.path.join(folder, part))] or found
        test = labelled[0]
        left_out = [part for part in found if part != test]
        if flat := [part for part in left_out if part not in labelled]:
            notes.append(
                f"{os.path.join(folder, test)} is used for testing: the images of {', '.join(flat)} are in no class "
                "folders, so they have no labels"
            )
            left_out = [part for part in left_out if part in labelled]
    if left_out:
        notes.append(
            f"{folder}: {test} is used for testing, {', '.join(left_out)} is left out (--test-part {left_out[0]} uses it)"
        )
    return train, test


def check_test_part(test_part: str | None, where: str, parts: Iterable[str]) -> None:
    """Raise UserError if `--test-part` names none of `parts` that is for testing."""
    tests = [part for part in parts if part != "train"]
    if test_part is not None and test_part not in tests:
        raise UserError(
            f"--test-part {test_part}: {where} has no such part for testing. It has: {', '.join(tests) or 'train'}."
        )


def unlabelled(part: str) -> bool:
    """Whether the images of a part are in no class folders: directly in it, or in one folder `images`."""
    images, folders = listing(part)
    if [name.lower() for name in folders] == ["images"]:
        inside = listing(os.path.join(part, folders[0]))
        return bool(inside[0]) and not inside[1]
    return bool(images) and not folders


def descend(root: str, path: str) -> str:
    """`path`, or the folder `images` in it if that is the only one and `path` has no images of its own."""
    images, folders = listing(os.path.join(root, path))
    if not images and [name.lower() for name in folders] == ["images"]:
        return f"{path}/{folders[0]}" if path else folders[0]
    return path


def holds_domains(root: str, path: str) -> bool:
    """Whether the folders in `root/path` hold class folders, judged by the first one that is not empty."""
    for name in subfolders(root, path):
        inside = f"{path}/{name}" if path else name
        images, folders = listing(os.path.join(root, descend(root, inside)))
        if images or folders:
            return not images and not WNID.fullmatch(name)
    return False


def class_folders(
    root: str,
    path: str,
    domain: str = "",
    layouts: str = LAYOUTS,
    notes: list[str] | None = None,
    named: re.Pattern[str] | None = None,
) -> list[ClassFolder]:
    """The class folders in `root/path`. named: folders with other names are ignored.

    Images in folders inside a class folder that has images are left out; `notes` tells
    so. Raises UserError for a class folder without images."""
    loose, folders = listing(os.path.join(root, path))
    full = os.path.join(root, *path.split("/"))
    if unlabelled(full):
        loose = loose or listing(os.path.join(full, folders[0]))[0]
        raise UserError(
            f"{full}: {counted(len(loose), 'image is', 'images are')} in no class folder; sort images into <class>/ "
            f"folders.\n{layouts}"
        )
    folders = [name for name in folders if named is None or named.fullmatch(name)]
    if not folders:
        raise UserError(f"{full} is empty: expected class folders in it.\n{layouts}{archives([full])}")
    found, empty, left_out = [], [], []
    for name in folders:
        inside = f"{path}/{name}" if path else name
        images, below = listing(os.path.join(root, inside))
        if not images and [b.lower() for b in below] == ["images"]:
            inside = f"{inside}/{below[0]}"
            images, below = listing(os.path.join(root, inside))
        found.append(ClassFolder(domain, name, inside, images))
        if not images:
            empty.append((name, below))
        elif notes is not None:
            left_out += [(b, n) for b in (f"{inside}/{b}" for b in below) if (n := _images_in(os.path.join(root, b)))]
    if empty:
        more = counted(len(empty) - 1, "other folder has", "other folders have")
        others = f"; {more} none either" if len(empty) > 1 else ""
        name, below = empty[0]
        instead = f" but the folders {', '.join(below[:3])}" if below else ""
        raise UserError(
            f"empty class folder: {os.path.join(full, name)} contains no images{instead}{others}. "
            f"Put images there or remove the folder.\n{layouts}"
        )
    if left_out and notes is not None:
        every = counted(sum(n for _, n in left_out), "image is", "images are")
        notes.append(f"{every} in folders inside class folders, such as {left_out[0][0]}, and left out")
    return found


def _images_in(folder: str) -> int:
    """The number of images in a folder and all folders in it."""
    images, folders = listing(folder)
    return len(images) + sum(_images_in(os.path.join(folder, name)) for name in folders)


def domain_folders(root: str, path: str, layouts: str = LAYOUTS, notes: list[str] | None = None) -> list[ClassFolder]:
    """The class folders in `root/path`, which may be sorted into one folder per domain. notes: as in `class_folders`."""
    if not holds_domains(root, path):
        return class_folders(root, path, layouts=layouts, notes=notes)
    return [
        folder
        for name in subfolders(root, path)
        for folder in class_folders(root, descend(root, f"{path}/{name}" if path else name), name, layouts, notes)
    ]


def folders_with_images(root: str, most: int = 4) -> list[ClassFolder]:
    """Every folder with images in up to `most` levels, for a list that says which of them are used.

    The last name is the class, the one before it the domain; names of parts and `images` count as neither.
    """
    found: list[ClassFolder] = []

    def walk(path: str, level: int) -> None:
        images, folders = listing(os.path.join(root, path))
        meant = meaning(path)
        if images and meant:
            found.append(ClassFolder(meant[-2] if len(meant) > 1 else "", meant[-1], path, images))
        for name in folders if level < most else []:
            walk(f"{path}/{name}" if path else name, level + 1)

    walk("", 0)
    return found


def meaning(path: str) -> list[str]:
    """The components of a folder's path that name a class or a domain. The last one always does: a class may be `train`."""
    parts = [part for part in path.split("/") if part and part.lower() != "images"]
    return [part for part in parts[:-1] if part.lower() not in ("train", *TESTS)] + parts[-1:]
