"""The plan of a merge, from headers alone: which tensor becomes what, and every problem, before a byte of data is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastmerge.errors import UserError, nearest
from fastmerge.files.adapter import Adapter
from fastmerge.files.align import align
from fastmerge.files.headers import Entry
from fastmerge.files.inputs import Input, open_input, shown
from fastmerge.files.layers import BETWEEN, places
from fastmerge.files.rules import FileRule
from fastmerge.files.settings import check_patterns, defaults, known_rule, read_override, read_values, read_weights
from fastmerge.files.stamp import Stamp, check_stamp
from fastmerge.files.statistics import Statistics
from fastmerge.wording import counted

OUT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MISSING = ("error", "base", "average", "skip")
MISMATCH = ("error", "base")
SMALLEST_PART = 4096
LARGEST_PART = 1 << 20  # entries: more does not make it faster, less does not fit more into a cache


@dataclass
class Options:
    """What a merge is asked for; see `fastmerge merge --help`. models, base, statistics, like: paths, or mappings of names
    to tensors."""

    rule: str
    models: list[Any]
    base: Any = None
    weights: list[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)
    missing: str = "error"
    mismatch: str = "error"
    dtype: str | None = None
    shard: int | None = None
    seed: int = 0
    statistics: list[Any] = field(default_factory=list)
    extract_lora: int | None = None
    like: Any = None

    def to_dict(self) -> dict[str, Any]:
        """For the recipe; paths as text."""
        paths: dict[str, Any] = {name: [_path(one) for one in getattr(self, name)] for name in ("models", "statistics")}
        paths |= {"base": _path(self.base), "like": "base" if self.like == "base" else _path(self.like)}
        return {name: value for name, value in asdict(_plain(self)).items() if name not in paths} | paths


def _plain(options: Options) -> Options:
    return Options(**{**vars(options), "models": [], "statistics": [], "base": None, "like": None})


def _path(source: Any) -> str | None:
    return None if source is None else str(Path(source).absolute()) if isinstance(source, str | Path) else "state dict"


@dataclass
class Item:
    """One tensor of the output. action: 'merge' by the rule, 'average', or 'copy' of the only entry of `models`.
    position: of its first entry in all tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    models: list[Entry]
    base: Entry | None
    position: int
    settings: dict[str, Any]
    weights: tuple[float, ...]
    statistics: list[Entry] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return self.models[0].numel

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class Plan:
    options: Options
    rule: FileRule
    models: list[Input]
    base: Input | None
    statistics: list[Input]
    like: Input  # whose names, shards and small files the output has
    items: list[Item]  # sorted by name
    notes: list[str]
    shards: dict[str, str]  # name -> file of the input whose sharding is kept
    aliases: dict[str, str]  # tied tensors that are written under another name

    @property
    def inputs(self) -> list[Input]:
        found = [*self.models, *([self.base] if self.base is not None else []), *self.statistics]
        return found if any(one is self.like for one in found) else [*found, self.like]

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """Of every file that was opened."""
        return {file: stamp for one in self.inputs for file, stamp in one.files.items()}

    def check_unchanged(self) -> None:
        """Raise UserError if a file of the inputs changed since it was opened."""
        for file, stamp in self.stamps.items():
            check_stamp(file, stamp)

    def entry(self, item: Item) -> int:
        """Bytes per entry of a part: the mapped inputs, the buffers of the rule, the output."""
        inputs = [*item.models, *([item.base] if item.base else []), *([] if self.rule.whole else item.statistics)]
        room = self.rule.room(len(self.models)) if item.action == "merge" else 0
        return sum(e.dtype.itemsize for e in inputs) + room + item.dtype.itemsize

    def part(self, item: Item, memory: int) -> int:
        """Entries of a part of this tensor."""
        if self.rule.whole and item.action == "merge":
            return max(1, item.numel)
        return max(SMALLEST_PART, min(LARGEST_PART, memory // self.entry(item)))

    def memory(self, memory: int) -> int:
        """Bytes that the largest part takes."""

        def taken(item: Item) -> int:
            beside = sum(e.nbytes for e in item.statistics) if self.rule.whole else 0
            return min(self.part(item, memory), item.numel) * self.entry(item) + beside

        return max(map(taken, self.items), default=0)

    def lines(self, memory: int) -> list[str]:
        """What --dry-run prints."""
        count = {kind: sum(item.action == kind for item in self.items) for kind in ("merge", "average", "copy")}
        read = sum(e.nbytes for item in self.items for e in [*item.models, *([item.base] if item.base else [])])
        bases = "" if self.base is None else f", base {self.base.label}"
        kinds = ", ".join(
            f"{n} {word}" for n, word in zip(count.values(), ("merged", "averaged", "copied"), strict=True) if n
        )
        rank, entries = self.options.extract_lora, sum(item.numel for item in self.items)
        written = size(sum(i.nbytes for i in self.items)) if rank is None else f"a LoRA adapter of rank {rank}"
        return [
            f"{self.options.rule} of {counted(len(self.models), 'model')}{bases}",
            f"{counted(len(self.items), 'tensor')} ({kinds}), {entries:,} {'entry' if entries == 1 else 'entries'}",
            f"read {size(read)} in {self.rule.passes}, write {written}, "
            f"memory {size(self.memory(memory))} beside the libraries",
            *self.notes,
        ]


def size(count: int) -> str:
    """Bytes in words."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def make_plan(options: Options) -> Plan:
    """Open the inputs, compare their headers, and plan every tensor.

    Raises:
        UserError: with all problems found.
    """
    rule = known_rule(options.rule)
    for flag, value, known in (("missing", options.missing, MISSING), ("mismatch", options.mismatch, MISMATCH)):
        if value not in known:
            raise UserError(f"--{flag} {value}: expected one of {', '.join(known)}.{nearest(value, known)}")
    if options.dtype is not None and options.dtype not in OUT_DTYPES:
        raise UserError(
            f"--dtype {options.dtype}: expected one of {', '.join(OUT_DTYPES)}.{nearest(options.dtype, OUT_DTYPES)}"
        )
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed}: expected a whole number from 0 to 2^63 - 1")
    if options.extract_lora is not None:
        if options.extract_lora < 1:
            raise UserError(f"--extract-lora {options.extract_lora}: expected a rank of at least 1")
        if options.base is None:
            raise UserError("--extract-lora needs --base, the model that the adapter is for")
        if options.shard is not None:
            raise UserError("--extract-lora writes one small file: leave --shard away")
    count = len(options.models)
    if count < rule.least or (rule.most is not None and count > rule.most):
        needed = f"exactly {rule.most}" if rule.most == rule.least else f"at least {rule.least}"
        raise UserError(f"--models: {options.rule} merges {needed} model{'s' * (rule.least > 1)}, got {count}")
    if options.base is None and (rule.needs_base or "base" in (options.missing, options.mismatch)):
        why = f"{options.rule} merges task vectors" if rule.needs_base else "--missing and --mismatch base take it"
        raise UserError(f"--base is not given, but {why}; name the model that the others were fine-tuned from")
    along = {name: value for name, value in options.settings.items() if BETWEEN in str(value)}
    fixed = {name: value for name, value in options.settings.items() if name not in along}
    settings = defaults(options.rule) | read_values(options.rule, fixed, "--set")
    weights = (1.0,) * count
    if options.weights is not None:
        weights = read_weights(options.rule, options.weights, count, "--weights")
    overrides = [read_override(options.rule, f".*:{n}={v}", count, f"--set {n}={v}") for n, v in along.items()]
    overrides += [read_override(options.rule, text, count) for text in options.tensors]
    rule.check(settings, "--set")
    for override in overrides:
        for place in sorted(override.knots()):
            rule.check(settings | override.at(options.rule, place)[0], override.where)
    models, base, like, notes = _open(options)
    statistics = Statistics(options.rule, rule, options.statistics, models)
    everything = [*models, *([base] if base is not None else [])]
    reference = like or base or models[0]
    aliases = _aliases(everything)
    names = sorted({name for one in everything for name in one.entries} - aliases.keys())
    check_patterns(overrides, names)
    depths = places(names)
    items: list[Item] = []
    alone: list[str] = []
    other: list[str] = []
    problems: list[str] = []
    position = 0
    for name in names:
        here = [model.entries.get(name) for model in models]
        start = None if base is None else base.entries.get(name)
        first = start or next(entry for entry in here if entry is not None)
        if like is not None and name not in like.entries:
            other.append(name)
            position += first.numel
            continue
        matching = [override for override in overrides if re.fullmatch(override.pattern, name)]
        mine, own, take = dict(settings), weights, None
        try:
            for override in matching:
                values, weighed = override.at(options.rule, depths[name])
                mine |= values
                own = weighed or own
                take = override.take
            chosen = _choose(name, here, start, base is not None, rule, options, take, len(models), models)
            of_data, axis = statistics.of(name, first.shape) if chosen and chosen[0] == "merge" else ([], {})
            if chosen and chosen[0] == "average":
                own = _of_present(name, own, here)
        except UserError as problem:
            problems.append(str(problem))
            continue
        if chosen is not None:
            action, entries = chosen
            if rule.statistics is not None and not of_data and action == "merge":
                action = "average"
                alone.append(name)
            shares = (1.0,) if action == "copy" else own
            kind = entries[0] if action == "copy" else first
            if like is not None and like.entries[name].dtype.is_floating_point and kind.dtype.is_floating_point:
                kind = like.entries[name]
            dtype = _dtype(kind, action, options)
            used = start if action == "merge" else None
            mine |= axis
            items.append(Item(name, entries[0].shape, dtype, action, entries, used, position, mine, shares, of_data))
        else:
            notes.append(f"left out: {name}")
        position += first.numel
    if like is not None:
        problems += _unlike(like, items, aliases)
    if problems:
        more = f" (and {counted(len(problems) - 3, 'more problem')})" if len(problems) > 3 else ""
        raise UserError("; ".join(problems[:3]) + more)
    if not items:
        raise UserError("no tensor is left to merge: the inputs share no name")
    notes += [f"tied: {alias} is {kept}, written once" for alias, kept in aliases.items()]
    wide = [item.name for item in items if any(e.dtype == torch.float64 for e in item.models) and item.action != "copy"]
    if wide:
        notes.append(f"float64 is merged in fp32: {shown(wide)}")
    if other:
        notes.append(f"left out, as {reference.label} has none: {shown(other)}")
    if alone:
        notes.append(f"averaged, without statistics: {shown(alone)}")
    return Plan(options, rule, models, base, statistics.inputs, reference, items, notes, _shards(reference), aliases)


def _unlike(like: Input, items: Sequence[Item], aliases: dict[str, str]) -> list[str]:
    """What keeps the output from being like that model."""
    found = {item.name: item for item in items}
    missing = sorted(like.entries.keys() - found.keys() - aliases.keys())
    problems = [f"--like {like.label} has {shown(missing)}, but the merge has not"] if missing else []
    for name, item in found.items():
        its = like.entries[name]
        if its.shape != item.shape:
            problems.append(f"{name}: shape {list(item.shape)}, but {list(its.shape)} in --like {like.label}")
        elif its.dtype.is_floating_point != item.dtype.is_floating_point or (
            its.dtype != item.dtype and not its.dtype.is_floating_point
        ):
            problems.append(f"{name}: {item.dtype}, but {its.dtype} in --like {like.label}")
    return problems


def _open(options: Options) -> tuple[list[Input], Input | None, Input | None, list[str]]:
    """models, base, the model of --like (None: not given, or the base or first model, which it is by default), notes."""
    base = None if options.base is None else open_input(options.base)
    if isinstance(options.like, str) and options.like == "base":
        if base is None:
            raise UserError("--like base: --base is not given; name it, or the model that the output should be like")
        like: Input | None = base
    else:
        like = None if options.like is None else open_input(options.like)
    for flag, one in (("base", base), ("like", like)):
        if isinstance(one, Adapter):
            raise UserError(f"--{flag} {one.label}: an adapter is no model; name the model that it adapts")
    if base is not None and like is not None and like is not base:
        base = align(base, like)
    models: list[Input] = []
    for k, source in enumerate(options.models):
        model = open_input(source)
        model.label = model.label if model.files else f"model {k + 1}"
        if isinstance(model, Adapter):
            if base is None:
                raise UserError(f"{model.label}: an adapter needs --base, the model that it adapts")
            models.append(model.on(base))
            continue
        reference = like or base or (models[0] if models else model)
        model = align(model, reference)
        same = sum(name in reference.entries for name in model.entries)
        if same < min(len(model.entries), len(reference.entries)) / 4:
            raise UserError(
                f"{model.label}: another architecture than {reference.label}: only {same} of its {len(model.entries)} tensor "
                f"names are there (here {shown(sorted(model.entries), 2)}; there {shown(sorted(reference.entries), 2)})"
            )
        models.append(model)
    seen: dict[tuple[Path, ...], int] = {}
    for k, model in enumerate(models):
        files = tuple(file.resolve() for file in model.files)
        if files and files in seen:
            raise UserError(
                f"--models: {model.label} is model {seen[files] + 1} and {k + 1}; name it once, with a larger weight"
            )
        seen[files] = k
    notes = [note for one in [*models, *([base] if base is not None else [])] for note in one.notes]
    if like is not None and like is not base:
        notes.append(f"names, types and files like {like.label}")
    if base is not None and tuple(file.resolve() for file in base.files) in seen and base.files:
        notes.append(f"the base {base.label} is also one of the models: its task vector is zero")
    return models, base, like, notes


def _choose(
    name: str,
    here: list[Entry | None],
    start: Entry | None,
    has_base: bool,
    rule: FileRule,
    options: Options,
    take: str | None,
    count: int,
    models: Sequence[Input],
) -> tuple[str, list[Entry]] | None:
    """(action, entries) of a tensor; None leaves it out.

    Raises:
        UserError: what is wrong with it.
    """
    if take is not None:
        entry = start if take == "base" else here[int(take) - 1]
        if entry is None:
            raise UserError(f"--tensors take={take}: {name} is not in it")
        return "copy", [entry]
    present = [entry for entry in here if entry is not None]
    if len(present) < count or (has_base and start is None):
        absent = [model.label for model, entry in zip(models, here, strict=True) if entry is None]
        absent += ["the base"] if has_base and start is None else []
        if options.missing == "skip":
            return None
        if options.missing == "average" and present:
            if len({entry.shape for entry in present}) > 1:
                raise UserError(f"{name}: cannot average shapes {', '.join(str(list(e.shape)) for e in present)}")
            if all(entry.dtype.is_floating_point for entry in present):
                return "average", present
            return _equal(name, present)
        if options.missing == "base" and start is not None:
            present = [entry or start for entry in here]
        elif options.missing == "average" and start is not None:
            return "copy", [start]
        else:
            raise UserError(
                f"{name}: not in {shown(absent)}; choose --missing base, average or skip, or --tensors "
                f"'{re.escape(name)}:take=...'"
            )
    every = [*present, *([start] if start is not None else [])]
    shapes = {entry.shape for entry in every}
    if len(shapes) > 1:
        if options.mismatch == "base" and start is not None:
            return "copy", [start]
        owners = [m.label for m in models] + ["base"] * (start is not None)
        told = ", ".join(f"{list(e.shape)} in {o}" for e, o in zip(every, owners, strict=True))
        raise UserError(
            f"{name}: shapes differ: {told}; choose --mismatch base, or --tensors '{re.escape(name)}:take=...'"
        )
    kinds = {entry.dtype.is_floating_point for entry in every}
    if len(kinds) > 1:
        raise UserError(f"{name}: {', '.join(sorted({str(e.dtype) for e in every}))} in different inputs")
    return ("merge", present) if kinds == {True} else _equal(name, every)


def _of_present(name: str, weights: Sequence[float], here: Sequence[Entry | None]) -> tuple[float, ...]:
    """The weights of the models that have a tensor.

    Raises:
        UserError: it cannot be averaged with them.
    """
    found = tuple(w for w, entry in zip(weights, here, strict=True) if entry is not None)
    if abs(sum(found)) < 1e-3 * max(map(abs, found)) + 1e-30:
        raise UserError(
            f"{name}: the weights of the models that have it add up to {sum(found):g}, so it has no average; choose "
            f"--missing skip, or --tensors '{re.escape(name)}:take=...'"
        )
    return found


def _equal(name: str, entries: list[Entry]) -> tuple[str, list[Entry]]:
    """Whole numbers cannot be merged: they are copied where all inputs agree."""
    first = entries[0].whole()
    for entry in entries[1:]:
        if entry.dtype != entries[0].dtype or not torch.equal(first, entry.whole()):
            raise UserError(
                f"{name}: {entries[0].dtype} values differ, and whole numbers are not merged; choose --tensors "
                f"'{re.escape(name)}:take=base' or take=1"
            )
    return "copy", [entries[0]]


def _dtype(entry: Entry, action: str, options: Options) -> torch.dtype:
    if options.extract_lora is not None and entry.dtype.is_floating_point:
        return torch.float32  # of which the difference is taken; --dtype is the adapter's
    if options.dtype is not None and entry.dtype.is_floating_point:
        return OUT_DTYPES[options.dtype]
    return torch.float32 if entry.dtype == torch.float64 and action != "copy" else entry.dtype


def _aliases(inputs: Sequence[Input]) -> dict[str, str]:
    """Names to leave out because every input that has them ties them to another name, which is kept."""
    tied: list[dict[str, str]] = []
    for one in inputs:
        first: dict[Any, str] = {}
        mine = {alias: kept for alias, kept in one.metadata.items() if kept in one.entries and alias not in one.entries}
        for name in sorted(one.entries):
            tie = one.entries[name].tie
            if tie is not None and first.setdefault(tie, name) != name:
                mine[name] = first[tie]
        tied.append(mine)
    found = {}
    for alias, kept in {pair for mine in tied for pair in mine.items()}:
        if all(mine.get(alias) == kept or alias not in one.entries for mine, one in zip(tied, inputs, strict=True)):
            found[alias] = kept
    return dict(sorted(found.items()))


def _shards(reference: Input) -> dict[str, str]:
    return reference.shards if len(set(reference.shards.values())) > 1 else {}
