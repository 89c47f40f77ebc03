"""Data sets of the Hugging Face library `datasets` on disk: a folder of `save_to_disk`, or parquet files as on the hub.

    python -m fastmerge --dataset huggingface --data-root DIR        # pip install -e ".[huggingface]"

DIR holds `dataset_dict.json` and a folder per split (`DatasetDict.save_to_disk`), or parquet files named after their split,
`train-00000-of-00001.parquet`, in DIR, `DIR/data` or another folder in it. Parquet is converted once into the cache of
`datasets` (HF_HOME). Splits: train; and test, else validation or the like; a single split `train` is divided by our own
rule (split.py). Columns: the one of images; the class label, called `label` or the only one of this type; and `domain`,
if there is one.
"""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.files import ImageReader, data_root, decode, files_hash
from fastmerge.data.split import by_hash, digest
from fastmerge.data.tree import TESTS, ClassFolder, check_test_part
from fastmerge.errors import UserError
from fastmerge.wording import counted

LAYOUT = (
    "Expected a folder of DatasetDict.save_to_disk (dataset_dict.json), or parquet files that are named after their split, "
    "train-*.parquet and test-*.parquet."
)
LABELS = ("label", "labels", "fine_label", "class", "category", "target")
SPLITS = ("train", *TESTS, "eval")


def load(root: str | None, *, test_part: str | None = None, skip_bad_images: bool = False) -> Dataset:
    """The data set in `root`. test_part: the split for testing.

    Raises UserError if the library is missing, nothing of the two forms is found, or splits or columns are unclear.
    """
    root = data_root("huggingface", root)
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data set 'huggingface' needs the package datasets: pip install -e \".[huggingface]\" in its folder"
        ) from None
    try:
        parts, files = _read(datasets, root)
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise several kinds for damaged files
        raise UserError(f"data set 'huggingface': cannot read {root}: {error}. {LAYOUT}") from error
    check_test_part(test_part, f"data set 'huggingface' in {root}", parts)
    tests = [test_part] if test_part else [name for name in SPLITS[1:] if name in parts]
    if "train" not in parts:
        raise UserError(
            f"data set 'huggingface': {root} has the splits {', '.join(parts)}; expected train, and {' or '.join(TESTS)}. "
            f"{LAYOUT}"
        )
    used = ["train", *tests[:1]]
    train = parts["train"]
    image, label = _image(datasets, train), _label(datasets, train)
    names, labels = _index("label", [parts[u][label] for u in used], getattr(train.features[label], "names", None))
    name = os.path.basename(os.path.abspath(root))
    domain_names: tuple[str, ...] = (name,)
    domains = [np.zeros_like(own) for own in labels]
    if "domain" in train.column_names:
        known = getattr(train.features["domain"], "names", None)
        domain_names, domains = _index("domain", [parts[u]["domain"] for u in used], known)
    splits = [
        _split(datasets, u, parts[u], image, own, where, files, skip_bad_images)
        for u, own, where in zip(used, labels, domains, strict=True)
    ]
    notes = [f"{tests[0]} is used for testing"] if tests and tests[0] != "test" else []
    if not tests:
        splits, note = _divided(splits[0], names, domain_names if "domain" in train.column_names else ("",))
        notes.append(note)
    return Dataset(
        name,
        class_names=tuple(n.replace("_", " ") for n in names),
        domain_names=domain_names,
        train=splits[0],
        test=splits[1],
        templates=("a photo of a {}.",),
        flip=False,
        notes=tuple(notes),
        keys=names,
    )


def _divided(split: Split, names: Sequence[str], domains: Sequence[str]) -> tuple[list[Split], str]:
    """Train and test by our own rule (split.py), on the numbers of the rows; and a note that says so."""
    rows = {image: i for i, image in enumerate(split.ids)}
    groups: dict[tuple[int, int], list[str]] = {}
    for image, domain, label in zip(split.ids, split.domains.tolist(), split.labels.tolist(), strict=True):
        groups.setdefault((domain, label), []).append(image)
    parts = by_hash([ClassFolder(domains[d], names[c], "", images) for (d, c), images in sorted(groups.items())])
    indices = [np.array(sorted(rows[image] for f in part for image in f.images), np.int64) for part in parts]
    if not len(indices[1]):
        raise UserError("data set 'huggingface': no class has two images, so none is left for testing.")
    note = (
        "there is no split for testing: 20 % of every class by a hash of the row numbers are for testing, digest "
        + digest(parts[1])
    )
    return [split.subset(own) for own in indices], note


def _read(datasets: Any, root: str) -> tuple[dict[str, Any], list[str]]:
    """The splits by name, and their files."""
    if os.path.exists(os.path.join(root, "dataset_dict.json")):
        return dict(datasets.load_from_disk(root)), sorted(glob.glob(os.path.join(glob.escape(root), "*", "*.arrow")))
    if os.path.exists(os.path.join(root, "state.json")):
        raise UserError(f"{root} is a single split, saved by Dataset.save_to_disk. {LAYOUT}")
    files = sorted(glob.glob(os.path.join(glob.escape(root), "**", "*.parquet"), recursive=True))
    by_split: dict[str, list[str]] = {}
    configurations: dict[str, str] = {}
    for file in files:
        path = os.path.relpath(file, root)
        if found := _splits(path):
            by_split.setdefault(found[0], []).append(file)
            above = list(itertools.takewhile(lambda name: not _splits(name), path.split(os.sep)[:-1]))
            configurations["/".join(name for name in above if name != "data")] = os.path.join(root, *above)
    if len(configurations) > 1:
        raise UserError(
            f"data set 'huggingface': {root} has parquet files of {len(configurations)} configurations, which are different "
            f"data sets: {', '.join(sorted(name or 'beside the folders' for name in configurations))}. Choose one, such as "
            f"--data-root {max(configurations.values())}"
        )
    if not by_split:
        raise UserError(f"data set 'huggingface': nothing found in {root} ({len(files)} parquet files). {LAYOUT}")
    return {split: datasets.Dataset.from_parquet(own) for split, own in by_split.items()}, files


def _splits(path: str) -> list[str]:
    """The splits that the words of a path name."""
    words = re.split(r"[^a-z]+", path.lower())
    return [split for split in SPLITS if split in words]


def _image(datasets: Any, part: Any) -> str:
    found = [name for name, kind in part.features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name in ("image", "img", "jpg", "png") if name in part.column_names]
    if len(found) != 1:
        raise UserError(f"data set 'huggingface': expected one column of images, found {found or part.column_names}.")
    return found[0]


def _label(datasets: Any, part: Any) -> str:
    classes = [
        name for name, kind in part.features.items() if isinstance(kind, datasets.ClassLabel) and name != "domain"
    ]
    named = [name for name in LABELS if name in part.column_names]
    found = classes if len(classes) == 1 else named[:1]
    if not found:
        raise UserError(
            f"data set 'huggingface': no column says the class; expected one called {' or '.join(LABELS[:2])}, found "
            f"{', '.join(part.column_names)}."
        )
    return found[0]


def _index(what: str, columns: list[Any], names: list[str] | None) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Names and, for every column, the index of every row. Without given names: the sorted values. Raises UserError for a
    row that has none. what: a row has, for the message."""
    values = [list(column) for column in columns]
    for column in values:
        bad = [v for v in column if v is None or (names is not None and not 0 <= v < len(names))]
        if bad:
            raise UserError(
                f"data set 'huggingface': {counted(len(bad), 'image has', 'images have')} no {what} ({bad[0]}); "
                "choose another --test-part, or take them out of the data set."
            )
    if names is None:
        every = sorted({value for column in values for value in column})
        place = {value: i for i, value in enumerate(every)}
        return tuple(map(str, every)), [np.array([place[v] for v in column], np.int64) for column in values]
    return tuple(names), [np.array(column, np.int64) for column in values]


def _split(
    datasets: Any, what: str, part: Any, image: str, label: np.ndarray, domain: np.ndarray, files: list[str], skip: bool
) -> Split:
    raw = part.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    ids = [f"{what}/{i:07d}" for i in range(len(raw))]

    def read(index: int, size: int) -> np.ndarray:
        found = raw[index][image]
        return decode(io.BytesIO(found["bytes"]) if found["bytes"] is not None else found["path"], size)

    reader = ImageReader(read, ids.__getitem__, skip)
    return Split(label, domain, ids, reader, skip, contents=lambda: files_hash(files))
