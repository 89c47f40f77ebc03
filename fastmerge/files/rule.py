"""What a merge rule on files is, and what it gets to see of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fastmerge.files.thresholds import Trim


@dataclass
class Part:
    """Entries start..start + n of one tensor. models: T tensors [n]; base: [n]; out: [n], written; tally: int64 [3],
    receives how many NaN and inf were written (`bad`), and what TIES counts of signs. position: of the first entry in all
    tensors. settings: of the rule, for this tensor. shape: of the whole tensor. statistics: the models' tensors of
    `--statistics`, [n], or whole if their size is another; empty where there are none. known: what `FileRule.survey` found
    for this tensor."""

    models: list[Tensor]
    base: Tensor
    out: Tensor
    tally: Tensor
    start: int
    position: int
    seed: int
    weights: Sequence[float]
    settings: dict[str, Any]
    shape: tuple[int, ...] = ()
    statistics: list[Tensor] = field(default_factory=list)
    known: Any = None
    trims: list[Trim] = field(default_factory=list)

    @property
    def bad(self) -> Tensor:
        return self.tally[:1]


@dataclass
class Whole:
    """A tensor that is merged, before it is read. read(): all of it as one part, without an output."""

    name: str
    shape: tuple[int, ...]
    settings: dict[str, Any]
    read: Callable[[], Part]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class FileRule:
    """groups: of settings. ignored: those of them that mean nothing on files. whole: the rule needs a tensor as a whole.
    needs_base: it merges task vectors. weighted: it takes weights. buffers, per_model: fp32 buffers of a part that it needs,
    and those for every model. least, most: numbers of models. statistics: what it needs of every model's data, in words.
    on_gpu: whether it runs there."""

    groups: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[frozenset[str]] = frozenset()
    whole: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    buffers: ClassVar[int] = 0
    per_model: ClassVar[int] = 0
    statistics: ClassVar[str | None] = None
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    passes: ClassVar[str] = "one pass"
    on_gpu: ClassVar[bool] = True

    def room(self, models: int) -> int:
        """Bytes per entry of a part that the rule needs beside inputs and output."""
        return 4 * (self.buffers + self.per_model * models)

    def check(self, settings: dict[str, Any], where: str) -> None:
        """Raises UserError: settings that do not go together. where: the flag that gave them."""

    def survey(self, tensors: Sequence[Whole]) -> dict[str, Any]:
        """What the rule must know of all tensors before it writes one, by name: `Part.known`."""
        return {}

    def write(self, part: Part) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it merges")


def not_finite(part: Part) -> None:
    """Write NaN: the rule has no result where an input has NaN or inf."""
    part.out.fill_(float("nan"))
    part.bad.fill_(part.out.numel())
