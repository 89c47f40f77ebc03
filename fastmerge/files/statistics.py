"""`--statistics`: what a rule needs of every model's data, one file per model, with the names of the model's tensors."""

from __future__ import annotations

import json
from typing import Any

from fastmerge.errors import UserError
from fastmerge.files.align import align
from fastmerge.files.headers import Entry
from fastmerge.files.inputs import Input, open_input, shown
from fastmerge.files.rule import FileRule
from fastmerge.wording import counted


class Statistics:
    """inputs: one per model, or none. axes: of weights whose input is not their last dimension, by name."""

    def __init__(self, name: str, rule: FileRule, sources: list[Any], models: list[Input]):
        """Open them.

        Raises:
            UserError: the rule needs none, or another number, or a file names no tensor of its model.
        """
        self.rule = rule
        if rule.statistics is None and sources:
            raise UserError(f"--statistics: {name} needs no statistics of the data; leave them away")
        if rule.statistics is not None and not sources:
            raise UserError(
                f"--statistics is not given, but {name} needs {rule.statistics} of every model; name one file per model"
            )
        if rule.statistics is not None and len(sources) != len(models):
            raise UserError(f"--statistics: {len(sources)} for {counted(len(models), 'model')}; give one per model")
        self.inputs: list[Input] = []
        self.axes: dict[str, int] = {}
        for source, model in zip(sources, models, strict=False):
            opened = open_input(source)
            found = align(opened, model)
            found.label = found.label if found.files else f"statistics {len(self.inputs) + 1}"
            if not found.entries.keys() & model.entries.keys():
                raise UserError(
                    f"--statistics {found.label}: no tensor of {model.label} has its names, such as "
                    f"{shown(sorted(found.entries), 2)}"
                )
            names = dict(zip(opened.entries, found.entries, strict=True))
            self.axes |= {names[name]: axis for name, axis in _axes(opened).items()}
            self.inputs.append(found)

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[list[Entry], dict[str, int]]:
        """The tensors for one of the models', and `axis` where the rule needs it; no tensors where no file has any.

        Raises:
            UserError: not all files have it, or its shape does not fit.
        """
        here = [one.entries.get(name) for one in self.inputs]
        found = [entry for entry in here if entry is not None]
        if not found:
            return [], {}
        if len(found) < len(here):
            absent = [one.label for one, entry in zip(self.inputs, here, strict=True) if entry is None]
            raise UserError(f"{name}: not in the statistics {shown(absent)}, but in others; compute it for all models")
        if self.rule.whole:  # X^T X
            side = found[0].shape[-1] if found[0].shape else 0
            axis = self.axes.get(name, 1 if len(shape) == 2 and side == shape[1] else 0)
            fits = len(shape) == 2 and all(entry.shape == (shape[axis],) * 2 for entry in found)
            expected, more = "[in, in] of a weight of 2 dimensions", {"axis": axis}
        else:
            fits, expected, more = all(entry.shape == shape for entry in found), str(list(shape)), {}
        if not fits or not all(entry.dtype.is_floating_point for entry in found):
            told = ", ".join(f"{list(entry.shape)} {str(entry.dtype).removeprefix('torch.')}" for entry in found)
            raise UserError(f"{name} {list(shape)}: its statistics are {told}; expected {expected} floats")
        return found, more


def _axes(one: Input) -> dict[str, int]:
    try:
        axes = json.loads(one.metadata.get("axes", "{}"))
        if isinstance(axes, dict) and all(name in one.entries and axis in (0, 1) for name, axis in axes.items()):
            return axes
    except ValueError:
        pass
    raise UserError(f'--statistics {one.label}: its metadata `axes` must be JSON such as {{"visual.proj": 0}}')
