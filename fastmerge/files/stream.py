"""Go through a plan, tensor by tensor and part by part, and write what the rule says. One pass, but for thresholds of
TIES."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.measure import Measure
from fastmerge.files.plan import Item, Plan
from fastmerge.files.rule import Part, Whole
from fastmerge.files.rules import Ties
from fastmerge.files.thresholds import Parts, Trim, trims
from fastmerge.wording import counted

MEMORY = 256 << 20


class Sink(Protocol):
    """Where the merged tensors go. done: tensor -> what `finished` was told of it by an earlier start."""

    done: dict[str, dict[str, Any]]

    def tensor(self, item: Item) -> Tensor: ...

    def written(self, item: Item, start: int, stop: int) -> None:
        """The entries start..stop are there; their memory may be given back."""

    def finished(self, item: Item, about: dict[str, Any]) -> None: ...


class Memory:
    """A sink: new tensors by name."""

    def __init__(self) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}

    def tensor(self, item: Item) -> Tensor:
        self.tensors[item.name] = torch.empty(item.shape, dtype=item.dtype)
        return self.tensors[item.name].view(-1)

    def written(self, item: Item, start: int, stop: int) -> None: ...

    def finished(self, item: Item, about: dict[str, Any]) -> None: ...


class Stream:
    """plan, and how: memory bounds the parts; measure adds a report per tensor; finite: NaN or inf in the output is an
    error."""

    def __init__(
        self,
        plan: Plan,
        memory: int = MEMORY,
        measure: bool = False,
        finite: bool = True,
        say: Callable[[str], None] = print,
    ):
        self.plan, self.memory, self.measure, self.finite, self.say = plan, memory, measure, finite, say
        self.trims: dict[str, list[Trim]] = {}
        self.known: dict[str, Any] = {}

    def run(self, sink: Sink) -> dict[str, dict[str, Any]]:
        """Write every tensor into the sink; returns what is known of each: action, nonfinite, and the measures.

        Raises:
            UserError: a NaN or inf was written, and `finite` forbids it.
        """
        found = dict(sink.done)
        todo = [item for item in self.plan.items if item.name not in found]
        if isinstance(self.plan.rule, Ties) and todo:
            self._thresholds([item for item in self.plan.items if item.action == "merge"])
        if todo:
            merged = [item for item in self.plan.items if item.action == "merge" and item.numel]
            tensors = [
                Whole(item.name, item.shape, item.settings, functools.partial(self._read, item)) for item in merged
            ]
            self.known = self.plan.rule.survey(tensors)
        for item in todo:
            found[item.name] = self._write(item, sink)
            if not found[item.name].get("undecided"):
                sink.finished(item, found[item.name])
        if isinstance(self.plan.rule, Ties):
            negative = sum(about.get("signs", 0) for about in found.values()) < 0
            for item in todo:
                if found[item.name].get("undecided"):  # the majority of all signs is known only now
                    about = self._write(item, sink, "negative") if negative else found[item.name]
                    found[item.name] = {**about, "undecided": False}
                    sink.finished(item, found[item.name])
        return found

    def _write(self, item: Item, sink: Sink, zero: str | None = None) -> dict[str, Any]:
        about: dict[str, Any] = {"action": item.action, "nonfinite": 0}
        measure = Measure(len(item.models)) if self.measure and item.action == "merge" else None
        for part in self._parts(item, sink.tensor(item)):
            rule = self.plan.rule
            if item.action == "average":
                fk.weighted_sum(part.models, out=part.out, nonfinite=part.bad)
            elif item.action == "copy":
                part.out.copy_(part.models[0])
                part.bad.fill_(int((~part.out.isfinite()).sum()) if part.out.is_floating_point() else 0)
            elif isinstance(rule, Ties):
                part.trims = self.trims[item.name]
                state = rule.accumulate(part)
                wanted = zero or part.settings["zero"]
                if wanted == "majority":
                    mass = state[0] + state[1]
                    about["signs"] = about.get("signs", 0) + int((mass > 0).sum()) - int((mass < 0).sum())
                    if bool(((mass == 0) & (state[0] != 0)).any()):
                        about["undecided"] = True
                rule.finish(part, state, "positive" if wanted == "majority" else wanted)
            else:
                rule.write(part)
            about["nonfinite"] += int(part.bad)
            if measure is not None:
                measure.add(part)
            sink.written(item, part.start, part.start + part.out.numel())
        if about["nonfinite"] and self.finite:
            raise UserError(
                f"{item.name}: {counted(about['nonfinite'], 'value of the output is', 'values of the output are')} NaN or inf"
                f"{self._culprits(item)}; leave the input out, choose a wider --dtype, or pass --allow-nonfinite"
            )
        return about | (measure.values() if measure is not None else {})

    def _culprits(self, item: Item) -> str:
        every = [*item.models, *([item.base] if item.base is not None else [])]
        labels = [m.label for m in self.plan.models] if len(item.models) == len(self.plan.models) else []
        bad = [label for label, e in zip(labels, every, strict=False) if not bool(e.whole().isfinite().all())]
        return f" (they are in {', '.join(bad)})" if bad else ""

    def _parts(self, item: Item, out: Tensor) -> Iterator[Part]:
        step = self.plan.part(item, self.memory)
        for start in range(0, item.numel, step):
            stop = min(start + step, item.numel)
            models = [_view(e, start, stop) for e in item.models]
            base = models[0] if item.base is None else _view(item.base, start, stop)
            if item.action == "copy":
                models = [item.models[0].part(start, stop)]
            bad = torch.zeros(1, dtype=torch.int64)
            position, seed = item.position + start, self.plan.options.seed
            part = Part(
                models, base, out[start:stop], bad, start, position, seed, item.weights, item.settings, item.shape
            )
            elementwise = [(e, e.numel == item.numel) for e in item.statistics]
            part.statistics = [_view(e, start, stop) if fits else e.whole() for e, fits in elementwise]
            part.known = self.known.get(item.name)
            yield part
            release(item, start, stop)

    def _read(self, item: Item) -> Part:
        """The whole tensor, without an output."""
        return next(self._parts(item, torch.empty(item.numel, dtype=item.dtype, device="meta")))

    def _thresholds(self, items: list[Item]) -> None:
        """The Trim of every model and tensor: tensors of one density together, or with scope tensor each alone."""
        groups: dict[Any, list[Item]] = {}
        for item in items:
            s = item.settings
            alone = item.name if s["scope"] == "tensor" else None
            if item.numel:
                groups.setdefault((s["density"], s["keep"], alone), []).append(item)
            self.trims[item.name] = []
        for (density, keep, alone), group in groups.items():
            sizes = [item.numel for item in group]
            for k in range(len(self.plan.models)):
                if (
                    alone is not None and type(self.plan.rule) is Ties
                ):  # task vectors straight from the files: fewer passes
                    self.trims[alone].append(self._alone(group[0], k, density, keep))
                    continue
                sources = [self._delta_parts(item, k) for item in group]
                for item, trim in zip(group, trims(sources, sizes, density, keep == "exactly"), strict=True):
                    self.trims[item.name].append(trim)

    def _alone(self, item: Item, k: int, density: float, keep: str) -> Trim:
        assert item.base is not None
        theta, base = _view(item.models[k], 0, item.numel), _view(item.base, 0, item.numel)
        count = min(item.numel, max(1, int(density * item.numel)))
        limit, cut = fk.magnitude_threshold(theta, count, initial=base, keep=keep)
        release(item, 0, item.numel)
        return Trim(limit, int(cut))

    def _delta_parts(self, item: Item, k: int) -> Callable[[], Parts]:
        rule = self.plan.rule
        assert isinstance(rule, Ties)

        def parts() -> Parts:
            for part in self._parts(item, torch.empty(item.numel, dtype=item.dtype, device="meta")):
                yield (part.start, *rule.delta(part, k))

        return parts


def release(item: Item, start: int, stop: int) -> None:
    """Give back the memory behind a part of all inputs."""
    for entry in [*item.models, *([item.base] if item.base is not None else []), *item.statistics]:
        if entry.release is not None and entry.numel == item.numel:
            entry.release(start, stop)
        elif entry.release is not None and stop == item.numel:
            entry.release(0, entry.numel)


def _view(entry: Any, start: int, stop: int) -> Tensor:
    x = entry.part(start, stop)
    return x.float() if x.dtype == torch.float64 else x
