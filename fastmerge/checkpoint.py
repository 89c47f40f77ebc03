"""Atomic file writes: if a write is interrupted, the file is still the complete old or new version.

A checkpoint is one safetensors file with the tensors and, in its metadata, everything else as JSON and a checksum. Every
file is written beside its target, flushed to disk and renamed, so a full disk or a killed process leaves the old file valid.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import platform
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.ranks import ranks

HOST = platform.node().replace("/", "_")


def write_atomically(path: Path, write: Callable[[Path], None], older: Path | None = None) -> int:
    """`replace` by rank 0, while the other processes of the command wait; returns the bytes that this process wrote."""
    size = 0 if ranks().rank else replace(path, write, older)
    ranks().wait()
    return size


def replace(path: Path, write: Callable[[Path], None], older: Path | None = None) -> int:
    """Call `write(temporary)`, then rename the temporary file to `path`; returns the bytes written.

    older: a previous file at `path` is moved there.

    Raises:
        UserError: the file cannot be written (full disk, no permission); a previous file at `path` is unchanged.
    """
    temporary = path.with_name(f"{path.name}.{HOST}-{os.getpid()}.part")  # another process may write the same file
    try:
        clear(path.parent)
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777  # what the umask allows; safetensors would make it private
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        if older is not None and path.exists():
            os.replace(path, older)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary.is_file():
            temporary.unlink()
        kept = "the previous version is unharmed" if path.exists() else "there is no previous version"
        raise UserError(
            f"cannot write {path}: {error}; {kept}. Free space or fix the permissions, then run the same command again"
        ) from None
    return size


def clear(folder: Path) -> None:
    """Delete the temporary files in `folder` of processes of this machine that are gone, such as a killed one."""
    for left in folder.glob(f"*.{glob.escape(HOST)}-*.part"):
        number = left.name.removesuffix(".part").rpartition("-")[2]
        if number.isdecimal() and not alive(int(number)):
            left.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Whether there is a process with this number; True where the system cannot say."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def save_text(path: Path, text: str) -> int:
    return write_atomically(path, text_writer(text))


def save_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """A table with six digits of every float, and nothing for None. Names of files that are no UTF-8 keep their bytes."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows])

    return write_atomically(path, write)


def text_writer(text: str) -> Callable[[Path], None]:
    """A function that writes `text` to a file."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write


def save_json(path: Path, values: Any) -> int:
    return save_text(path, json_text(values))


def json_text(values: Any) -> str:
    """JSON with one entry per line and a list of numbers on one line: a matrix has a line per row."""
    return _lines(values) + "\n"


def _lines(values: Any, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(values, dict) and values:
        items = [f"{json.dumps(str(key))}: {_lines(value, inner)}" for key, value in values.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + "\n" + indent + "}"
    if isinstance(values, list | tuple) and any(isinstance(value, dict | list | tuple) for value in values):
        return "[\n" + ",\n".join(inner + _lines(value, inner) for value in values) + "\n" + indent + "]"
    return json.dumps(values, allow_nan=False)


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any], older: Path | None = None) -> int:
    """Write `tensors` (any device, dtype, shape; views are copied) and `about` (as JSON) to one file.

    Returns the bytes written. older: a previous file at `path` is moved there.
    """
    # copy views: a view would keep its whole storage, and safetensors rejects shared storage
    own = {
        name: t.detach().to("cpu", copy=t.untyped_storage().nbytes() != t.nbytes).contiguous()
        for name, t in tensors.items()
    }
    metadata = {"about": json.dumps(about, allow_nan=False), "crc32": str(_checksum(own))}
    return write_atomically(path, lambda temporary: save_file(own, temporary, metadata=metadata), older)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`: tensors on the CPU, and `about`.

    Raises:
        UserError: the file cannot be read, is damaged, or `save_tensors` did not write it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if not isinstance(about, dict):
            raise TypeError("its description is not an object")
        if "crc32" in metadata and metadata["crc32"] != str(_checksum(tensors)):
            raise ValueError("its bytes changed after they were written")
        return tensors, about
    except KeyError:
        why = "another program wrote it"
    except (OSError, SafetensorError, ValueError, TypeError) as error:  # ValueError: JSON too
        why = str(error)
    raise UserError(f"{path}: not a fastmerge checkpoint ({why})")


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over the bytes of all tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        if tensors[name].numel():
            value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, value)
    return value


def resident(tensors: dict[str, Tensor]) -> int:
    """Size of the tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries named 'prefix.name', with the prefix removed."""
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}


def joined(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `select`: one dict with 'part.name' keys."""
    return {f"{part}.{name}": torch.as_tensor(t) for part, tensors in parts.items() for name, t in tensors.items()}
