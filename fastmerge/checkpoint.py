"""Atomic file writes: if a write is interrupted, the file is still the complete old or new version.

A checkpoint is one safetensors file with the tensors and, as JSON in its metadata, everything else. Every file is
written beside its target, flushed to disk and renamed, so a full disk or a killed process leaves the old file valid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmerge.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)`, then rename the temporary file to `path`.

    Raises:
        UserError: the file cannot be written (full disk, no permission); a previous file at `path` is unchanged.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        kept = "the previous version is unharmed" if path.exists() else "there is no previous version"
        raise UserError(
            f"cannot write {path}: {error}; {kept}. Free space or fix the permissions, then run the same command again"
        ) from None


def save_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def save_json(path: Path, values: Any) -> None:
    save_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write `tensors` (any device, dtype, shape; views are copied) and `about` (as JSON) to one file."""
    # copy views: a view would keep its whole storage, and safetensors rejects shared storage
    own = {
        name: t.detach().to("cpu", copy=t.untyped_storage().nbytes() != t.nbytes).contiguous()
        for name, t in tensors.items()
    }
    write_atomically(
        path, lambda temporary: save_file(own, temporary, metadata={"about": json.dumps(about, allow_nan=False)})
    )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`: tensors on the CPU, and `about`.

    Raises:
        UserError: the file cannot be read or `save_tensors` did not write it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a fastmerge checkpoint ({error}); delete it to restart this run") from None


def resident(tensors: dict[str, Tensor]) -> int:
    """Size of the tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries named 'prefix.name', with the prefix removed."""
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}


def joined(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `select`: one dict with 'part.name' keys."""
    return {f"{part}.{name}": torch.as_tensor(t) for part, tensors in parts.items() for name, t in tensors.items()}
