"""Merge checkpoint files of one architecture, tensor by tensor, without loading a model.

  fastmerge merge ties --models a.safetensors b_dir/ --base clip.safetensors --set density=0.2 --out merged/
  fastmerge merge average --models a.pt b.pt --weights 1 3 --tensors 'head\\..*:take=1' --dtype bf16 --out merged.safetensors
  fastmerge merge --mergekit config.yml --out merged/
  fastmerge merge --recipe merged/          # merges again from the recorded inputs and compares every bit
  fastmerge merge average --models runs/x/finetune-seed0 runs/x/finetune-seed1 --sweep weights.1=0.1:2:0.1 --evaluate --out m

A model is a .safetensors or .pt file, a folder with shards, a folder of a run, or a folder of a peft LoRA adapter. All
headers are compared before data is read. An interrupted merge goes on where it was with the same command. See
docs/MERGE.md.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.errors import UserError
from fastmerge.files.hashes import Hashes, likely_files
from fastmerge.wording import counted

SCORING = ("model", "validation", "data_root", "split_file", "test_part", "class_names", "batch_size")


def main(argv: Sequence[str]) -> int:
    """Run `fastmerge merge`; returns the exit code.

    Raises:
        UserError: wrong flags, inputs that do not fit together, an output that cannot be written.
    """
    given = parsed(argv)
    if given.dry_run or given.out is None or given.sweep is not None:
        return run(given, argv, None)
    hashes = Hashes(likely_files([*given.models, *([given.base] if given.base else [])]))
    try:
        return run(given, argv, hashes)
    finally:
        hashes.close()


def run(given: Any, argv: Sequence[str], hashes: Hashes | None) -> int:
    """hashes: those that have begun."""
    from fastmerge.files.merge import NO_REPORT, repeat, write  # imports torch: not for --help
    from fastmerge.files.mergekit import read_config
    from fastmerge.files.plan import Options, make_plan
    from fastmerge.files.report import save_report
    from fastmerge.files.stream import MEMORY, Stream
    from fastmerge.machine import choose_device

    memory = MEMORY if given.max_memory is None else read_size("--max-memory", given.max_memory)
    if given.recipe is not None:
        if given.rule or given.models or given.out:
            raise UserError("--recipe repeats a merge as it was: leave the rule, --models and --out away")
        count = repeat(given.recipe, memory, given.allow_nonfinite)
        print(f"{given.recipe}: merged again from the same inputs, {counted(count, 'tensor')} with the same bits")
        return 0
    if given.mergekit is not None:
        if given.rule or given.models or given.base or given.weights or given.set:
            raise UserError("--mergekit names the rule, models, base, weights and settings: leave them away")
    elif not given.rule:
        raise UserError("give a rule, such as `fastmerge merge ties --models A B --base C --out DIR`, or --recipe")
    elif not given.models:
        raise UserError("--models is not given; name the files or folders to merge")
    if given.out is None and not given.dry_run:
        raise UserError("--out is not given; name a folder or a .safetensors file, or pass --dry-run")
    if given.mergekit is not None:
        options = read_config(given.mergekit)
    else:
        options = Options(given.rule, given.models, given.base, given.weights, settings_of(given.set))
    options.statistics = given.statistics
    options.tensors += given.tensors
    options.missing, options.mismatch, options.seed = given.missing, given.mismatch, given.seed
    options.like = given.like
    options.dtype, options.extract_lora = given.dtype or options.dtype, given.extract_lora
    options.shard = None if given.shard is None else read_size("--shard", given.shard)
    if given.evaluate is None and (flag := next((f for f in SCORING if getattr(given, f) is not None), None)):
        raise UserError(f"--{flag.replace('_', '-')} needs --evaluate: a merge without --sweep is scored by none")
    if (given.sweep is None) != (given.evaluate is None):
        raise UserError(
            "--sweep and --evaluate need each other: what to try, and the images that choose the best of it"
        )
    if given.report is not None and options.extract_lora is not None:
        raise UserError(NO_REPORT)
    plan = make_plan(options)
    for line in plan.lines(memory):
        print(line)
    chosen = None
    if given.sweep is not None:
        options, chosen = best(options, plan, given, memory, shlex.join(["fastmerge", "merge", *argv]))
        plan.check_unchanged()
        if not given.dry_run:
            plan = make_plan(options)
    if given.dry_run:
        print("--dry-run: nothing is merged or written")
        return 0
    device = choose_device(given.device)
    stream = Stream(plan, memory, given.report is not None, not given.allow_nonfinite, device)
    found = write(plan, stream, given.out.expanduser(), print, chosen, hashes)
    bad = sum(about["nonfinite"] for about in found.values())
    print(
        f"{given.out}: written"
        + (f", with {counted(bad, 'value that is', 'values that are')} NaN or inf" if bad else "")
    )
    if given.report is not None:
        save_report(given.report, plan, found)
        print(f"{given.report}: one row per tensor; {given.report.with_suffix('.png')}: the same as a picture")
    return 0


def best(options: Any, plan: Any, given: Any, memory: int, command: str) -> tuple[Any, dict[str, Any]]:
    """The options of the best merge of --sweep, and what the recipe says of the choice.

    Raises:
        UserError: a sweep that cannot be scored.
    """
    from fastmerge.files.score import Scorer
    from fastmerge.files.sweep import read_grid, save_table, sweep, text_of
    from fastmerge.files.write import check_target
    from fastmerge.machine import choose_device

    points = read_grid(given.sweep, options)
    if not given.dry_run:
        check_target(given.out.expanduser())
    first = plan.models if plan.base is None else [plan.base, *plan.models]
    scorer = Scorer(first, given)
    print(f"{counted(len(points), 'merge is', 'merges are')} scored on {scorer.images}")
    if given.dry_run:
        return options, {}
    how = {"memory": memory, "finite": not given.allow_nonfinite, "device": choose_device(given.device)}
    found = sweep(options, points, scorer, functools.partial(print, flush=True), **how)
    point, score = points[found.best], found.scores[found.best]
    files = save_table(given.out.expanduser(), found, command)
    print(f"best: {text_of(point)}, accuracy {score:.2f} % on {scorer.images}; all: {', '.join(map(str, files))}")
    return found.options, {"point": point, "accuracy": score, "images": scorer.images, "merges": len(points)}


def parsed(argv: Sequence[str]) -> Any:
    from fastmerge.flags import Parser, add_data_flags

    made = Parser("fastmerge merge", description=__doc__, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add(
        "rule",
        nargs="?",
        help="average, task-arithmetic, ties, dare, dare-ties, della, della-linear, magmax, randmix, stock, slerp, "
        "nuslerp, karcher, wise-ft, coma, breadcrumbs, sce, iso-c, tsv, opcm, knots, fisher, cofima, regmean",
    )
    add("--models", nargs="+", default=[], metavar="PATH", help="what to merge, in this order")
    add("--base", metavar="PATH", help="the model that the others were fine-tuned from; task-vector rules need it")
    add(
        "--statistics",
        nargs="+",
        default=[],
        metavar="PATH",
        help="of each model's data: fisher, cofima, regmean need them",
    )
    add("--weights", nargs="+", type=float, metavar="W", help="one number per model (default: all 1)")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the rule; the defaults are the papers'")
    add(
        "--tensors",
        nargs="+",
        default=[],
        metavar="PATTERN:NAME=VALUE",
        help="settings for tensors whose whole name matches the regular expression; the last match counts. Also "
        "take=base or take=2 (copy from the base or a model), weights=1/0.5; 0.2..0.8 goes along the layers",
    )
    add("--out", type=Path, help="folder, or .safetensors file, to write")
    add(
        "--missing",
        default="error",
        help="tensors that not all inputs have: error, base, average or skip (default: error)",
    )
    add(
        "--mismatch",
        default="error",
        help="tensors of different shapes: error, or base, the base's tensor (default: error)",
    )
    add("--dtype", help="fp32, bf16 or fp16 for all floats (default: as in the base, or in the first model)")
    add(
        "--like",
        metavar="PATH",
        help="the output has exactly the tensors, names, types and files of this model: base, or another (default: every "
        "tensor of the inputs, with types and files of the base)",
    )
    add("--shard", metavar="SIZE", help="largest size of a file, such as 2GB (default: files like those of the base)")
    add("--extract-lora", type=int, metavar="RANK", help="write the difference to the base as a LoRA adapter of peft")
    add("--seed", type=int, default=0, help="of random rules (default: 0)")
    add("--max-memory", metavar="SIZE", help="bound of the parts that are merged at a time (default: 256MB)")
    add("--report", type=Path, metavar="CSV", help="write norm, cosines, sign conflicts per tensor, and a picture")
    add("--allow-nonfinite", action="store_true", help="NaN and inf in the output are no error")
    add(
        "--sweep",
        nargs="+",
        metavar="NAME=VALUES",
        help="try values of one or two settings, and write the best: FROM:TO:STEP or A,B,C; weights.2 is a model's weight",
    )
    add("--evaluate", nargs="*", metavar="DATASET", help="data set that scores a sweep (default: that of the runs)")
    add("--model", help="open_clip or timm model that a sweep loads the merged tensors into, if they are not of runs")
    add(
        "--validation",
        type=float,
        help="share of the training images of every class that is held out to score a sweep (default: the run's, or 0.2); "
        "0: the test images",
    )
    add_data_flags(made)
    add(
        "--device",
        default="cpu",
        help="where tensors are merged, and a sweep is evaluated: cpu, cuda, cuda:N or auto (default: cpu)",
    )
    add("--dry-run", action="store_true", help="compare the inputs, print the plan, write nothing")
    add("--mergekit", type=Path, metavar="YAML", help="rule, models and settings from a config of mergekit")
    add("--recipe", type=Path, metavar="MERGED", help="repeat a merge from its recorded recipe and compare")
    return made.parse_args(argv)


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words as a mapping.

    Raises:
        UserError: a word without an equals sign.
    """
    for word in words:
        if "=" not in word:
            raise UserError(f"--set {word!r}: expected NAME=VALUE, such as density=0.2")
    return dict(word.split("=", 1) for word in words)


def read_size(flag: str, text: str) -> int:
    """Bytes from '2GB', '500MB', '1GiB' or a plain number.

    Raises:
        UserError: no positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    count = (
        0
        if not match
        else int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    )
    if not count:
        raise UserError(f"{flag} {text}: expected a size such as 500MB, 2GB or 1GiB")
    return count
