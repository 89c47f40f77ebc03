"""One merge from beginning to end: plan, stream, output. `fastmerge.merge` in Python, `fastmerge merge` on the command
line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.about import merged_about
from fastmerge.files.extract import WEIGHTS, extracted, save
from fastmerge.files.hashes import Hashes
from fastmerge.files.inputs import open_input
from fastmerge.files.plan import Item, Options, Plan, make_plan
from fastmerge.files.recipe import KEY, check_inputs, identity, options_of, read_recipe, recipe
from fastmerge.files.report import save_report
from fastmerge.files.stream import MEMORY, Memory, Stream
from fastmerge.files.write import Output, files_of
from fastmerge.machine import choose_device
from fastmerge.wording import counted

NO_REPORT = "--report is of a merged model; the adapter of --extract-lora has extracted.csv beside it"


def merge(
    models: list[Any],
    rule: str,
    *,
    base: Any = None,
    out: str | Path | None = None,
    memory: int = MEMORY,
    allow_nonfinite: bool = False,
    report: str | Path | None = None,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Tensor]:
    """Merge checkpoints by a rule of `fastmerge merge`.

    models, base: paths, or mappings of names to tensors, which are not changed. out: a folder or a .safetensors file to
    write; without it the merged tensors (or the adapter's) are returned, on the CPU. memory: bytes that bound the parts.
    report: a .csv file to write. device: where the ops run. options: weights, settings, tensors, statistics, missing,
    mismatch, dtype, like, shard, seed, extract_lora, as on the command line.

    Raises:
        UserError: what is wrong with the inputs or the output; nothing is written then.
    """
    try:
        asked = Options(rule, list(models), base, **options)
    except TypeError as error:
        raise UserError(f"merge: {error}") from None
    if report is not None and asked.extract_lora is not None:
        raise UserError(NO_REPORT)
    plan = make_plan(asked)
    stream = Stream(plan, memory, report is not None, not allow_nonfinite, choose_device(device))
    if out is None and asked.extract_lora is not None:
        return extracted(plan, stream).factors
    if out is None:
        sink = Memory()
        found = stream.run(sink)
    else:
        sink = None
        found = write(plan, stream, Path(out).expanduser())
    if report is not None:
        save_report(Path(report), plan, found)
    return {} if sink is None else sink.tensors


def write(
    plan: Plan,
    stream: Stream,
    out: Path,
    say: Callable[[str], None] = lambda text: None,
    chosen: dict[str, Any] | None = None,
    hashes: Hashes | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the merged files; returns what `Stream.run` does. chosen: how a sweep chose the options, for the recipe.
    hashes: those that have begun.

    Raises:
        UserError: see `Output` and `Stream.run`; nothing is left then.
    """
    check_apart(out, plan)
    about, pending = recipe(plan)
    about |= {"chosen": chosen} if chosen else {}
    about |= {"device": stream.device.type} if stream.device.type != "cpu" else {}
    if plan.options.extract_lora is not None:
        return write_adapter(plan, stream, out, say, about, pending, hashes or Hashes())
    text = {"format": "pt", KEY: json.dumps(about)} | plan.aliases
    single = len(files_of(plan, out.name if out.suffix == ".safetensors" else None)) == 1
    of_run, why = merged_about(plan.models, plan.options.rule, [item.name for item in plan.items], single)
    if of_run is not None:
        text["about"] = json.dumps(of_run)
    if why is not None:
        say(f"`fastmerge evaluate` cannot score it: {why}")
    same = identity(plan, device=stream.device.type, measured=stream.measure, finite=stream.finite)
    output = Output(out, plan, text, same)
    if output.done:
        say(f"going on after {len(output.done)} of {counted(len(plan.items), 'tensor')}")
    hashes = hashes or Hashes()
    try:
        hashes.add(pending)
        found = stream.run(output)
        known = hashes.wait(plan.stamps)
    except UserError:
        output.delete()
        raise
    output.finish({pending[file]: known[file] for file in pending}, plan.like.folder)
    return found


def write_adapter(
    plan: Plan,
    stream: Stream,
    out: Path,
    say: Callable[[str], None],
    about: dict[str, Any],
    pending: dict[Path, str],
    hashes: Hashes,
) -> dict[str, dict[str, Any]]:
    """Write the folder of the adapter that `--extract-lora` asks for; returns {}. about, pending: the recipe."""
    if out.suffix == ".safetensors":
        raise UserError(f"--out {out}: an adapter is a folder; leave the ending away")
    hashes.add(pending)
    found = extracted(plan, stream)

    def metadata() -> dict[str, str]:
        text, known = json.dumps(about), hashes.wait(plan.stamps)
        for file, old in pending.items():
            text = text.replace(old, known[file])
        return {"format": "pt", KEY: text}

    save(found, out, metadata)
    for line in found.lines():
        say(line)
    return {}


def check_apart(out: Path, plan: Plan) -> None:
    """Raise UserError if the output would be an input, hold one, or be in its folder."""
    try:
        place = Path(os.path.realpath(out))  # unlike `resolve`, of a loop of links too
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: cannot be the name of a file ({error})") from None
    for one in plan.inputs:
        for file in one.files:
            if place in (file.resolve(), *file.resolve().parents):
                raise UserError(f"--out {out}: the input {file} is there; choose another name")
        if one.folder is not None and one.folder.resolve() in place.parents:
            raise UserError(
                f"--out {out}: it is inside the input folder {one.folder}, which would hold two models then; choose another "
                "place"
            )


class Comparison(Memory):
    """A sink that compares every tensor with one that exists, bit by bit."""

    def __init__(self, path: Path):
        super().__init__()
        self.entries = dict(open_input(path).entries)
        self.different: list[str] = []

    def finished(self, item: Item, about: dict[str, Any]) -> None:
        self.compare(item.name, self.tensors.pop(item.name))

    def compare(self, name: str, new: Tensor) -> None:
        old = self.entries.pop(name, None)
        if (
            old is None
            or (old.dtype, old.shape) != (new.dtype, tuple(new.shape))
            or not torch.equal(new.view(-1).view(torch.uint8), old.whole().view(torch.uint8))
        ):
            self.different.append(name)


def repeat(path: Path, memory: int, allow_nonfinite: bool) -> int:
    """Merge again what the recipe of `path` says, and compare; returns the number of tensors.

    Raises:
        UserError: no recipe, inputs that changed, or tensors that are not the same bits.
    """
    about = read_recipe(path)
    check_inputs(about)
    plan = make_plan(options_of(about))
    device = choose_device(about.get("device", "cpu"))  # another one rounds sums in another way
    stream = Stream(plan, memory, finite=not allow_nonfinite, device=device)
    if plan.options.extract_lora is not None:
        new, sink = extracted(plan, stream).factors, Comparison(path / WEIGHTS)
        for name, x in new.items():
            sink.compare(name, x)
    else:
        sink = Comparison(path)
        stream.run(sink)
    different = [*sink.different, *sink.entries]
    if different:
        bad = counted(len(different), "of its tensors is", "of its tensors are")
        raise UserError(
            f"{path}: {bad} not what the recipe gives, such as {different[0]}; it was changed, or "
            f"written with other versions (fastmerge {about['fastmerge']}, torch {about['torch']})"
        )
    return len(plan.items) if plan.options.extract_lora is None else len(new)
