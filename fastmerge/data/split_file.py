"""Split files: lists of the images for training and for testing, in the forms in which they are published.

    {"train": [path, ...], "test": [path, ...]}        JSON; CoOp's has [path, label, class name] in place of a path
    train path                                          text, one image a line
    train                                               text with sections (RAPF): the paths follow, then `test`
    data: [path, ...], targets: [label, ...]            YAML, one file per part (CODA-Prompt, mammoth, InfLoRA)
    path label                                          text, one file per part (DomainNet, PACS, FACIL)
    images.txt, image_class_labels.txt, train_test_split.txt    CUB-200-2011

Where there is one file per part, the name of the file says which (`..._train.yaml`, `..._test.yaml`). One of the two is
enough, the other is found beside it. A folder stands for all lists in it, such as those of DomainNet's six domains.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml

from fastmerge.data.files import image_suffixes
from fastmerge.data.tree import TESTS
from fastmerge.errors import UserError
from fastmerge.wording import counted

FORM = (
    'Expected JSON {"train": [path, ...], "test": [path, ...]}, lines "train path" / "test path", sections "train" and '
    '"test" of paths, or a pair ..._train and ..._test of YAML files (data, targets) or of lists "path label".'
)
PART = re.compile(r"(?<![a-z])(?:train|(?:cross)?val|test|valid|validation)(?![a-z])")
LABELLED = "path label lists"
NUMBERED = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


class Entry(NamedTuple):
    """One image. part: as in the file. label: the list's own number of the class. name: the list's name of the class.

    where: the place in the file, for messages.
    """

    part: str
    path: str
    label: int | None
    name: str | None
    where: str


class SplitList(NamedTuple):
    """form: what kind of list it is, in words. entries: train and test only. notes: what was left out."""

    form: str
    entries: list[Entry]
    notes: list[str]


def read(split_file: str, test_part: str | None = None) -> SplitList:
    """The images in a split file, its pair, or a folder of lists. test_part: the part to test on, such as `val`.

    Raises UserError for a file that cannot be read, an entry of another form, an image that is listed twice, or a list
    without images for training or for testing.
    """
    split_file = os.path.expanduser(split_file)
    numbered = split_file if os.path.isdir(split_file) else os.path.dirname(split_file)
    if os.path.isdir(split_file) or os.path.basename(split_file).lower() in NUMBERED:
        by_lower = {name.lower(): name for name in sorted(os.listdir(numbered or "."), reverse=True)}
        files = [os.path.join(numbered, by_lower.get(name, name)) for name in NUMBERED]
        if all(map(os.path.isfile, files)):
            return chosen("CUB's numbered files", list(_numbered(files)), split_file, test_part)
    return read_files(_files(split_file), split_file, test_part)


def read_files(files: Iterable[str], source: str, test_part: str | None = None) -> SplitList:
    """As `read`, for these files. source: what they are called in messages."""
    form, entries = "", []
    for file in files:
        form, more = read_one(file)
        entries += more
    return chosen(form, entries, source, test_part)


def chosen(form: str, entries: list[Entry], source: str, test_part: str | None = None) -> SplitList:
    """The entries for training and testing: one part besides `train`, no image twice, no file that is no image."""
    notes: list[str] = []
    found = {entry.part for entry in entries}
    tests = [part for part in TESTS if part in found]
    if test_part is not None and test_part not in tests:
        raise UserError(f"--test-part {test_part}: {source} has no such part. It has: {', '.join(tests) or 'train'}.")
    test = test_part or (tests[0] if tests else "test")
    tested = {entry.path for entry in entries if entry.part == test}
    unused = [entry for entry in entries if entry.part not in ("train", test) and entry.path not in tested]
    if unused:
        part = unused[0].part
        rest = counted(len(unused), f"image of {part} is", f"images of {part} are")
        notes.append(f"{source}: {test} is used for testing, {rest} left out (--test-part {part} tests on that part)")
    entries = [entry for entry in entries if entry.part in ("train", test)]
    is_image = [_is_image(entry.path) for entry in entries]
    if not all(is_image):
        other = [entry.path for entry, good in zip(entries, is_image, strict=True) if not good]
        notes.append(
            f"{source}: {counted(len(other), 'entry is no image', 'entries are no images')} and left out, such as {other[0]}"
        )
        entries = [entry for entry, good in zip(entries, is_image, strict=True) if good]
    train = {entry.path for entry in entries if entry.part == "train"}
    shared = [entry for entry in entries if entry.part != "train" and entry.path in train]
    # PACS tests on unseen domains, so its test lists hold all images
    if form == LABELLED and len(tested) > len(shared) == len(train):
        entries = [entry for entry in entries if entry.part == "train" or entry.path not in train]
        notes.append(f"{source}: the test lists hold the training images too; the other images are used for testing")
    first: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in first:
            raise UserError(
                f"{entry.where}: {entry.path!r} is listed twice (first for {first[entry.path].part}); list every image "
                "once."
            )
        first[entry.path] = entry
    parts = {entry.part for entry in entries}
    if missing := [part for part in ("train", test) if part not in parts]:
        raise UserError(f"split file {source} lists no image for {' and '.join(missing)}. {FORM}")
    if test != "test":
        entries = [entry if entry.part == "train" else entry._replace(part="test") for entry in entries]
    return SplitList(form, entries, notes)


def part_of(file: str) -> str | None:
    """The part that the name of a list says: `train`, or one of TESTS; None if it says none or several."""
    found = set(PART.findall(os.path.splitext(os.path.basename(file))[0].lower()))
    return found.pop().removeprefix("cross") if len(found) == 1 else None


def before_part(file: str) -> str:
    """What the name of a list says before the part: `clipart` of `clipart_train.txt`."""
    return PART.split(os.path.basename(file).lower())[0].rstrip("_-. ")


def _files(split_file: str) -> list[str]:
    """The lists that `split_file` stands for: a folder's, a pair, or one."""
    if os.path.isdir(split_file):
        names = sorted(os.listdir(split_file))
        found = [n for n in names if part_of(n) and n.lower().endswith((".txt", ".yaml", ".yml", ".json"))]
        if not found:
            raise UserError(f"split file {split_file} is a folder without lists named ..._train and ..._test. {FORM}")
        return [os.path.join(split_file, name) for name in found]
    folder, name = os.path.split(split_file)
    part = part_of(name)
    if part is None or not os.path.isdir(folder or "."):
        return [split_file]
    around = _without_part(name)
    pair = [n for n in sorted(os.listdir(folder or ".")) if part_of(n) and _without_part(n) == around]
    return [os.path.join(folder, n) for n in pair] or [split_file]


def _is_image(path: str) -> bool:
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return dot < 1 or name[dot:].lower() in image_suffixes()


def _without_part(name: str) -> str:
    return PART.sub("*", name.lower())


def read_one(file: str) -> tuple[str, list[Entry]]:
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as opened:
            text = opened.read()
    except OSError as error:
        raise UserError(f"cannot read split file {file}: {error}. {FORM}") from error
    if text.lstrip().startswith("{"):
        try:
            return _from_json(json.loads(text), file)
        except json.JSONDecodeError as error:
            raise UserError(f"split file {file} is not JSON: {error}. {FORM}") from error
    if re.search(r"^data\s*:", text, re.MULTILINE):
        return _from_yaml(text, file)
    return _from_lines(text, file)


def _from_json(data: dict[str, Any], file: str) -> tuple[str, list[Entry]]:
    if not set(data) <= {"train", *TESTS} or not all(isinstance(entries, list) for entries in data.values()):
        raise UserError(f"split file {file} has the keys {sorted(data)}. {FORM}")
    found, form = [], "JSON"
    for part, entries in data.items():
        for i, entry in enumerate(entries):
            where = f"{file}, {part}[{i}]"
            if isinstance(entry, str):
                found.append(Entry(part, _clean(entry), None, None, where))
                continue
            form = "CoOp JSON"
            if not (isinstance(entry, list) and len(entry) == 3 and [type(x) for x in entry] == [str, int, str]):
                raise UserError(f"{where}: expected a path or [path, label, class name], got {str(entry)[:80]}. {FORM}")
            found.append(Entry(part, _clean(entry[0]), entry[1], entry[2], where))
    return form, found


def _from_yaml(text: str, file: str) -> tuple[str, list[Entry]]:
    part = part_of(file)
    try:
        content = yaml.load(text, getattr(yaml, "CBaseLoader", yaml.BaseLoader))  # without C: seconds for 24,000 lines
        paths, labels = content["data"], content["targets"]
        if not len(paths) == len(labels) or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"{len(paths)} paths in data and {len(labels)} labels in targets")
        numbers = [int(label) for label in labels]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"split file {file} is not YAML with data and targets: {' '.join(str(error).split())}. {FORM}"
        ) from None
    if part is None:
        raise UserError(f"split file {file}: its name does not say train or test. {FORM}")
    return "YAML lists", [
        Entry(part, _clean(path), label, None, f"{file}, data[{i}]")
        for i, (path, label) in enumerate(zip(paths, numbers, strict=True))
    ]


def _from_lines(text: str, file: str) -> tuple[str, list[Entry]]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    part = part_of(file)
    labelled = [re.fullmatch(r"(.+?)\s+(\d+)", line) for _, line in lines]
    if part and lines and all(labelled):
        return LABELLED, [
            Entry(part, _clean(match[1]), int(match[2]), None, f"{file}, line {number}")
            for (number, _), match in zip(lines, labelled, strict=True)
            if match
        ]
    if lines and lines[0][1].lower().rstrip(":") in ("train", *TESTS):
        found, section = [], ""
        for number, line in lines:
            if line.lower().rstrip(":") in ("train", *TESTS):
                section = line.lower().rstrip(":")
            else:
                found.append(Entry(section, _clean(line), None, None, f"{file}, line {number}"))
        return "text with sections", found
    found = []
    for number, line in lines:
        first, _, path = line.replace("\t", " ", 1).partition(" ")
        if first not in ("train", *TESTS) or not path.strip():
            raise UserError(
                f"{file}, line {number}: expected 'train' or 'test' with a path after it, got {first!r}. {FORM}"
            )
        found.append(Entry(first, _clean(path.strip()), None, None, f"{file}, line {number}"))
    return "text", found


def _numbered(files: list[str]) -> Iterable[Entry]:
    """CUB-200-2011: `images.txt` gives every image a number, the other files its class and 1 for training, 0 for testing."""
    columns = [dict(numbered_lines(file)) for file in files]
    for number, path in columns[0].items():
        where = f"{files[0]}, image {number}"
        label, train = (column.get(number) for column in columns[1:])
        if label is None or not label.isdecimal() or train not in ("0", "1"):
            raise UserError(
                f"{where}: expected a class in {NUMBERED[1]} and 0 or 1 in {NUMBERED[2]}, got {label!r} and {train!r}."
            )
        yield Entry("train" if train == "1" else "test", _clean(path), int(label), None, where)


def numbered_lines(file: str) -> Iterable[tuple[str, str]]:
    """The lines `number text` of a file."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as opened:
            for line_number, line in enumerate(opened, 1):
                words = line.strip().split(maxsplit=1)
                if len(words) == 2:
                    yield words[0], words[1]
                elif words:
                    raise UserError(f"{file}, line {line_number}: expected a number and a text, got {line.strip()!r}.")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}.") from error


def _clean(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")
