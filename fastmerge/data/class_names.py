"""Class names: from the names of folders, and from a file of the user.

A folder is named `NNN.Name`, `Name_of_the_class`, or by a WordNet id; a prompt wants words. A file of names has one name
per line in the natural order of the classes; or lines `folder<tab>name` or `wnid name` (the README of ImageNet-R, CoOp's
classnames.txt, Tiny-ImageNet's words.txt); or lines `1 folder`, `2 folder`, ...
(CUB's classes.txt); or JSON, a list or an object from folder to name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from fastmerge.data import wordnet
from fastmerge.data.tree import WNID
from fastmerge.errors import UserError, nearest
from fastmerge.wording import counted

NUMBERED = re.compile(r"\d+\.(?=[^\W\d])")  # as in CUB-200-2011; `0.5` is a number


def from_folders(folders: Iterable[str], notes: list[str] | None = None) -> dict[str, str]:
    """folder -> class name. WordNet ids get their ImageNet-1K names, if all folders are such ids; what that means for the
    names is added to `notes`. Bytes that are no UTF-8 are read as Latin-1."""
    folders = sorted(set(folders))
    if folders and all(WNID.fullmatch(folder) for folder in folders):
        known = wordnet.class_names()
        unknown = sum(folder not in known for folder in folders)
        if notes is not None:
            notes.append(
                "class folders are WordNet ids: classes have their ImageNet-1K names"
                + (f", but {unknown} not in ImageNet-1K keep their ids" if unknown else "")
            )
        return {folder: known.get(folder, folder) for folder in folders}
    numbered = all(NUMBERED.match(folder) for folder in folders)
    return {
        folder: readable(NUMBERED.sub("", folder, count=1) if numbered else folder).replace("_", " ")
        for folder in folders
    }


def readable(name: str) -> str:
    """`name` as text that can be printed: a file name in another encoding than UTF-8 is read as Latin-1."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return os.fsencode(name).decode("latin-1")


def from_file(path: str, names: Sequence[str], keys: Sequence[str]) -> tuple[str, ...]:
    """The names in a file, in natural order. names: of the data set, as they are now; keys: its folders, or empty.

    Raises UserError for a file that cannot be read, another number of names, or a class without a name.
    """
    where, n = f"--class-names {path}", len(names)
    found = _read(path)
    if isinstance(found, dict):
        chosen = [found.get(key, found.get(name)) for key, name in zip(keys or names, names, strict=True)]
        if lack := [name for name, new in zip(names, chosen, strict=True) if new is None]:
            every = counted(n, "class", "classes")
            raise UserError(f"{where}: {len(lack)} of {every} without a name in it, such as {lack[0]!r}.")
    else:
        chosen = list(found)
        if len(chosen) != n:
            raise UserError(
                f"{where}: {counted(len(chosen), 'name')} for {counted(n, 'class', 'classes')}. Expected a name for every "
                f"class, in the order of the classes ({', '.join(names[:3])}, ...), or lines with a folder, a tab and a name."
            )
    if bad := [name for name in chosen if not isinstance(name, str) or not name.strip()]:
        raise UserError(f"{where}: {bad[0]!r} is not a name.")
    new = tuple(str(name).strip() for name in chosen)
    before = Counter(names)  # two classes of ImageNet-1K share their name already
    if double := [name for name, count in Counter(new).items() if count > max(1, before[name])]:
        raise UserError(f"{where}: {double[0]!r} is the name of several classes, which a text head cannot tell apart.")
    return new


def renamed(path: str, names: Sequence[str]) -> tuple[str, ...]:
    """`names` with those replaced that the file has a new name for: lines `name<tab>new name`, or a JSON object.

    Raises UserError for a file of another form, a name that is none of `names`, and a new name that is taken.
    """
    where, found = f"--class-names {path}", _read(path)
    if not isinstance(found, dict) or not all(isinstance(new, str) and new.strip() for new in found.values()):
        raise UserError(
            f"{where}: for several data sets expected lines with a name, a tab and a new name, or a JSON object."
        )
    if strange := sorted(found.keys() - set(names)):
        raise UserError(f"{where}: {strange[0]!r} is no class.{nearest(strange[0], names)}")
    new = tuple(found.get(name, name).strip() for name in names)
    before = Counter(names)
    if double := [name for name, count in Counter(new).items() if count > max(1, before[name])]:
        raise UserError(f"{where}: {double[0]!r} would be the name of several classes; choose another.")
    return new


def _read(path: str) -> list[str] | dict[str, str]:
    """The content of a file of names."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            text = file.read()
        return json.loads(text) if text.lstrip().startswith(("[", "{")) else _lines(text)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--class-names {path}: cannot read it ({error}). Expected one name per line, or JSON."
        ) from None


def _lines(text: str) -> list[str] | dict[str, str]:
    """The names; or folder -> name, if lines are `folder<tab>name` or begin with a wnid (other lines are a README's)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keyed = {}
    for line in lines:
        key, _, name = line.partition("\t") if "\t" in line else line.partition(" ")
        if "\t" in line or WNID.fullmatch(key):
            keyed[key] = name.strip().replace("_", " ") if WNID.fullmatch(key) else name.strip()
    numbers = [re.match(r"(\d+) (.+)", line) for line in lines]
    if all(numbers) and [int(n[1]) for n in numbers if n] == list(range(1, len(lines) + 1)):
        named = from_folders(n[2] for n in numbers if n)
        return [named[n[2]] for n in numbers if n]
    return keyed or lines
