"""Reads the results of finished runs. Users may have edited the files, so every value that is needed is checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.errors import UserError

TRANSFER = ("forward_transfer", "retention")  # transfer.py; null where they have no meaning, missing in older results
OF_MATRIX = ("final_accuracy", "final_accuracy_macro", "aaa", "aaa_macro", "forgetting", "bwt", "plasticity")
METRICS = (*OF_MATRIX, *TRANSFER)
NUMBER, OPTIONAL = "a number", "a number or null"
SHAPE: dict[str, Any] = {  # of a result.json, as far as tables and plots need it; [x] is a list of at least one x
    **dict.fromkeys(METRICS, OPTIONAL),
    "final_accuracy": NUMBER,
    "accuracy_matrix": [[OPTIONAL]],
    "test_counts": [NUMBER],
    "kept_bytes": [NUMBER],
    "peak_memory_bytes": NUMBER,
    "seconds": {"train": NUMBER, "merge": NUMBER, "evaluate": NUMBER},
}
ZERO_SHOT = {name: SHAPE[name] for name in (*METRICS, "accuracy_matrix", "test_counts")}

UNSAFE = r'[/\\:*?"<>|%\x00-\x1f\x7f]'  # in names of files, on some system
LONGEST = 200  # bytes; systems take 255 with what is added

Methods = dict[str, dict[str, dict[str, Any]]]  # label -> seed -> result


def read_json(path: Path, expected: str) -> Any:
    """Read a JSON file. expected: what the file should be, for the message. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON
        raise UserError(f"{path}: cannot be read ({error}); expected {expected}") from None


def expect(path: Path, folder: bool = False) -> None:
    """Raise UserError if `path` is a folder instead of a file, or the reverse. It need not exist."""
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise UserError(
            f"{path} is {found}; expected {wanted} or nothing there. Move it away, or choose another --run-dir"
        )


def read_result(path: Path) -> dict[str, Any]:
    """The result.json of a finished run.

    Raises:
        UserError: it cannot be read, or something in it is missing or of another kind.
    """
    result = completed(read_json(path, "the result.json of a finished run"))
    check(result, SHAPE, path)
    return result | {"also": result.get("also", {})}


def completed(values: Any) -> Any:
    """A result with what an older fastmerge did not write."""
    return dict.fromkeys(TRANSFER) | values if isinstance(values, dict) else values


def check(value: Any, shape: dict[str, Any], path: Path) -> None:
    """Raise UserError for the first entry of `shape` that is missing in `value` or has another form."""
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected an object with {', '.join(list(shape)[:3])}, ...; got {type(value).__name__}"
        )
    for name, wanted in shape.items():
        if name not in value or not _fits(value[name], wanted):
            raise UserError(f"{path}: {name} is missing or has another form than fastmerge writes")


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), wanted) for name, wanted in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and bool(value) and all(_fits(entry, shape[0]) for entry in value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number or (value is None and shape == OPTIONAL)


def safe(name: str) -> str:
    """`name` as a part of a file's name, another one for every name: what cannot be in it is written as %HH, and the end of a
    long one becomes a hash."""
    made = re.sub(UNSAFE, lambda found: f"%{ord(found[0]):02X}", name)
    if len(os.fsencode(made)) <= LONGEST:
        return made
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f"{os.fsencode(made)[: LONGEST - 17].decode(errors='ignore')}~{digest}"


def folder_name(label: str, seed: int | str) -> str:
    """The name of the folder of a run."""
    return f"{safe(label)}-seed{seed}"


def finished(folder: Path, first: Sequence[str] = ()) -> Methods:
    """The results of all finished runs in a run folder: the labels `first`, then the others by name; seeds by number. The
    label of a run is that of its folder, or the one whose folder it is.

    Raises:
        UserError: a result.json is damaged.
    """
    found: Methods = {}
    for path in folder.glob("*-seed*/result.json"):
        if name := re.fullmatch(r"(.+)-seed(\d+)", path.parent.name):
            result = read_result(path)
            label = str(result.get("label", ""))
            its = folder_name(label, name[2]) == path.parent.name
            found.setdefault(label if its else name[1], {})[name[2]] = result
    place = {label: number for number, label in enumerate(first)}
    order = sorted(found, key=lambda label: (place.get(label, len(place)), label))
    return {label: dict(sorted(found[label].items(), key=lambda item: int(item[0]))) for label in order}


def read_run(path: Path) -> tuple[Methods, dict[str, Any] | None]:
    """Results and zero-shot accuracy of a run folder, or of a results.json file without its folder.

    Raises:
        UserError: there is no finished run, or a file is damaged.
    """
    if path.is_file():
        return _joined(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    methods = finished(path)
    if not methods:
        raise UserError(
            f"{path}: contains no finished run; expected a folder of fastmerge with <method>-seed<n>/result.json"
        )
    together = path / "results.json"
    return methods, _joined(together)[1] if together.exists() else None


def _joined(path: Path) -> tuple[Methods, dict[str, Any] | None]:
    values = read_json(path, "the results.json of a run folder")
    check(values, {"methods": {}}, path)
    for name, seeds in values["methods"].items():
        if not isinstance(seeds, dict) or not seeds:
            raise UserError(f"{path}: {name} is not an object of seeds")
        for seed, result in seeds.items():
            seeds[seed] = completed(result)
            check(seeds[seed], SHAPE, path)
            seeds[seed].setdefault("also", {})
    if not values["methods"]:
        raise UserError(f"{path}: contains no finished run")
    if (zero_shot := completed(values.get("zero_shot"))) is not None:
        check(zero_shot, ZERO_SHOT, path)
    return values["methods"], zero_shot


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that differ from each other."""
    folders = [(path.parent if path.is_file() else path).absolute().parts for path in paths]
    longest = max(map(len, folders))
    for parts in range(1, longest + 1):
        found = ["/".join(folder[-parts:]) for folder in folders]
        if len(set(found)) == len(found):
            return found
    return [str(path) for path in paths]
