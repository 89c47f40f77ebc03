"""`--extract-lora R`: the merged model minus the base as a LoRA adapter of rank R, in the layout of peft.

Of every weight of two dimensions the R largest singular directions are kept: delta ~ B A with B = U sqrt(S), A = sqrt(S) V^T,
so that both factors have the same size. That is the nearest matrix of rank R (Eckart & Young 1936); what share of the norm it
has is in extracted.csv. lora_alpha is R, so the scale is 1. peft adapts modules, so a tensor must be called MODULE.weight; it
treats embeddings differently, and a file does not say what is one: names with `embed` are left out, as are all other tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmerge.checkpoint import save_csv
from fastmerge.errors import UserError
from fastmerge.files.adapter import PREFIX
from fastmerge.files.inputs import ADAPTER, shown
from fastmerge.files.plan import OUT_DTYPES, Item, Plan
from fastmerge.files.stream import Memory, Stream
from fastmerge.wording import counted

WEIGHTS, TABLE = "adapter_model.safetensors", "extracted.csv"
COLUMNS = ("tensor", "shape", "norm", "kept", "why it was left out")


class Adapter(Memory):
    """A sink that keeps the two factors of every tensor. rows: of the table."""

    def __init__(self, plan: Plan, rank: int):
        super().__init__()
        assert plan.base is not None
        self.plan, self.rank, self.base = plan, rank, plan.base
        self.factors: dict[str, Tensor] = {}
        self.rows: list[tuple[str, str, float, float, str]] = []

    def finished(self, item: Item, about: dict[str, Any]) -> None:
        merged, start = self.tensors.pop(item.name), self.base.entries.get(item.name)
        shape = "x".join(map(str, item.shape))
        if start is None or start.shape != item.shape or not merged.is_floating_point():
            same = start is not None and start.shape == item.shape and torch.equal(merged.view(-1), start.whole())
            if not same:
                why = (
                    "not in the base"
                    if start is None
                    else "another shape"
                    if start.shape != item.shape
                    else "no floats"
                )
                self.rows.append((item.name, shape, float("nan"), 0.0, why))
            return
        delta = merged.double() - start.whole().view(item.shape).double()
        norm = float(delta.norm())
        if start.release is not None:
            start.release(0, start.numel)
        if not norm < float("inf"):
            raise UserError(f"{item.name}: values that are NaN or inf have no adapter; leave the input out")
        if not norm:
            return
        module = item.name.removesuffix(".weight")
        why = "" if len(item.shape) == 2 else counted(len(item.shape), "dimension")
        why = why or ("not the weight of a module" if module == item.name else "an embedding" * ("embed" in item.name))
        kept = 0.0 if why else self._keep(module, delta) / norm
        self.rows.append((item.name, shape, norm, kept, why))

    def _keep(self, module: str, delta: Tensor) -> float:
        """Take in B A of `delta`; returns its norm."""
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        left, values, right = left[:, : self.rank], values[: self.rank], right[: self.rank]
        dtype, root = OUT_DTYPES[self.plan.options.dtype or "fp32"], values.sqrt()
        b, a = delta.new_zeros(len(delta), self.rank), delta.new_zeros(self.rank, delta.shape[1])
        b[:, : len(root)], a[: len(root)] = left * root, root[:, None] * right
        self.factors[f"{PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        self.factors[f"{PREFIX}{module}.lora_B.weight"] = b.to(dtype)
        return float(values.norm())

    def modules(self) -> list[str]:
        names = [name.removeprefix(PREFIX) for name in self.factors]
        return [name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")]

    def lines(self) -> list[str]:
        """What the command prints."""
        lines = []
        total = sum(norm**2 for _, _, norm, _, _ in self.rows if norm == norm)
        taken = [row for row in self.rows if not row[4]]
        share = (sum((norm * kept) ** 2 for _, _, norm, kept, _ in taken) / total) ** 0.5
        least = min(taken, key=lambda row: row[3])
        lines.append(
            f"rank {self.rank} for {counted(len(taken), 'tensor')} keeps {100 * share:.1f} % of the norm of the difference "
            f"to the base; least of {least[0]}, {100 * least[3]:.1f} %"
        )
        if left := [row for row in self.rows if row[4]]:
            lost = (sum(norm**2 for _, _, norm, _, _ in left if norm == norm) / total) ** 0.5
            lines.append(f"left out: {shown([row[0] for row in left])}, with {100 * lost:.1f} % of the norm")
        return lines

    def settings(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return {
            "base_model_name_or_path": self.base.label,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": self.modules(),
            "task_type": None,
        }


def extracted(plan: Plan, stream: Stream) -> Adapter:
    """The adapter of a plan.

    Raises:
        UserError: no tensor of the merge differs from the base, or none that an adapter can hold.
    """
    assert plan.options.extract_lora is not None
    found = Adapter(plan, plan.options.extract_lora)
    stream.run(found)
    if not found.factors:
        what = f"only {shown([row[0] for row in found.rows])} differ" if found.rows else "no tensor differs"
        raise UserError(f"--extract-lora: {what} from the base, so there is no weight of a module to adapt")
    return found


def save(found: Adapter, out: Path, metadata: Callable[[], dict[str, str]]) -> None:
    """Write the folder of the adapter. metadata: of the file with the weights; it is called last.

    Raises:
        UserError: it exists, or cannot be written; nothing is left then.
    """
    work = out.with_name(out.name + ".part")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; choose another name, or delete it")
    if work.exists():
        raise UserError(f"{work} is in the way; choose another --out, or delete it")
    try:
        work.mkdir(parents=True)
        (work / ADAPTER).write_text(json.dumps(found.settings(), indent=2) + "\n", encoding="utf-8")
        rows = [(name, shape, norm, f"{kept:.6f}", why) for name, shape, norm, kept, why in found.rows]
        save_csv(work / TABLE, COLUMNS, rows)
        save_file(found.factors, work / WEIGHTS, metadata=metadata())
        os.rename(work, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror or error}); nothing was written") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
