"""Reads files of weights: finds the tensors, unwraps them, and reports what does not fit the model.

Files of other programs hold the state dict inside an entry (`state_dict`, `model`, ...), with a prefix that a wrapper
module left (`module.`, `model.`, `_orig_mod.`), or in fp16. What was unwrapped is said in the run's header.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastmerge.errors import UserError, first_line
from fastmerge.wording import counted

ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")  # the first one found is used, as in timm
PREFIXES = ("module.", "_orig_mod.", "model.")
ARCHIVE_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's TorchScript archives
ARCHIVE = "OpenAI's archive"  # what `read` says of a file with them
SHOWN = 3  # names of tensors in a message


def read(
    path: Path, own: Collection[str], content: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file (.safetensors, or torch's .pt, .pth, .bin, TorchScript), floats as fp32; and what was unwrapped,
    in words. own: names in the model, which no prefix is taken from. content: what would be in the file.

    Raises:
        UserError: the file cannot be read, holds no tensors, or holds objects other than tensors, which could run code.
    """
    try:
        content = _content(path) if content is None else content
    except Exception as error:  # unpickling, safetensors and the zip reader share no base class
        raise refused(path, reason(error)) from None
    found: list[str] = []
    if entry := next(
        (e for e in ENTRIES if isinstance(content, Mapping) and isinstance(content.get(e), Mapping)), None
    ):
        content = content[entry]
        found.append(f"entry {entry}")
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise refused(path, f"it holds {_kind(content)}, not tensors by name")
    tensors = {str(k): v.float() if v.is_floating_point() else v for k, v in content.items() if isinstance(v, Tensor)}
    while prefix := _prefix(tensors, own):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        found.append(f"prefix {prefix}")
    if tensors.keys() >= set(ARCHIVE_EXTRAS):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ARCHIVE_EXTRAS}
        found.append(ARCHIVE)
    return tensors, found


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # of timm's training script
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            return torch.jit.load(str(path), map_location="cpu").state_dict()


def _prefix(tensors: Iterable[str], own: Collection[str]) -> str | None:
    """The prefix that most names share and no name of the model has."""
    names = list(tensors)
    for prefix in PREFIXES:
        if 2 * sum(n.startswith(prefix) for n in names) > len(names) and not any(n.startswith(prefix) for n in own):
            return prefix
    return None


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"the entries {', '.join(map(str, list(content)[:5]))}" if content else "no entry"
    return f"a {type(content).__name__}"


def reason(error: Exception) -> str:
    """Why a file could not be read, in one line, without torch's advice to let the file run code."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return (
            "it holds other Python objects than tensors, which could run code, or is damaged; save the state dict alone, "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        )
    return first_line(error)


def fit(
    module: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, extra: bool = False, name: str = ""
) -> list[str]:
    """Copy `tensors` into `module`, all of them finite, every name and shape the same. extra: names that the model does
    not have are left out, and returned. name: of the model, for messages.

    Raises:
        UserError: what is missing, what the model does not have, what has another shape; nothing is copied then.
    """
    own = module.state_dict()
    missing = [n for n in own if n not in tensors]
    unexpected = [n for n in tensors if n not in own]
    shapes = [n for n, t in own.items() if n in tensors and tensors[n].shape != t.shape]
    pairs = [f"{n} ({_size(tensors[n])} in the file, {_size(own[n])} in the model)" for n in shapes]
    wrong = [f"missing: {len(missing)} of {len(own)} tensors, {some(missing)}"] if missing else []
    if unexpected and (missing or not extra):
        wrong.append(f"not in the model: {len(unexpected)}, {some(unexpected)}")
    if shapes:
        wrong.append(f"of another shape: {len(shapes)}, {some(pairs)}")
    if wrong:
        raise refused(path, "; ".join(wrong), name)
    check_finite({n: t for n, t in tensors.items() if n in own}, f"--pretrained {path}")
    module.load_state_dict({n: tensors[n] for n in own})
    return unexpected


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError that names the tensors with a value that is not finite. where: how the message begins."""
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(
            f"{where}: {counted(len(bad), 'tensor holds', 'tensors hold')} values that are not finite: {some(bad)}. A model "
            "with them predicts nothing; use another file"
        )


def refused(path: Path, why: str, name: str = "") -> UserError:
    of = f" of {name}" if name else ""
    return UserError(f"--pretrained {path}: cannot be loaded into this model ({why}); expected the state dict{of}")


def some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"
