"""What every merge rule is: fed one model at a time with `update`, asked for the merged model with `merged`.

A rule never holds T models where sums over them are enough; `state_dict()` is all it holds. Models are flat vectors `[n]`
fp32; `Base` says what they have in common: where they started, and where their tensors lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.flat import FlatModel


@dataclass
class Base:
    """theta: `[n]` theta_init. bounds: ascending 0, ..., n, one stretch per tensor (with the padding behind it). sizes:
    entries of each tensor without padding. seed: for rules that draw."""

    theta: Tensor
    bounds: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self):
        self.bounds = self.bounds or [0, self.theta.numel()]
        self.sizes = self.sizes or [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    @classmethod
    def of(cls, flat: FlatModel, seed: int) -> Base:
        """A copy of the model's present weights as the base."""
        return cls(flat.theta.detach().clone(), [*flat.offsets[:-1], flat.numel], list(flat.sizes), seed)

    def whole(self) -> tuple[list[int], list[int]]:
        """(bounds, sizes) of the vector as one tensor."""
        return [0, self.theta.numel()], [sum(self.sizes)]


class Rule:
    """Common to all rules: the base, the settings, how many models came, and the tensors that are kept.

    A subclass says how it takes a model in (`_take`) and writes the merge (`_write`); both may read `count`, the number of
    models in the merge, the one at hand included, and `fed`, the number that ever came: the subsequence of a rule that draws.
    """

    groups: ClassVar[tuple[str, ...]] = ()  # the groups of settings it reads
    needs_base: ClassVar[bool] = True  # whether theta_init must be kept
    needs_fisher: ClassVar[bool] = False  # whether update() takes the model's diagonal Fisher

    def __init__(self, base: Base, *settings: Any):
        self.base = base
        self.settings: Any = settings[0] if settings else None
        self.count = self.fed = 0
        self.kept: dict[str, Tensor] = {}

    def update(self, theta: Tensor, fisher: Tensor | None = None) -> None:
        """Take in one more model `[n]`; neither it nor `fisher` `[n]` is changed or held."""
        self.count, self.fed = self.count + 1, self.fed + 1
        try:
            self._take(theta, fisher)
        except BaseException:  # a refused model does not count
            self.count, self.fed = self.count - 1, self.fed - 1
            raise

    def merged(self, out: Tensor) -> Tensor:
        """Write the merge of the models so far into `out` `[n]` (none of the models) and return it.

        Raises:
            ValueError: there was no model yet.
        """
        if self.empty:
            raise ValueError(f"{type(self).__name__}: no model to merge yet; call update() first")
        return self._write(out)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to merge."""
        return not self.count

    def restart(self, theta: Tensor) -> None:
        """Begin anew with `theta` as the only model: the merge of all tasks so far stands in for them."""
        self.forget()
        self.update(theta)

    def forget(self) -> None:
        """Let go of everything but what must live on beside the merged model."""
        self.kept.clear()
        self.count = 0

    def unscaled(self, theta: Tensor) -> Tensor:
        """Undo the rule's scale: return theta_init + (theta - theta_init) / scale as a new tensor."""
        return fk.lerp(self.base.theta, theta, 1 / getattr(self.settings, "scale", 1.0))

    def zeros(self, *names: str) -> list[Tensor]:
        """The kept tensors of these names, zero at first."""
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

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it takes in a model")

    def _write(self, out: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how it merges")
