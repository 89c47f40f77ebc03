"""Reads class orders (or domain orders) in all published forms.

A JSON list, a YAML list, an object of either with the key `class_order` (for domains also `domain_order`, as in a run's
manifest.json), or text with an entry per line, or separated by commas or blanks. `#` begins a comment. Entries are names
(`_` may stand for a blank), folders such as WordNet ids, or indices in natural order; the form of the file says nothing
about which of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import yaml

from fastmerge.errors import UserError, nearest


def read(
    path: str, names: Sequence[str], what: str, reading: str | None = None, keys: Sequence[str] = ()
) -> tuple[int, ...]:
    """The order of `names` in the file, as indices. what: 'class', 'domain' or 'data set'. reading: 'names' or 'indices'
    where the entries could be both; None: whichever fits. keys: the folders of the classes, which may stand for their
    names.

    Raises:
        UserError: the file cannot be read, is not a permutation, or can be read in two ways that differ.
    """
    n, where = len(names), f"--class-order {path}"
    by_name = _by_name([key for key in keys if not key.isdecimal()]) | _by_name(names)  # a number is an index
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = _entries(file.read(), by_name, what, where)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no JSON
        raise UserError(f"{where}: cannot read it as a list: {' '.join(str(error).split())}.") from None
    named = [by_name.get(entry) for entry in entries]
    indexed = [int(entry) if entry.isdecimal() and int(entry) < n else None for entry in entries]
    if reading is None and _ambiguous(named, indexed):
        raise UserError(
            f"{where}: its entries are {what} names and indices at once, with different orders. Say which of the two they "
            f"are: --class-order names:{path} or --class-order indices:{path}"
        )
    if reading == "indices" or (reading is None and None in named and None not in indexed):
        named = indexed
    elif reading is None:
        named = [index if name is None else name for name, index in zip(named, indexed, strict=True)]
    order = []
    for entry, index in zip(entries, named, strict=True):
        if index == -1:
            raise UserError(f"{where}: more than one {what} is called {entry!r}; list indices 0..{n - 1} instead.")
        if index is None:
            expected = {
                "names": f"no {what} name",
                "indices": f"no index in 0..{n - 1}",
                None: f"neither a {what} name nor an index in 0..{n - 1}",
            }[reading]
            raise UserError(f"{where}: {entry!r} is {expected}.{nearest(entry, names)}")
        order.append(index)
    if double := [names[i] for i, count in Counter(order).items() if count > 1]:
        raise UserError(f"{where}: listed more than once: {some(double)}. List each {what} exactly once.")
    if missing := [names[i] for i in sorted(set(range(n)) - set(order))]:
        raise UserError(f"{where}: {len(missing)} of {n} missing: {some(missing)}. List each {what} exactly once.")
    return tuple(order)


def _ambiguous(named: list[int | None], indexed: list[int | None]) -> bool:
    """Whether the entries can be read both as names and as indices, with different results."""
    if (None in named) != (None in indexed):  # only one reading covers the whole file
        return False
    return any(None not in pair and pair[0] != pair[1] for pair in zip(named, indexed, strict=True))


def _entries(text: str, known: Collection[str], what: str, where: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and (line in known or not line.startswith("#"))]
    body = "\n".join(lines)
    if body.startswith(("[", "{")):
        try:
            content = json.loads(body)
        except json.JSONDecodeError:
            content = yaml.load(text, yaml.BaseLoader)  # such as [ant, bee]
    elif re.search(r"^(- |---|(class|domain)_order\s*:)", body, re.MULTILINE) and body not in known:
        content = yaml.load(text, yaml.BaseLoader)  # keeps text: `no` is not False, `1e3` not 1000
    else:
        return _tokens(lines, known)
    if isinstance(content, dict):
        keys = ("domain_order", "class_order") if what != "class" else ("class_order",)
        key = next((key for key in keys if content.get(key)), None)
        if key is None:
            raise UserError(f"{where}: an object without {keys[0]}; it has {some(list(content)) or 'no keys'}.")
        content = content[key]
    if isinstance(content, str):
        return _tokens(content.splitlines(), known)
    if not isinstance(content, list):
        raise UserError(f"{where}: expected a list of {what} names or indices, got {json.dumps(content)[:80]}.")
    return [_text(entry) for entry in content]


def _text(entry: Any) -> str:
    return entry if isinstance(entry, str) else json.dumps(entry)


def _tokens(lines: list[str], known: Collection[str]) -> list[str]:
    """Split a text into entries at line ends, commas or spaces, whichever leaves the smallest share of unknown ones."""
    lines = [line if line in known else re.sub(r"\s#.*", "", line) for line in lines]
    ways = [re.split(separator, "\n".join(lines)) for separator in (r"\n", r"[,\n]", r"[,\s]")]
    cleaned = [[token for part in parts if (token := _bare(part.strip(), known))] for parts in ways]

    def unfit(tokens: list[str]) -> float:
        return sum(token not in known and not token.isdecimal() for token in tokens) / max(1, len(tokens))

    return min(cleaned, key=unfit)


def _bare(token: str, known: Collection[str]) -> str:
    return token if token in known else token.strip("\"'")


def _by_name(names: Sequence[str]) -> dict[str, int]:
    """name -> index, also for names with `_` instead of a space; -1 for a name that occurs several times."""
    counts = Counter(names)
    by_name = {name: i if counts[name] == 1 else -1 for i, name in enumerate(names)}
    return {name.replace(" ", "_"): i for name, i in by_name.items()} | by_name


def some(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
