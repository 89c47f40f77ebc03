"""The interface of merge rules: `update` takes in one model at a time, `merged` writes the merged model.

A rule keeps a fixed number of accumulators instead of T models (except for `keeps_all.py`); `state_dict()` is its whole
state. Models are flat vectors `[n]` fp32; `Base` has what they share: the initial weights, and the places and shapes of the
tensors in the vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.flat import FlatModel
from fastmerge.models.lora import Projections


@dataclass
class Base:
    """theta: `[n]` theta_init. bounds: ascending 0, ..., n; each interval is one tensor and the padding after it.
    sizes: entries of each tensor without padding. seed: for random rules. position: of the first entry, for those that
    take it as part of a longer vector (merging files). shapes: of each tensor, by default of a vector.
    names: of each tensor in the model, empty if there is none; those of LoRA's projections are of the weight they are in."""

    theta: Tensor
    bounds: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    seed: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    position: int = 0

    def __post_init__(self):
        self.bounds = self.bounds or [0, self.theta.numel()]
        self.sizes = self.sizes or [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        self.shapes = self.shapes or [(size,) for size in self.sizes]

    @classmethod
    def of(cls, model: FlatModel | Projections, seed: int) -> Base:
        """A base with a copy of the current weights of `model`: all of them, or the projections that LoRA adapts alone, each
        of which is one tensor."""
        shapes: list[tuple[int, ...]]
        if isinstance(model, Projections):
            theta = model.gather(model.flat.theta.detach())
            shapes = [(b.rows, b.columns) for b in model.blocks]
            names = [b.name for b in model.blocks]
            return cls(theta, list(accumulate(model.sizes, initial=0)), list(model.sizes), seed, shapes, names)
        bounds, shapes = [*model.offsets[:-1], model.numel], [tuple(shape) for shape in model.shapes]
        return cls(model.theta.detach().clone(), bounds, list(model.sizes), seed, shapes, list(model.names))

    def name(self, number: int) -> str:
        """What messages call a tensor."""
        return self.names[number] if self.names else f"tensor {number + 1} of {len(self.sizes)}"

    def whole(self) -> tuple[list[int], list[int]]:
        """(bounds, sizes) that treat the vector as one tensor."""
        return [0, self.theta.numel()], [sum(self.sizes)]

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """Views of `vector` `[..., n]`: the entries of every tensor, without padding, `[..., size]`."""
        places = zip(self.bounds, self.sizes, strict=False)
        return [vector[..., start : start + size] for start, size in places if size]

    def matrices(self, vector: Tensor) -> dict[int, Tensor]:
        """Views of `vector` `[n]`: the tensors with two dimensions and at least one entry, `[rows, columns]`, by number."""
        return {
            k: vector[start : start + size].view(shape)
            for k, (start, size, shape) in enumerate(zip(self.bounds, self.sizes, self.shapes, strict=False))
            if len(shape) == 2 and size
        }


class Rule:
    """Base class: the base, the settings, the number of models, and the kept tensors.

    A subclass defines how it takes in a model (`_take`) and writes the merge (`_write`). Both may read `count`, the
    number of models in the merge including the current one, and `fed`, the number of models ever taken in, which
    random rules use as subsequence.
    """

    groups: ClassVar[tuple[str, ...]] = ()  # the groups of settings it reads
    unread: ClassVar[tuple[str, ...]] = ()  # settings of them that change nothing, as GROUP.SETTING
    needs_base: ClassVar[bool] = True  # whether theta_init must be kept
    begins_at_base: ClassVar[bool] = False  # whether theta_init is its first model, so that it changes a single one
    needs_fisher: ClassVar[bool] = False  # whether update() needs the model's diagonal Fisher, `[n]`
    needs_moments: ClassVar[bool] = (
        False  # whether update() needs the second moments of the inputs, see merging/regmean.py
    )

    def __init__(self, base: Base, *settings: Any):
        self.base = base
        self.settings: Any = settings[0] if settings else None
        self.count = self.fed = 0
        self.kept: dict[str, Tensor] = {}

    @classmethod
    def check(cls, *settings: Any) -> None:
        """Raise UserError for settings of its groups that do not fit each other, before anything is trained."""

    def update(self, theta: Tensor, about: Any = None) -> None:
        """Take in one more model `[n]`. about: what the rule needs of the model's data, its Fisher or moments. Neither is
        changed or kept."""
        self.count, self.fed = self.count + 1, self.fed + 1
        try:
            self._take(theta, about)
        except BaseException:  # a refused model does not count
            self.count, self.fed = self.count - 1, self.fed - 1
            raise

    def merged(self, out: Tensor) -> Tensor:
        """Write the merge of the models so far into `out` `[n]` and return it.

        Raises:
            ValueError: no model has been taken in yet.
        """
        if self.empty:
            raise ValueError(f"{type(self).__name__}: no model to merge yet; call update() first")
        return self._write(out)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to merge."""
        return not self.count

    def restart(self, theta: Tensor) -> None:
        """Start again with `theta`, the merge of all tasks so far, as the only model."""
        self.forget()
        self.update(theta)

    def forget(self) -> None:
        """Drop all tensors except those that the merged model needs later, such as its Fisher."""
        self.kept.clear()
        self.count = 0

    def unscaled(self, theta: Tensor) -> Tensor:
        """Undo the rule's scale: return theta_init + (theta - theta_init) / scale as a new tensor."""
        return fk.lerp(self.base.theta, theta, 1 / getattr(self.settings, "scale", 1.0))

    def zeros(self, *names: str) -> list[Tensor]:
        """The kept tensors with these names; new ones are zero."""
        for name in names:
            if name not in self.kept:
                self.kept[name] = torch.zeros_like(self.base.theta)
        return [self.kept[name] for name in names]

    def state_dict(self) -> dict[str, Tensor]:
        return self.kept | {"count": torch.tensor(self.count), "fed": torch.tensor(self.fed)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.count, self.fed = int(tensors["count"]), int(tensors["fed"])
        self.kept = {
            k: v.to(self.base.theta.device, copy=True) for k, v in tensors.items() if k not in ("count", "fed")
        }

    def _take(self, theta: Tensor, about: Any) -> None:
        raise TypeError(f"{type(self).__name__} does not define how it takes in a model")

    def _write(self, out: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define how it merges")


class WithMerged(Rule):
    """A rule that keeps its merged model as `merged`, beside sums that `forget` leaves; `restart` gives the model back."""

    def _write(self, out: Tensor) -> Tensor:
        return out.copy_(self.kept["merged"])

    @property
    def empty(self) -> bool:
        return "merged" not in self.kept

    def restart(self, theta: Tensor) -> None:
        self.kept["merged"] = theta.clone()

    def forget(self) -> None:
        self.kept.pop("merged", None)

    def check_restarted(self) -> None:
        """Raise ValueError if the merged model was forgotten and not given back."""
        if self.empty and self.count > 1:
            raise ValueError("the merged model was forgotten: call restart(theta) before update()")
