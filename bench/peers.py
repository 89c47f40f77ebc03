"""mergekit 0.1.5 and peft 0.21.2 as rivals: imported when a row first needs them, n/a if they are not installed."""

from __future__ import annotations

import torch
from torch import Tensor


def mergekit(method: str, models: list[dict[str, Tensor]], base: dict[str, Tensor] | None = None, **parameters):
    """Return {"mergekit": call} or {}; the call includes the dict of results that mergekit's interface requires."""
    try:
        from mergekit.merge_methods import merge_state_dicts
    except ImportError:
        return {}
    if base is None:
        return {"mergekit": lambda: merge_state_dicts(models, method, parameters=parameters)}
    inputs = {"base": base, **{f"m{k}": m for k, m in enumerate(models)}}
    return {"mergekit": lambda: merge_state_dicts(inputs, method, base="base", parameters=parameters)}


def peft(method: str, models: list[dict[str, Tensor]], base: dict[str, Tensor], weight: float, *arguments):
    """Return {"peft": call} or {}; the call includes computing the task vectors for peft, one tensor at a time."""
    try:
        from peft.utils import merge_utils
    except ImportError:
        return {}
    rule = getattr(merge_utils, method)

    def call():
        weights = torch.full((len(models),), weight, device=base["p000"].device, dtype=base["p000"].dtype)
        return {name: x + rule([m[name] - x for m in models], weights, *arguments) for name, x in base.items()}

    return {"peft": call}
