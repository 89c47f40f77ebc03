"""A folder of a peft LoRA adapter as a model: base + scale B A, the product, never A and B apart.

Averaging A and B separately adds cross terms B_i A_j, which belong to no adapter (peft issues 3004, 3013).
scale: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. Tensors that the adapter leaves alone are the base's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.headers import Entry
from fastmerge.files.inputs import ADAPTER, Input, shown
from fastmerge.files.stamp import stamp_of

PREFIX = "base_model.model."


@dataclass
class Adapter(Input):
    """pairs: name of the weight -> (A, B, scale, transposed). Its entries are those that the adapter replaces whole."""

    pairs: dict[str, tuple[Entry, Entry, float, bool]] = None  # type: ignore[assignment]

    def on(self, base: Input) -> Input:
        """The model that this adapter makes of `base`.

        Raises:
            UserError: the adapter changes a tensor that the base lacks, or that has another shape there.
        """
        entries = dict(base.entries)
        for name, entry in self.entries.items():
            entries[_found(name, base, self.label)] = entry
        for name, pair in self.pairs.items():
            key = _found(name, base, self.label)
            entries[key] = _product(self.label, base.entries[key], *pair)
        return Input(self.label, self.files, entries, folder=self.folder, notes=self.notes)


def open_adapter(path: Path) -> Adapter:
    """Raises UserError: no LoRA, or files that cannot be read."""
    from fastmerge.files.inputs import _open_file

    try:
        stamp = stamp_of(path / ADAPTER)
        config = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / ADAPTER}: not a peft adapter's settings ({error})") from None
    if kind != "LORA" or config.get("use_dora"):
        raise UserError(
            f"{path}: a {'DoRA' if kind == 'LORA' else kind} adapter; only LoRA is a product B A: merge it first"
        )
    files = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).is_file()]
    if not files:
        raise UserError(f"{path}: no adapter_model.safetensors beside {ADAPTER}")
    found = _open_file(files[0])
    halves: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for name, entry in found.entries.items():
        short = name.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", short)
        if match:
            halves.setdefault(match[1], {})[match[2]] = entry
        elif "lora_" in short:
            raise UserError(f"{path}: {name} is no product B A of a weight; merge this adapter with peft first")
        else:
            whole[short.replace(".modules_to_save", "").replace(".base_layer", "")] = entry
    half = [name for name, both in halves.items() if len(both) < 2]
    if half:
        raise UserError(f"{path}: {shown(half)} has only one of lora_A and lora_B; the adapter is damaged")
    pairs = {}
    for module, both in halves.items():
        rank, scale = both["A"].shape[0], _alpha(config, module)
        scale = scale / rank**0.5 if config.get("use_rslora") else scale / rank
        pairs[f"{module}.weight"] = (both["A"], both["B"], scale, bool(config.get("fan_in_fan_out")))
    opened = {path / ADAPTER: stamp} | found.files
    return Adapter(str(path), opened, whole, found.metadata, folder=path, notes=found.notes, pairs=pairs)


def _alpha(config: dict[str, Any], module: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(config.get("lora_alpha", 8))


def _found(name: str, base: Input, label: str) -> str:
    """The base's name of an adapted tensor; prefixes of wrappers may differ."""
    options = [key for key in base.entries if key == name] or [
        key for key in base.entries if name.endswith(f".{key}") or key.endswith(f".{name}")
    ]
    if len(options) != 1:
        what = "no tensor" if not options else f"{len(options)} tensors ({shown(options)})"
        raise UserError(f"{label}: it changes {name}, but {what} of the base {base.label} has that name")
    return options[0]


def _product(label: str, base: Entry, a: Entry, b: Entry, scale: float, transposed: bool) -> Entry:
    rank, shape = a.shape[0], (b.shape[0], *a.shape[1:])
    given = shape[::-1] if transposed else shape
    if b.shape[1] != rank or given != base.shape:
        raise UserError(f"{label}: B A of {base.name} has shape {list(given)}, but the base's has {list(base.shape)}")
    kept: list[Tensor] = []

    def part(low: int, high: int) -> Tensor:
        if not kept:  # the whole product at once, so that its bits do not depend on the part
            left, right = b.whole().view(b.shape[0], rank).float(), a.whole().view(rank, -1).float()
            delta = scale * (left @ right)
            delta = (delta.T if transposed else delta).reshape(-1)
            kept.append(base.whole().float() + delta)
        return kept[0][low:high]

    def release(low: int, high: int) -> None:
        if high == base.numel:
            kept.clear()

    return Entry(base.name, torch.float32, base.shape, part, release=release)
