"""Images in class folders. Reads these layouts in place and never modifies them:

    {train,test|val}/<class>/<image>
    {train,test|val}/<domain>/<class>/<image>
    <domain>/{train,test|val}/<class>/<image>
    <class>/<image>, or <domain>/<class>/<image>, with a split file

A split file (`split_file.py`) lists the images for training and for testing; all other images are left out.

A class is named after its folder, with `_` replaced by a space and without CUB's `NNN.`. If all folders are WordNet ids
(ImageNet-R, -A, -100), classes have their ImageNet-1K names. Classes are the union over domains and parts, in code-point
order of the folder names, so a class that is missing from one domain shifts no label. Folders that differ only in case
(`Bee`, `bee`) are one class unless one domain of one part has both. Images are sorted by domain, class, name.

`train`, `test`, `val`, `valid` and `validation` match in upper and lower case. If there are several for testing, the first
with class folders is used, or the one that `test_part` names. Hidden files are ignored.

A tree that is a published data set is recognised: if it cannot be read here, the error names its `--dataset`; if it can, a
note does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np

from fastmerge.data import class_names as names_of
from fastmerge.data import split_file as lists
from fastmerge.data.archives import archives
from fastmerge.data.dataset import Dataset, Origin, Split
from fastmerge.data.files import FileReader, data_root, listing
from fastmerge.data.prompts import PHOTO
from fastmerge.data.split import by_list
from fastmerge.data.tree import (
    LAYOUTS,
    ClassFolder,
    class_folders,
    domain_folders,
    find_parts,
    folders_with_images,
    holds_domains,
    looked_for,
    subfolders,
)
from fastmerge.errors import UserError
from fastmerge.wording import counted


def load(
    root: str | None,
    *,
    split_file: str | None = None,
    test_part: str | None = None,
    skip_bad_images: bool = False,
    flip: bool = False,
) -> Dataset:
    """Load the data set under `root`. flip: whether a mirrored image keeps its class, which the folders do not tell.

    test_part: the folder (or the part of the split file) for testing, where there are several.
    Raises UserError for an unknown layout (with the paths tried), a class folder without images, or a bad split file.
    """
    from fastmerge.data.recognise import advice  # which knows all data sets, and they know this module

    root = data_root("folder", root)
    notes: list[str] = []
    order = None
    try:
        if split_file is not None:
            split = lists.read(split_file, test_part)
            (train, test), order = by_list(split, folders_with_images(root), root)
            notes += split.notes
        else:
            train, test = parts(root, notes, test_part)
    except UserError as error:
        raise UserError(f"{error}{advice(root)}") from None
    if known := advice(root, [*train, *test]):
        notes.append(known.strip())
    names = names_of.from_folders((f.name for f in (*train, *test)), notes)
    return assemble(
        names_of.readable(os.path.basename(os.path.abspath(root))) or "folder",
        root,
        train,
        test,
        skip_bad=skip_bad_images,
        flip=flip,
        templates=PHOTO,
        notes=notes,
        class_names=names,
        order=order,
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
    order: Sequence[str] | None = None,
    origin: Origin | None = None,
) -> Dataset:
    """Make a Dataset of class folders.

    class_names: folder -> class name, if replacing `_` by a space is not enough. order: the classes in natural order, if it
    is not the code-point order of the folders.
    """
    notes = list(notes)
    train, test = _one_case(train, test, notes)
    folders = sorted({f.name for f in (*train, *test)})
    if order is not None:
        place = {f: i for i, f in enumerate(order)}
        folders.sort(key=lambda f: place.get(f, len(place)))
    domains = sorted({f.domain for f in (*train, *test)})
    label, domain = {f: i for i, f in enumerate(folders)}, {d: i for i, d in enumerate(domains)}

    def split(part: list[ClassFolder]) -> Split:
        part = sorted(part, key=lambda f: (f.domain, label[f.name], f.path))
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

    names = tuple(class_names[f] if class_names else names_of.readable(f).replace("_", " ") for f in folders)
    return Dataset(
        name,
        names,
        tuple(names_of.readable(d) or name for d in domains),
        split(train),
        split(test),
        templates,
        flip,
        tuple(names_of.readable(note) for note in notes),
        tuple(folders),
        origin,
    )


def _one_case(
    train: list[ClassFolder], test: list[ClassFolder], notes: list[str]
) -> tuple[list[ClassFolder], list[ClassFolder]]:
    """Join classes whose names differ only in case, unless one domain of one part has both."""
    spellings: dict[str, set[str]] = {}
    for folder in (*train, *test):
        spellings.setdefault(folder.name.lower(), set()).add(folder.name)
    one: dict[str, str] = {}
    for found in spellings.values():
        if len(found) == 1:
            continue
        first, *others = sorted(found)
        shown = " and ".join((first, *others))
        places = [
            (part, f.domain, f.name) for part, fs in (("train", train), ("test", test)) for f in fs if f.name in found
        ]
        if len({(part, domain) for part, domain, _ in places}) < len(set(places)):
            notes.append(f"the classes {shown} differ only in case; one folder has both, so they stay two classes")
        else:
            notes.append(f"the folders {shown} differ only in case and are one class")
            one |= dict.fromkeys(others, first)
    if not one:
        return train, test
    return tuple([f._replace(name=one.get(f.name, f.name)) for f in part] for part in (train, test))  # type: ignore[return-value]


def parts(root: str, notes: list[str], test_part: str | None = None) -> tuple[list[ClassFolder], list[ClassFolder]]:
    """The class folders of the train and of the test folder, which may be sorted into domains, above or below.

    Raises UserError if there is no such tree under `root`.
    """
    looked: list[str] = []
    found = find_parts(root, looked, notes, test_part=test_part)
    if found is None:
        train, test = _domains_outside(root, looked, notes, test_part)
    else:
        left_out: list[str] = []
        inside = [domain_folders(root, part, notes=left_out) for part in found]
        if any(f.domain for f in inside[0]) != any(
            f.domain for f in inside[1]
        ):  # an odd first folder misled one of them
            left_out = []
            inside = [class_folders(root, part, notes=left_out) for part in found]
        notes += left_out
        train, test = inside
    for what, one, other in (("train", train, test), ("test", test, train)):
        if only := sorted(
            {
                (f.domain, f.name)
                for f in one
                if (f.domain, f.name.lower()) not in {(o.domain, o.name.lower()) for o in other}
            }
        ):
            shown = ", ".join("/".join(filter(None, key)) for key in only[:5])
            notes.append(
                f"{counted(len(only), 'class folder')} only in {what}: {shown}{', ...' if len(only) > 5 else ''}"
            )
    domains = {d: {f.name for f in train if f.domain == d} for d in sorted({f.domain for f in train})}
    if len(domains) > 1 and not set.intersection(*domains.values()):
        notes.append(f"no class is in every domain ({', '.join(domains)})")
    return train, test


def _nearest(root: str) -> str:
    """What a tree without train and test folders looks like, and what it lacks."""
    images, folders = listing(root)
    if folders and (classes := [name for name in folders if listing(os.path.join(root, name))[0]]):
        found = f"<class>/<image>, with {counted(len(classes), 'class folder')} such as {classes[0]}"
    elif folders and holds_domains(root, ""):
        found = f"<domain>/<class>/<image>, with {counted(len(folders), 'domain')} such as {folders[0]}"
    else:
        return f"\nNearest: {counted(len(images), 'image')} in no class folder." if images else ""
    return f"\nNearest: {found}. Nothing says what is for testing: give --split-file, or make train and test folders."


def _domains_outside(
    root: str, looked: list[str], notes: list[str], test_part: str | None
) -> tuple[list[ClassFolder], list[ClassFolder]]:
    train, test, others = [], [], []
    for name in subfolders(root):
        if found := find_parts(os.path.join(root, name), looked, notes, test_part=test_part):
            train += class_folders(root, f"{name}/{found[0]}", name, notes=notes)
            test += class_folders(root, f"{name}/{found[1]}", name, notes=notes)
        else:
            others.append(name)
    if not train:
        raise UserError(
            f"no train and test images found. {looked_for(looked)}{_nearest(root)}\n{LAYOUTS}{archives([root])}"
        )
    if others:
        notes.append(f"folders left out because they have no train and test folders: {', '.join(others)}")
    return train, test
