"""Split files: lists of the images for training and for testing.

A split file is JSON, `{"train": [path, ...], "test": [path, ...]}`, or lines `train path` / `test path`. Paths are
relative to the root of the data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from fastmerge.errors import UserError


def read(split_file: str) -> Iterable[tuple[str, str, str]]:
    """Yield (`train` or `test`, path, place in the file) for every entry.

    Raises UserError for a file that cannot be read, or an entry of another form.
    """
    form = 'Expected JSON {"train": [path, ...], "test": [path, ...]} or lines "train path" / "test path".'
    try:
        with open(split_file, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read split file {split_file}: {error}. {form}") from error
    if text.lstrip().startswith("{"):
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"split file {split_file} is not JSON: {error}. {form}") from error
        if set(data) != {"train", "test"} or not all(
            isinstance(paths, list) and all(isinstance(path, str) for path in paths) for paths in data.values()
        ):
            raise UserError(f"split file {split_file} has the keys {sorted(data)}. {form}")
        entries = ((part, path, f"{split_file}, {part}[{i}]") for part in data for i, path in enumerate(data[part]))
    else:
        lines = ((number, line.split(maxsplit=1)) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        entries = ((words[0], words[-1].strip(), f"{split_file}, line {number}") for number, words in lines)
    for part, path, where in entries:
        if part not in ("train", "test") or part == path:
            raise UserError(f"{where}: expected 'train' or 'test' with a path after it, got {part!r}. {form}")
        yield part, path.removeprefix("./"), where
