"""Go through a plan, tensor by tensor and part by part, and write what the rule says. One pass, but for thresholds of
TIES."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.measure import Measure
from fastmerge.files.plan import Item, Plan
from fastmerge.files.rule import Part, Whole
from fastmerge.files.rules import Ties
from fastmerge.files.staging import Lanes, Staging
from fastmerge.files.thresholds import Parts, Trim, trims
from fastmerge.wording import counted

MEMORY = 256 << 20
CPU = torch.device("cpu")


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
    error; device: where the ops run, the CPU or a GPU."""

    def __init__(
        self,
        plan: Plan,
        memory: int = MEMORY,
        measure: bool = False,
        finite: bool = True,
        device: torch.device = CPU,
    ):
        """Raises UserError: the rule does not run on that device."""
        if device != CPU and not plan.rule.on_gpu:
            raise UserError(
                f"--device {device}: {plan.options.rule} on files runs on the CPU alone; leave the flag away"
            )
        self.plan, self.memory, self.measure, self.finite, self.device = plan, memory, measure, finite, device
        self.staged = on_cpu if device == CPU else Staging(Lanes(device))
        self.trims: dict[str, list[Trim]] = {}
        self.known: dict[str, Any] = {}

    def run(self, sink: Sink) -> dict[str, dict[str, Any]]:
        """Write every tensor into the sink; returns what is known of each: action, nonfinite, and the measures.

        Raises:
            UserError: a NaN or inf was written, and `finite` forbids it, or an input changed.
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
        found |= self._pass(todo, sink)
        if isinstance(self.plan.rule, Ties):
            undecided = [item for item in todo if found[item.name].get("undecided")]
            if (
                sum(about.get("signs", 0) for about in found.values()) < 0
            ):  # the majority of all signs is known only now
                again = self._pass(undecided, sink, "negative")
                found |= {name: {**found[name], **about, "undecided": False} for name, about in again.items()}
            else:
                for item in undecided:
                    found[item.name]["undecided"] = False
                    sink.finished(item, found[item.name])
        self.plan.check_unchanged()
        return found

    def _pass(self, items: list[Item], sink: Sink, zero: str | None = None) -> dict[str, dict[str, Any]]:
        """Write these tensors. zero: the sign that TIES gives to a mass of zero, in place of its setting."""
        found: dict[str, dict[str, Any]] = {}
        measures: dict[str, Measure] = {}

        def parts() -> Iterator[tuple[Item, Part]]:
            for item in items:
                found[item.name] = {"action": item.action, "nonfinite": 0}
                if self.measure and item.action == "merge":
                    measures[item.name] = Measure(len(item.models))
                for part in self._parts(item, sink.tensor(item)):
                    yield item, part
                if not item.numel:
                    finished(item)

        def arrived(item: Item, part: Part) -> None:
            about, stop = found[item.name], part.start + part.out.numel()
            about["nonfinite"] += int(part.bad)
            if self._majority(item, zero):
                about["signs"] = about.get("signs", 0) + int(part.tally[1])
                about["undecided"] = about.get("undecided", False) or bool(part.tally[2])
            if item.name in measures:
                measures[item.name].add(part)
            sink.written(item, part.start, stop)
            release(item, part.start, stop)
            if stop == item.numel:
                finished(item)

        def finished(item: Item) -> None:
            about = found[item.name]
            if about["nonfinite"] and self.finite:
                bad = counted(about["nonfinite"], "value of the output is", "values of the output are")
                raise UserError(
                    f"{item.name}: {bad} NaN or inf{self._culprits(item)}; leave the input out, choose a wider --dtype, or "
                    "pass --allow-nonfinite"
                )
            if item.name in measures:
                about |= measures.pop(item.name).values()
            if not about.get("undecided"):
                sink.finished(item, about)

        for item, part in self.staged(parts(), arrived):
            self._write(item, part, zero)
        return found

    def _majority(self, item: Item, zero: str | None) -> bool:
        """Whether TIES gives a mass of zero the sign of the majority."""
        merged = isinstance(self.plan.rule, Ties) and item.action == "merge"
        return merged and (zero or item.settings["zero"]) == "majority"

    def _write(self, item: Item, part: Part, zero: str | None) -> None:
        rule = self.plan.rule
        if item.action == "average":
            total = sum(part.weights)
            fk.weighted_sum(part.models, [w / total for w in part.weights], out=part.out, nonfinite=part.bad)
        elif item.action == "copy":
            part.out.copy_(part.models[0])
            if part.out.is_floating_point():
                part.bad.copy_((~part.out.isfinite()).sum())
        elif isinstance(rule, Ties):
            part.trims = self.trims[item.name]
            state = rule.accumulate(part)
            if self._majority(item, zero):
                mass = state[0] + state[1]
                part.tally[1] = (mass > 0).sum() - (mass < 0).sum()
                part.tally[2] = ((mass == 0) & (state[0] != 0)).sum()
                rule.finish(part, state, "positive")
            else:
                rule.finish(part, state, zero or part.settings["zero"])
        else:
            rule.write(part)

    def _culprits(self, item: Item) -> str:
        owners = zip(self.plan.models, item.models, strict=True) if len(item.models) == len(self.plan.models) else ()
        every = [*owners, *zip(self.plan.statistics, item.statistics, strict=False)]
        every += [(self.plan.base, item.base)] if item.base is not None else []
        bad = [one.label for one, entry in every if one is not None and not bool(entry.whole().isfinite().all())]
        return f" (they are in {', '.join(bad)})" if bad else ""

    def _parts(self, item: Item, out: Tensor, step: int | None = None) -> Iterator[Part]:
        step = step or self.plan.part(item, self.memory)
        for start in range(0, item.numel, step):
            stop = min(start + step, item.numel)
            models = [_view(e, start, stop) for e in item.models]
            if item.action == "copy":
                models = [item.models[0].part(start, stop)]
            base = models[0] if item.base is None else _view(item.base, start, stop)
            tally = torch.zeros(3, dtype=torch.int64)
            position, seed = item.position + start, self.plan.options.seed
            part = Part(
                models, base, out[start:stop], tally, start, position, seed, item.weights, item.settings, item.shape
            )
            elementwise = [(e, e.numel == item.numel) for e in item.statistics]
            part.statistics = [_view(e, start, stop) if fits else e.whole() for e, fits in elementwise]
            part.known = self.known.get(item.name)
            yield part

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
        for _, part in self._of_model(item, k, item.numel):
            count = min(item.numel, max(1, int(density * item.numel)))
            limit, cut = fk.magnitude_threshold(part.models[0], count, initial=part.base, keep=keep)
        return Trim(limit, int(cut))

    def _delta_parts(self, item: Item, k: int) -> Callable[[], Parts]:
        rule = self.plan.rule
        assert isinstance(rule, Ties)

        def parts() -> Parts:
            for _, part in self._of_model(item, k, self.plan.part(item, self.memory)):
                yield (part.start, *rule.delta(part, k, part.models[0]))

        return parts

    def _of_model(self, item: Item, k: int, step: int) -> Iterator[tuple[Item, Part]]:
        """The parts of one model and the base, without an output."""
        one = dataclasses.replace(item, models=[item.models[k]], statistics=[])
        nothing = torch.empty(item.numel, dtype=item.dtype, device="meta")
        parts = ((one, part) for part in self._parts(one, nothing, step))
        return self.staged(parts, lambda item, part: release(item, part.start, part.start + part.out.numel()))


def on_cpu(parts: Iterable[tuple[Item, Part]], arrived: Callable[[Item, Part], None]) -> Iterator[tuple[Item, Part]]:
    """What `Staging` does on a GPU."""
    for item, part in parts:
        yield item, part
        arrived(item, part)


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
