"""WebDataset shards (github.com/webdataset/webdataset): tar files of samples `<key>.jpg` and `<key>.cls`.

    python -m fastmerge --dataset webdataset --data-root DIR

DIR holds `{train,test}/*.tar` (as in CLIP_benchmark) or `train-000000.tar`, `test-000000.tar`. A class is in `.cls` (a
number or a name), `.txt` (a name) or `.json` (its `label` or `cls`). `classnames.txt` in DIR names the numbers, and
`zeroshot_classification_templates.txt` has prompts with `{c}`. The shards are indexed once at the start and then read at the
place of every image, so they must not be compressed. Python's tarfile reads them; no other package is needed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import Any, NamedTuple

import numpy as np

from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.files import ImageReader, data_root, decode, files_hash, image_suffixes
from fastmerge.data.tree import TESTS, check_test_part
from fastmerge.errors import UserError
from fastmerge.wording import counted

LAYOUT = "Expected {train,test}/*.tar, or train-*.tar and test-*.tar, with <key>.jpg and <key>.cls in them."


class Sample(NamedTuple):
    """Where an image is: file, first byte, number of bytes. label: as written in the shard."""

    key: str
    file: str
    start: int
    size: int
    label: str


def load(root: str | None, *, test_part: str | None = None, skip_bad_images: bool = False) -> Dataset:
    """The shards in `root`. test_part: the name of the part for testing.

    Raises UserError if there are no shards, one is damaged or compressed, or a sample has no class.
    """
    root = data_root("webdataset", root)
    shards = _shards(root)
    check_test_part(test_part, f"data set 'webdataset' in {root}", shards)
    tests = [test_part] if test_part else [name for name in TESTS if name in shards]
    if "train" not in shards or not tests or tests[0] not in shards:
        there = ", ".join(f"{len(files)} of {part}" for part, files in shards.items()) or "none"
        raise UserError(f"data set 'webdataset': shards in {root}: {there}. {LAYOUT}")
    parts = {part: [sample for file in shards[part] for sample in _samples(file)] for part in ("train", tests[0])}
    names, place = _classes(root, [sample for part in parts.values() for sample in part])
    train, test = (_split(what, samples, place, shards[what], skip_bad_images) for what, samples in parts.items())
    name = os.path.basename(os.path.abspath(root))
    notes = (f"{tests[0]} is used for testing",) if tests[0] != "test" else ()
    return Dataset(name, names, (name,), train, test, _templates(root), False, notes)


def _shards(root: str) -> dict[str, list[str]]:
    """part -> its tar files, sorted."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name)
        part = next(
            (p for p in ("train", *TESTS) if name.lower().replace("_", "-").split("-")[0].split(".")[0] == p), None
        )
        if part and os.path.isdir(path):
            files = sorted(file for file in os.listdir(path) if file.endswith(".tar"))
            if files:
                found.setdefault(part, []).extend(os.path.join(path, file) for file in files)
        elif part and name.endswith(".tar"):
            found.setdefault(part, []).append(path)
    return found


def _samples(file: str) -> list[Sample]:
    """The samples of a shard, in its order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")  # as in webdataset: the key ends at the first dot
                key = f"{folder}/{stem}" if folder else stem
                ending = suffix.lower().rpartition(".")[2]
                if f".{ending}" in image_suffixes():
                    images.setdefault(key, (member.offset_data, member.size))
                elif ending in ("cls", "txt", "json") and (ending == "cls" or key not in labels):
                    content = shard.extractfile(member)
                    text = content.read().decode() if content else ""
                    label = _label(json.loads(text)) if ending == "json" else text.strip()
                    if label is not None:
                        labels[key] = label
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"data set 'webdataset': cannot read {file} ({error}). Expected an uncompressed tar file."
        ) from error
    if lack := [key for key in images if key not in labels]:
        raise UserError(f"data set 'webdataset': {file}: sample {lack[0]} has no class. {LAYOUT}")
    return [Sample(key, file, *place, labels[key]) for key, place in images.items()]


def _label(values: Any) -> str | None:
    if not isinstance(values, dict):
        return None
    return next((str(values[key]) for key in ("label", "cls", "class") if key in values), None)


def _classes(root: str, samples: list[Sample]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names, and the index of every label."""
    found = {sample.label for sample in samples}
    numbers = all(label.isdecimal() for label in found)
    path = os.path.join(root, "classnames.txt")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
        place = {str(i): i for i in range(len(names))} if numbers else {name: i for i, name in enumerate(names)}
        if strange := sorted(found - place.keys()):
            raise UserError(
                f"{path} has {counted(len(names), 'name')}; class {strange[0]!r} of the shards is none of them."
            )
        return tuple(names), place
    every = sorted(found, key=int) if numbers else sorted(found)
    return tuple(label.replace("_", " ") for label in every), {label: i for i, label in enumerate(every)}


def _templates(root: str) -> tuple[str, ...]:
    path = os.path.join(root, "zeroshot_classification_templates.txt")
    if not os.path.exists(path):
        return ("a photo of a {}.",)
    with open(path, encoding="utf-8") as file:
        lines = tuple(line.strip().replace("{c}", "{}") for line in file if line.strip())
    if bad := [line for line in lines if line.count("{}") != 1]:
        raise UserError(f"{path}: {bad[0]!r} needs exactly one {{c}} for the class name.")
    return lines


def _split(what: str, samples: list[Sample], place: dict[str, int], files: list[str], skip_bad: bool) -> Split:
    def read(index: int, size: int) -> np.ndarray:
        sample = samples[index]
        with open(sample.file, "rb") as file:
            file.seek(sample.start)
            return decode(io.BytesIO(file.read(sample.size)), size)

    ids = [f"{what}/{os.path.basename(s.file)}/{s.key}" for s in samples]
    labels = np.array([place[sample.label] for sample in samples], np.int64)
    reader = ImageReader(read, ids.__getitem__, skip_bad)
    return Split(labels, np.zeros_like(labels), ids, reader, skip_bad, contents=lambda: files_hash(files))
