"""A file of concepts: for each class, texts that describe what its images show, as a language model or a person writes them.

It is a JSON object from class names to lists of texts, and may have more classes than the data:

    {"sparrow": ["a short conical beak", "streaked brown feathers"], "heron": ["long legs", "a long neck"]}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fastmerge.errors import UserError

EXPECTED = 'a JSON object from class names to lists of texts, as in {"heron": ["long legs", "a long neck"]}'


def read_concepts(path: str, flag: str) -> dict[str, list[str]]:
    """The texts of every class in the file. flag: the setting that names it.

    Raises:
        UserError: it cannot be read, or has another form.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON
        raise UserError(f"{flag} {path}: cannot be read ({error}); expected {EXPECTED}") from None
    if not isinstance(found, dict):
        raise UserError(f"{flag} {path}: expected {EXPECTED}; got {type(found).__name__}")
    for name, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(f"{flag} {path}: class {name!r}: expected a list of at least one text that is not empty")
    return found


def check_classes(concepts: dict[str, list[str]], names: Sequence[str], flag: str) -> None:
    """Raise UserError if classes of the data have no concepts."""
    if missing := [name for name in names if name not in concepts]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{flag}: no concepts for the classes {', '.join(map(repr, missing[:5]))}{more}; add them")


def file_hash(path: str) -> str:
    """sha256 of the file."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
