"""What can be merged: one safetensors or .pt file, a folder of shards, a run folder, a peft adapter, a state dict."""

from __future__ import annotations

import json
import os
import pickle
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.headers import NAMES, Entry, read_header
from fastmerge.files.stamp import Stamp, check_stamp, stamp_of

SINGLE = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
NESTED = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the weights
ADAPTER = "adapter_config.json"


@dataclass
class Input:
    """label: what messages call it. files: every file that holds its tensors, and its stamp when it was opened. entries: by
    name. shards: name -> file name, where there are several files. folder: where its config files are, if it is a folder.
    notes: what the plan says of it."""

    label: str
    files: dict[Path, Stamp]
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)


def open_input(source: Any) -> Input:
    """An input from a path, or from a mapping of names to tensors; an opened one is returned as it is.

    Raises:
        UserError: nothing that can be merged is there.
    """
    if isinstance(source, Input):
        return source
    if isinstance(source, Mapping):
        return of_tensors("state dict", {}, source)
    if not str(source):
        raise UserError("an empty name of a model; name a file or a folder")
    path = Path(source).expanduser()
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file or folder") from None
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or has a zero byte
        raise UserError(f"{path}: cannot be opened ({error})") from None
    if stat.S_ISDIR(kind):
        return _open_folder(path)
    if not stat.S_ISREG(kind):
        raise UserError(f"{path}: neither a file nor a folder (a pipe or a device has no tensors at fixed places)")
    return _open_file(path)


def _open_file(path: Path) -> Input:
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return _open_torch(path)
    entries, metadata, stamp = read_header(path)
    return Input(str(path), {path: stamp}, entries, metadata)


def _open_torch(path: Path) -> Input:
    """A file of torch.save: tensors only, no code is run; mapped, unless it has the format from before torch 1.6."""
    try:
        stamp = stamp_of(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle: it is read, or refused in one line
            try:
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors (a pickled object could run code, so it is not read); save its state_dict()"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a whole file of torch.save ({str(error).splitlines()[0]})") from None
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: no tensors by name in it; expected a state dict, or one under {', '.join(NESTED)}")
    return of_tensors(str(path), {path: stamp}, content)


def of_tensors(label: str, files: dict[Path, Stamp], content: Mapping[str, Any]) -> Input:
    """An input of tensors in memory; what is no tensor is left out, and said."""
    entries, other = {}, []
    for name, value in content.items():
        if not isinstance(value, Tensor):
            other.append(str(name))
            continue
        if value.dtype not in NAMES or value.layout != torch.strided:
            raise UserError(
                f"{label}: tensor {name} is {value.dtype}; convert it to one of {', '.join(NAMES.values())}"
            )
        entries[str(name)] = _of_tensor(str(name), value.detach(), files)
    found = Input(label, files, entries)
    if other:
        found.notes.append(f"{label}: left out what is no tensor: {shown(other)}")
    return found


def _of_tensor(name: str, value: Tensor, files: dict[Path, Stamp]) -> Entry:
    def part(low: int, high: int) -> Tensor:
        for file, stamp in files.items():
            check_stamp(file, stamp)
        return value.reshape(-1)[low:high].cpu()

    tie = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
    return Entry(name, value.dtype, tuple(value.shape), part, tie if value.numel() else None)


def _open_folder(path: Path) -> Input:
    if (path / ADAPTER).is_file():
        from fastmerge.files.adapter import open_adapter

        return open_adapter(path)
    indices = sorted(path.glob("*.index.json"))
    if len(indices) > 1:
        preferred = [file for file in indices if file.name.startswith("model.safetensors")]
        if len(preferred) != 1:
            raise UserError(f"{path}: {len(indices)} index files; name one model's files, or leave one index there")
        indices = preferred
    if indices:
        return _open_shards(path, indices[0])
    for name in SINGLE:
        if (path / name).is_file():
            found = _open_file(path / name)
            found.label, found.folder = str(path), path
            return found
    files = sorted([*path.glob("*.safetensors"), *path.glob("*/model.safetensors")])
    if len(files) == 1:
        found = _open_file(files[0])
        found.label, found.folder = str(path), path
        return found
    if files:
        raise UserError(f"{path} has {len(files)} models; choose one of {shown([str(file) for file in files])}")
    raise UserError(
        f"{path}: no model there; expected {', '.join(SINGLE)}, shards with an index, {ADAPTER}, or a folder of a run"
    )


def _open_shards(path: Path, index: Path) -> Input:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
            raise ValueError("its weight_map must give file names of its own folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of shards ({error})") from None
    found = Input(str(path), {}, {}, folder=path, shards=dict(places))
    for name in sorted(set(places.values())):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: no such file, but {index.name} names it; download it again")
        shard = _open_file(path / name)
        found.files |= shard.files
        found.notes += shard.notes
        found.metadata |= shard.metadata
        wrong = [key for key in shard.entries if places.get(key) != name]
        if wrong:
            raise UserError(f"{path / name}: holds {shown(wrong)}, which {index.name} does not place there")
        found.entries |= shard.entries
    missing = sorted(places.keys() - found.entries)
    if missing:
        raise UserError(f"{index}: names {shown(missing)}, but no shard holds them")
    return found


def shown(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
