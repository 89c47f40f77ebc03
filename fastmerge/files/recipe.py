"""The recipe of a merge: what was asked for, the hashes of all inputs, the versions. It is in the metadata of every
output file.

`fastmerge merge --recipe merged/` reads it, checks the inputs by their hashes and merges again, to the same bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import fastmerge
from fastmerge.errors import UserError
from fastmerge.files.hashes import sha256
from fastmerge.files.inputs import open_input
from fastmerge.files.plan import Options, Plan

KEY = "fastmerge_merge"


def placeholder(number: int) -> str:
    """Text of the length of a hash, in its place until the hash is known."""
    return f"hash-of-file-{number}".ljust(64, "-")


def recipe(plan: Plan) -> tuple[dict[str, Any], dict[Path, str]]:
    """(the recipe with placeholders for hashes, file -> placeholder)."""
    pending: dict[Path, str] = {}
    inputs = []
    for one in plan.inputs:
        for file in one.files:
            pending.setdefault(file, placeholder(len(pending)))
        inputs.append({"name": one.label, "files": {str(file.absolute()): pending[file] for file in one.files}})
    about = {
        "fastmerge": fastmerge.__version__,
        "torch": torch.__version__,
        "options": plan.options.to_dict(),
        "inputs": inputs,
    }
    return about, pending


def identity(plan: Plan, **how: Any) -> str | None:
    """What must be equal for an interrupted merge to go on: options, versions, the files as they are, and `how` they are
    merged, which the journal depends on. None: it cannot, as an input is in memory alone, and another one would look the
    same."""
    if not all(one.files for one in plan.inputs):
        return None
    about, _ = recipe(plan)
    about["inputs"] = [[str(file.absolute()), *stamp] for one in plan.inputs for file, stamp in one.files.items()]
    return json.dumps(about | how, sort_keys=True)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a merged file or folder.

    Raises:
        UserError: it was not written by `fastmerge merge`.
    """
    metadata = open_input(path).metadata
    try:
        about = json.loads(metadata[KEY])
        options = about["options"]
        sources = (*options["models"], options["base"], *options.get("statistics", []), options.get("like"))
        if "state dict" in sources:
            raise UserError(f"{path}: merged from tensors in memory, which cannot be read again")
        return about
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path}: no recipe in its metadata; `fastmerge merge` did not write it") from None


def check_inputs(about: dict[str, Any]) -> None:
    """Compare the inputs of a recipe with their hashes.

    Raises:
        UserError: one is missing or has changed.
    """
    for one in about["inputs"]:
        for file, expected in one["files"].items():
            if not Path(file).is_file():
                raise UserError(f"{file}: no such file, but the recipe needs it (SHA-256 {expected})")
            if (found := sha256(Path(file))) != expected:
                raise UserError(f"{file}: changed since it was merged: SHA-256 {found}, the recipe has {expected}")


def options_of(about: dict[str, Any]) -> Options:
    return Options(**about["options"])
