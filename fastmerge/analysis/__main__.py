"""The command line of the analyses; see `fastmerge.analysis`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge import analysis
from fastmerge.analysis.figure import Output
from fastmerge.errors import UserError
from fastmerge.wording import counted

if TYPE_CHECKING:
    from fastmerge.setup import Setup


FINISHED = ("bars", "accuracy", "sweep")  # they read finished runs, and train nothing


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=Path("figures"), help="folder for the CSV, PNG and PDF (figures)")
    made = argparse.ArgumentParser(
        prog="fastmerge analyse",
        description=analysis.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = made.add_subparsers(dest="what", required=True)

    def kind(name: str, text: str) -> argparse.ArgumentParser:
        more = None if name in FINISHED else "All settings of the trainer apply too: python -m fastmerge --help-all."
        return kinds.add_parser(name, parents=[common], description=text, help=text, epilog=more, allow_abbrev=False)

    one = kind("interpolate", "accuracy and loss between the models of two tasks")
    one.add_argument("--points", type=int, default=11, help="number of weights from 0 to 1 (11)")
    one = kind("embeddings", "features of old classes before and after alignment")
    one.add_argument("--classes", type=int, default=3, help="number of classes of the first task (3)")
    one = kind("landscape", "the loss over the plane through P&M's initial, old and new model")
    one.add_argument("--points", type=int, default=11, help="number of weights per axis (11)")
    one.add_argument("--after", type=int, nargs="+", help="numbers of the tasks whose merges are shown (the last one)")
    one.add_argument("--both", action="store_true", help="show training without perturbation beside it")
    one = kind("trajectory", "the loss between the old and the new model, and that of every merge")
    one.add_argument("--points", type=int, default=21, help="number of weights from 0 to 1 (21)")
    more = kind("drift", "how far every merge moves the class token of every layer")
    for each in (one, more):
        each.add_argument("--method", nargs="+", metavar="MERGE", help="trm or merge rules, with settings (all)")
    one = kind("gradients", "how much the gradient of the next task turns along its training, from every merge")
    one.add_argument("--points", type=int, default=11, help="number of weights from 0 to 1 (11)")
    one.add_argument(
        "--method", nargs="+", metavar="MERGE", help="trm or merge rules, with settings (magmax ties stock trm)"
    )
    one = kind("bars", "accuracy, forgetting and plasticity of finished runs")
    one.add_argument("runs", type=Path, nargs="+", help="run folders, or their results.json")
    one = kind("accuracy", "accuracy over the tasks of finished runs: mean, least and largest over the seeds")
    one.add_argument("runs", type=Path, nargs="+", help="run folders, or their results.json")
    one = kind("sweep", "a setting against a metric of finished runs: mean, least and largest over the seeds")
    one.add_argument("runs", type=Path, nargs="+", help="run folders")
    one.add_argument("--x", required=True, metavar="SETTING", help="the setting, such as trm.replace_ratio or lr")
    one.add_argument("--lines", metavar="SETTING", help="a second setting: one line for each of its values")
    one.add_argument("--rows", nargs="+", metavar="LABEL", help="only these rows of the folders' tables (all)")
    one.add_argument("--metric", default="final_accuracy", help="such as aaa or forgetting (final_accuracy)")
    return made


def analyse(words: Sequence[str]) -> list[Path]:
    """Run the analysis of a command line; returns the paths that it wrote.

    Raises:
        UserError: see `fastmerge analyse`; `Unprepared` if data or weights are missing.
    """
    own, rest = parser().parse_known_args(words)
    return run(own, rest, shlex.join(["python", "-m", "fastmerge", "analyse", *words]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one analysis; returns the exit code (2: bad input)."""
    try:
        paths = analyse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for path in paths:
        print(path)
    return 0


def run(own: argparse.Namespace, rest: list[str], command: str) -> list[Path]:
    """Run one analysis; returns the paths that it wrote. own: its settings; rest: the trainer's; command: as typed."""
    if own.what in FINISHED and rest:
        raise UserError(f"{own.what} takes run folders and --out, not {' '.join(rest)}")
    for name, least in (("points", 2), ("classes", 1), ("after", 2)):
        value = getattr(own, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise UserError(f"--{name} {number}: expected {least} or more")
    if own.what in FINISHED:
        return of_runs(own, output(own.out, command))

    from fastmerge.flags import parse
    from fastmerge.setup import Setup

    setup = Setup(parse(rest))
    tasks, needed = len(setup.scenario.tasks), 3 if own.what == "gradients" else 2
    if tasks < needed:
        raise UserError(
            f"--tasks {tasks}: {own.what} compares the models of {counted(needed, 'task')}; choose at least {needed}"
        )
    return of_training(own, setup, output(own.out, command))


def of_runs(own: argparse.Namespace, out: Output) -> list[Path]:
    if own.what == "sweep":
        from fastmerge.analysis.sweep import sweep

        return sweep(own.runs, own.x, own.metric, out, own.lines, own.rows)
    if own.what == "accuracy":
        from fastmerge.analysis.accuracy import accuracy

        return accuracy(own.runs, out)
    from fastmerge.analysis.bars import bars

    return bars(own.runs, out)


def of_training(own: argparse.Namespace, setup: Setup, out: Output) -> list[Path]:
    if own.what == "interpolate":
        from fastmerge.analysis.interpolate import interpolate

        return interpolate(setup, own.points, out)
    if own.what == "embeddings":
        from fastmerge.analysis.embeddings import embeddings

        return embeddings(setup, own.classes, out)
    if own.what == "landscape":
        from fastmerge.analysis.landscape import landscape

        tasks = len(setup.scenario.tasks)
        after = sorted(set(own.after or [tasks]))
        if after[-1] > tasks:
            raise UserError(f"--after {after[-1]}: the scenario has {counted(tasks, 'task')}")
        return landscape(setup, after, own.both, own.points, out)
    if own.what == "gradients":
        from fastmerge.analysis.gradients import SHOWN, gradients

        return gradients(setup, own.method or SHOWN, own.points, out)
    from fastmerge.analysis.merges import NAMES

    specs = own.method or NAMES
    if own.what == "trajectory":
        from fastmerge.analysis.trajectory import trajectory

        return trajectory(setup, specs, own.points, out)
    from fastmerge.analysis.drift import drift

    return drift(setup, specs, out)


def output(out: Path, command: str) -> Output:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error}); choose another folder") from None
    return Output(out, command)


if __name__ == "__main__":
    sys.exit(main())
