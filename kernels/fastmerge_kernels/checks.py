"""Argument checks: errors name the argument, what was expected, and what was given. Nothing is written before they pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_vectors(first: str, /, **tensors: Tensor | None) -> Tensor:
    """Raise TypeError / ValueError unless all are 1-D contiguous fp32/bf16/fp16, of the length and device of `first`.

    None stands for an optional argument that is absent. Returns the tensor called `first`.
    """
    lead: Any = tensors[first]  # whether it is a tensor is checked below
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected dtype float32, bfloat16 or float16, got {x.dtype}")
        if x.dim() != 1:
            raise ValueError(f"{name}: expected a 1-D tensor, got shape {list(x.shape)}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got stride {x.stride()}")
        if x.shape != lead.shape:
            raise ValueError(f"{name}: expected shape {list(lead.shape)}, that of {first}, got {list(x.shape)}")
        if x.device != lead.device:
            raise ValueError(f"{name}: expected device {lead.device}, that of {first}, got {x.device}")
    given = {name: x for name, x in tensors.items() if x is not None}
    if any(hasattr(x, "placements") for x in given.values()):
        from .dtensor import check_placements

        check_placements(first, given)
    return lead


def check_models(models, **others: Tensor | None) -> list[Tensor]:
    """`check_vectors` for a list of models and what goes with them; returns the list. Raises ValueError if it is empty."""
    models = list(models)
    if not models:
        raise ValueError("models: expected at least one tensor, got an empty list")
    check_vectors("models[0]", **{f"models[{k}]": model for k, model in enumerate(models)}, **others)
    return models


def check_counter(nonfinite: Tensor | None, device: torch.device) -> None:
    """Raise unless `nonfinite` is None or an int64 tensor of one element on `device`."""
    if nonfinite is None:
        return
    if not isinstance(nonfinite, Tensor) or nonfinite.dtype != torch.int64:
        raise TypeError(f"nonfinite: expected an int64 tensor, got {getattr(nonfinite, 'dtype', type(nonfinite))}")
    if nonfinite.numel() != 1 or nonfinite.device != device:
        raise ValueError(
            f"nonfinite: expected one element on {device}, got shape {list(nonfinite.shape)} on {nonfinite.device}"
        )


def check_overlap(written: str, out: Tensor, **inputs: Tensor | None) -> None:
    """Raise ValueError if `out` shares memory with an input without being exactly that input."""
    start, stop = out.data_ptr(), out.data_ptr() + out.numel() * out.element_size()
    for name, x in inputs.items():
        if x is None or x.numel() == 0:
            continue
        begin, end = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
        if begin < stop and start < end and (begin != start or x.dtype != out.dtype):
            raise ValueError(f"{written}: partly overlaps {name}; it may be the same tensor or a disjoint one")


def check_disjoint(**written: Tensor) -> None:
    """Raise ValueError if two written tensors share memory."""
    names = list(written)
    for k, name in enumerate(names):
        x = written[name]
        for other in names[:k]:
            y = written[other]
            first, second = (x, y) if x.data_ptr() <= y.data_ptr() else (y, x)
            if x.numel() and first.data_ptr() + first.numel() * first.element_size() > second.data_ptr():
                raise ValueError(f"{name}: shares memory with {other}; both are written")


def check_nonnegative(**tensors: Tensor) -> None:
    """Raise ValueError if a tensor has a negative entry. Waits for the device; under torch.compile nothing is checked."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x.numel() and x.amin().item() < 0:
            raise ValueError(f"{name}: expected no negative entries, the smallest is {x.amin().item()}")


def scalar(name: str, value: float | Tensor) -> tuple[float, Tensor | None]:
    """A number given as float or as tensor of one element, for a custom op's schema: (float, None) or (0.0, tensor)."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: expected one floating-point element, got {value.dtype} {list(value.shape)}")
        return 0.0, value.detach()
    return float(value), None


def check_fraction(name: str, value: float) -> float:
    """Raise ValueError unless 0 <= value <= 1 (NaN fails too)."""
    if not 0.0 <= value <= 1.0 or math.isnan(value):
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return float(value)


def check_choice(name: str, value: str, options: tuple[str, ...]) -> str:
    """Raise ValueError unless value is one of the options."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")
    return value
