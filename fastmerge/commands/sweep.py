"""Choose settings on held-out training images, then train with the best on all of them: `train --sweep`.

    python -m fastmerge --method trm --sweep trm.lambda1=0.01,0.1,1 trm.lambda2=0,0.01      # a grid of six
    python -m fastmerge --method finetune average --sweep lr=1e-4,3e-4,1e-3 --seeds 0 1 2

Each method is run with all combinations of the swept settings that it reads, and scored on the images that `--validation`
holds out (a fifth if it is not given): the final accuracy, mean over the seeds; of equal ones the first. These runs are in
RUN/validation, the table of all of them in RUN/sweep.csv. Then the best of each method is trained on all training images and
scored on the test images, in RUN. A method that reads none of the settings takes part in the second stage alone. Both
stages are ordinary runs: a stopped command goes on when it is repeated, and other commands take both folders.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastmerge.checkpoint import save_csv
from fastmerge.config import Config, declarations, flag_of
from fastmerge.console import Console
from fastmerge.errors import UserError, nearest
from fastmerge.methods import METHODS
from fastmerge.plan import label_of, read_method, row_settings
from fastmerge.report import number
from fastmerge.results import finished
from fastmerge.wording import counted

HELD_OUT = 0.2  # of the training images without --validation
TABLE = "sweep.csv"


class Candidate(NamedTuple):
    """spec: as `--method` takes it. label: names its runs. point: each swept setting, group.name -> its value, as text."""

    spec: str
    label: str
    point: dict[str, str]


def sweep(config: Config, run: Callable[[Config], int]) -> int:
    """Run both stages; return the exit code. run: makes the runs of a command.

    Raises:
        UserError: an unknown setting, or a value that it does not take; nothing has been run then.
    """
    if config.run.continue_from:
        raise UserError(
            "--sweep --continue-from: the run that goes on was not trained with images held out; choose the settings in a "
            "sweep of their own"
        )
    if len(config.training.protocol) > 1:
        raise UserError("--sweep: the best settings depend on the protocol; expected one --protocol")
    candidates = read_grid(config)
    rank = int(os.environ.get("RANK", "0"))
    console = Console(config.run.quiet or rank != 0)
    part = config.scenario.validation or HELD_OUT
    several = [c for rows in candidates.values() if len(rows) > 1 for c in rows]
    scored = _stage(config, several, Path(config.run.run_dir) / "validation", part, table=False)
    console.line(
        f"--sweep: {counted(len(several), 'candidate')}, scored on {part:.0%} of every class's training images"
        + ("" if config.scenario.validation else " (another part: --validation)")
        + "; then the best of each method, on all training images and the test images"
    )
    last = _stage(config, [c for rows in candidates.values() for c in rows], Path(config.run.run_dir), 0.0, table=True)
    if config.run.dry_run:
        return run(scored)
    if (Path(config.run.run_dir) / "manifest.json").exists():  # refuse a folder of other runs now, not after hours
        checked = dataclasses.replace(last.run, dry_run=True, quiet=True)
        if code := run(dataclasses.replace(last, run=checked)):
            return code
    if code := run(scored):
        return code
    rows, best = table_of(config, candidates)
    if rank == 0:
        save_csv(Path(config.run.run_dir) / TABLE, rows[0], rows[1:])
        console.table(rows)
    return run(_stage(config, best, Path(config.run.run_dir), 0.0, table=True))


def read_grid(config: Config) -> dict[str, list[Candidate]]:
    """The candidates of every `--method`; one without a point where it reads none of the settings.

    Raises:
        UserError: see `sweep`.
    """
    swept: dict[str, list[str]] = {}
    for word in config.run.sweep:
        name, equals, text = word.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not equals or not all(values):
            raise UserError(f"--sweep {word!r}: expected SETTING=VALUE,VALUE,..., such as trm.lambda1=0.01,0.1,1")
        group, setting = place(name)
        flag = f"{group}.{setting}"
        if flag in swept:
            raise UserError(f"--sweep {word}: {name} is given twice; expected each setting once")
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f"--sweep {word}: {twice[0]} is given twice; expected each value once")
        swept[flag] = values
    found = {spec: list(_candidates(spec, swept, config)) for spec in config.training.method}
    for flag in swept:
        if not any(flag in c.point for rows in found.values() for c in rows):
            name = flag_of(*flag.split("."))
            raise UserError(f"--sweep {name}: none of {', '.join(found)} reads it; expected a setting of a --method")
    if all(len(rows) == 1 for rows in found.values()):
        raise UserError(f"--sweep {' '.join(config.run.sweep)}: a single candidate; expected two values or more")
    return found


def place(name: str) -> tuple[str, str]:
    """(group, setting) of a flag's name without dashes in front: trm.lambda1, lr."""
    flags = {flag_of(group, setting): (group, setting) for group, known in declarations().items() for setting in known}
    flag = name.strip().removeprefix("--").replace("_", "-").removeprefix("training.")
    if flag not in flags:
        raise UserError(f"--sweep {name}: no such setting.{nearest(flag, flags)} fastmerge --help-all lists all")
    return flags[flag]


def _candidates(spec: str, swept: dict[str, list[str]], config: Config) -> list[Candidate]:
    """All combinations of the values, in the order of the settings; the last one changes fastest."""
    name, its = read_method(spec, config)
    reads = row_settings(name, its)
    own = {flag: values for flag, values in swept.items() if flag in reads}
    found = []
    for values in itertools.product(*own.values()):
        point = dict(zip(own, values, strict=True))
        # by its own name where that is not the name of another setting too
        words = {flag: flag.partition(".")[2] for flag in own}
        pairs = [f"{words[f] if reads[words[f]] == reads[f] else f}={value}" for f, value in point.items()]
        row = f"{spec}{',' if ':' in spec else ':'}{','.join(pairs)}" if pairs else spec
        read_method(row, config)  # every value is checked now
        found.append(Candidate(row, label_of(row, METHODS[name].protocols(its)[0]), point))
    return found


def _stage(config: Config, rows: list[Candidate], folder: Path, validation: float, table: bool) -> Config:
    """The command of one stage. table: whether the baseline beside every table is wanted."""
    nearest_mean = config.training.nearest_mean and table
    training = dataclasses.replace(config.training, method=tuple(c.spec for c in rows), nearest_mean=nearest_mean)
    return dataclasses.replace(
        config,
        training=training,
        scenario=dataclasses.replace(config.scenario, validation=validation),
        run=dataclasses.replace(config.run, run_dir=str(folder), sweep=()),
    )


def table_of(config: Config, candidates: dict[str, list[Candidate]]) -> tuple[list[list[str]], list[Candidate]]:
    """The table of the first stage, header first, and the candidates of the second stage.

    Raises:
        UserError: another process still works on a run of the first stage.
    """
    folder = Path(config.run.run_dir) / "validation"
    flags = list(dict.fromkeys(flag for rows in candidates.values() for c in rows for flag in c.point))
    methods = finished(folder)
    table = [["method", *(flag_of(*flag.split(".")) for flag in flags), "seeds", "held-out acc", "chosen"]]
    best: list[Candidate] = []
    for rows in candidates.values():
        scores: list[list[float]] = []
        for candidate in rows if len(rows) > 1 else ():
            seeds = [methods.get(candidate.label, {}).get(str(seed)) for seed in config.training.seeds]
            scores.append([result["final_accuracy"] for result in seeds if result is not None])
            if len(scores[-1]) < len(seeds):
                raise UserError(
                    f"{folder}: {candidate.label} is not finished by another process; repeat the command later"
                )
        chosen = max(range(len(scores)), key=lambda k: statistics.mean(scores[k]), default=0)  # the first of equal ones
        best.append(rows[chosen])
        for k, (candidate, values) in enumerate(zip(rows, scores, strict=False)):
            cells = [candidate.point.get(flag, "") for flag in flags]
            method = candidate.label.partition("(")[0]
            table.append([method, *cells, str(len(values)), number(values), "best" if k == chosen else ""])
    return table, best
