"""A table or figure of the papers, beside the published numbers.

    fastmerge reproduce --list
    fastmerge reproduce trm:table1 --data-root DIR           # DIR contains the data sets
    fastmerge reproduce trm:table1 --small                   # on the embedded data sets, in minutes
    fastmerge reproduce --all --small --processes 2
    fastmerge reproduce trm:table1 --dry-run                 # runs, images, hours and disk
    fastmerge reproduce ours:frozen --data-root DIR          # a table of our own; docs/RESULTS.md says what they show

What is missing is trained; a stopped command continues when it is repeated, and targets share runs. Several commands may
work in one --runs folder, and `torchrun ... -m fastmerge reproduce` shares every batch. All flags of the trainer that say
how to run apply too (--device, --precision, --micro-batch, ...). Without its data a column is not run, and the command that
would run it is printed. A column that fails does not stop the others; the table says why, and the exit code is not 0.

A difference is called reproduced if it is within two standard errors: of the mean of our seeds and of the published number,
which counts as one run with our deviation where the paper gives none.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmerge.errors import Busy, Unprepared, UserError, first_line, nearest
from fastmerge.reproduce import TARGETS
from fastmerge.reproduce.target import Column, Target
from fastmerge.wording import counted

SMALL_SEEDS = 1  # on embedded data no number is judged
UNTRAINED = "zero-shot"  # every run scores it first
EMBEDDED = {"glyphs": "characters", "glyphs-hard": "harder characters"}


def main(argv: Sequence[str]) -> int:
    """Run `fastmerge reproduce`; returns the exit code: 0 even where a data set is missing, 2 for bad input, 1 or 2 where
    a column failed, 128 and the signal's number where it was stopped.

    Raises:
        UserError: an unknown target, row or flag.
    """
    own, rest = parsed(argv)
    if own.list:
        print(listing())
        return 0
    job = Job(own, rest, chosen(own))
    if own.dry_run:
        print(job.plan())
        return 0
    return job.run()


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own settings, with `targets`, wherever these are, and the flags of the trainer with their values.

    Raises:
        UserError: a word that is neither; a value that a setting of the trainer does not take.
    """
    from fastmerge.flags import known_flags

    own, rest = parser().parse_known_args([word for word in argv if word not in TARGETS])
    own.targets = [word for word in argv if word in TARGETS]
    _, other = known_flags(rest)
    if other and not other[0].startswith("-"):
        raise UserError(
            f"unknown target {other[0]!r}.{nearest(other[0], TARGETS)} fastmerge reproduce --list prints all"
        )
    return own, rest


def parser() -> argparse.ArgumentParser:
    """Of all but the targets: argparse would take the value of a flag that it does not know for one."""
    made = argparse.ArgumentParser("fastmerge reproduce", description=__doc__, allow_abbrev=False)
    made.usage = "fastmerge reproduce [PAPER:ITEM ...] [flag ...]"
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--all", action="store_true", help="all tables and figures of the papers, not our own")
    made.add_argument("--list", action="store_true", help="print what there is")
    made.add_argument("--small", action="store_true", help="on the embedded data sets")
    made.add_argument("--data-root", help="folder that contains the papers' data sets")
    made.add_argument("--only", nargs="+", metavar="ROW", help="these rows of the tables")
    made.add_argument("--seeds", nargs="+", type=int, help="seeds (0 1 2; 0 with --small; others where a target says)")
    made.add_argument("--processes", type=int, default=1, metavar="N", help="train with N processes (1)")
    made.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs (runs/reproduce)")
    made.add_argument(
        "--out", type=Path, default=Path("reproduced"), help="folder of the tables and figures (reproduced)"
    )
    made.add_argument("--dry-run", action="store_true", help="say what would run")
    return made


def listing() -> str:
    width = max(map(len, TARGETS))
    return "\n".join(f"{name:{width}}  {target.title} ({target.where})" for name, target in TARGETS.items())


def chosen(own: argparse.Namespace) -> list[Target]:
    """The targets that the command names.

    Raises:
        UserError: none; an unknown row; a number of processes or seeds that cannot be.
    """
    if own.all == bool(own.targets):
        raise UserError("reproduce: name a table or figure, such as trm:table1, or give --all; --list prints them")
    if own.processes < 1:
        raise UserError(f"--processes {own.processes}: expected at least 1")
    named = [name for name in TARGETS if not TARGETS[name].ours] if own.all else own.targets
    found = list({TARGETS[name].name: TARGETS[name] for name in named}.values())
    known = list(dict.fromkeys(row for target in found for row in target.rows))
    for row in own.only or ():
        if row not in known:
            raise UserError(f"--only {row}: no such row.{nearest(row, known)} Expected one of: {', '.join(known)}")
    return found


class Part(NamedTuple):
    """One command of the trainer. rows: row -> method."""

    target: Target
    column: Column
    rows: dict[str, str]

    @property
    def specs(self) -> list[str]:
        """`--method` of the trainer; for the untrained model alone the cheapest one."""
        return list(dict.fromkeys(spec for spec in self.rows.values() if spec != UNTRAINED)) or ["nearest-mean"]


Failed = tuple[str, str, str]  # folder and flags of a column, and the method: "" for all


class Job:
    """The targets of one command. own: its flags; rest: those for the trainer."""

    def __init__(self, own: argparse.Namespace, rest: list[str], targets: list[Target]):
        self.own, self.rest, self.targets = own, rest, targets
        self.why: dict[Failed, str] = {}
        self.busy: set[Failed] = set()  # those of them that other processes train
        self.not_drawn: set[tuple[str, str]] = set()  # target and folder of figures that failed
        self.code = 0  # of what failed
        for part in self.trainings():
            self.config(part)  # a wrong flag of the trainer is told first

    def columns(self, target: Target) -> tuple[Column, ...]:
        return target.small if self.own.small else target.columns

    def rows(self, target: Target) -> dict[str, str]:
        rows = target.rows | (target.rows_small if self.own.small else {})
        return {row: spec for row, spec in rows.items() if not self.own.only or row in self.own.only}

    def missing(self, target: Target) -> dict[str, str]:
        """row -> why it is not run: a file that only the user has."""
        given = {word.partition("=")[0] for word in self.rest}
        return {row: f"{row} needs {flag}" for row, flag in target.needs.items() if flag not in given}

    def parts(self, target: Target, column: Column) -> list[Part]:
        """What is trained for one column: its rows together, and each row with data settings of its own apart."""
        skip = self.missing(target)
        rows = {row: spec for row, spec in self.rows(target).items() if row not in skip}
        together = {row: spec for row, spec in rows.items() if row not in target.apart}
        made = [Part(target, column, together)] if together else []
        for row in rows.keys() - together.keys():
            folder = f"{column.folder}-{re.sub('[^a-z0-9]+', '-', row.lower())}"
            own = Column(column.name, f"{column.flags} {target.apart[row]}", folder)
            made.append(Part(target, own, {row: rows[row]}))
        return made

    def seeds(self, target: Target) -> list[int]:
        fewer = self.own.small and not target.ours
        return self.own.seeds or list(range(min(SMALL_SEEDS, target.seeds) if fewer else target.seeds))

    def folder(self, column: Column) -> Path:
        return self.own.runs / column.folder

    def data_flags(self, column: Column) -> list[str]:
        """--data-root of the column, if it needs one."""
        root = self.own.data_root
        if not root or column.dataset in EMBEDDED:
            return []
        return ["--data-root", str(Path(root) / column.inside) if column.inside else root]

    def words(self, part: Part) -> list[str]:
        """The trainer's command line."""
        seeds = map(str, self.seeds(part.target))
        place = self.data_flags(part.column)
        words = [*part.column.words, "--method", *part.specs, "--seeds", *seeds, *place, *self.rest]
        return [*words, "--run-dir", str(self.folder(part.column))]

    def config(self, part: Part) -> Any:
        from fastmerge.flags import parse

        return parse(self.words(part))

    def trainings(self) -> list[Part]:
        """All that the targets train."""
        return [
            part
            for target in self.targets
            if target.rows
            for column in self.columns(target)
            for part in self.parts(target, column)
        ]

    def together(self) -> list[Part]:
        """The same trainings in as few commands as can be: each one loads its data and draws the folder's plots."""
        made = dict[tuple[str, str, tuple[int, ...]], Part]()
        for part in self.trainings():
            key = part.column.folder, part.column.flags, tuple(self.seeds(part.target))
            before = made[key].specs if key in made else []
            made[key] = part._replace(rows={spec: spec for spec in (*before, *part.specs)})
        return list(made.values())

    def complete(self, part: Part) -> bool:
        found = self.results(part)
        return all(len(found.get(spec, ())) == len(self.seeds(part.target)) for spec in part.specs)

    def run(self) -> int:
        """Train what is missing, then write every table and figure, and an index of all that the folder has."""
        from fastmerge.checkpoint import save_text
        from fastmerge.reproduce.compare import index

        others, code = self.start_others(), 1
        try:
            stopped = self.train()
            if not stopped:
                self.draw_share()
            code = stopped
        finally:
            for number, other in enumerate(others, 2):
                if code:  # this process was stopped; the runs are saved
                    other.terminate()
                if (its := other.wait()) and not code:
                    print(f"process {number} of {self.own.processes} ended with code {its}", file=sys.stderr)
                    self.code = self.code or (its if its > 0 else 128 - its)  # as a shell says it of a signal
        if others and not code:
            code = self.train(again=True)  # what another process had claimed is finished now
        if code or self.worker is not None or os.environ.get("RANK", "0") != "0":
            return code or self.code
        for target in self.targets:
            if target.rows and not self.rows(target):
                continue  # --only names no row of it; what it wrote before stays
            for path in self.write(target):
                print(path)
        save_text(self.own.out / "index.md", index(self.own.out, list(dict.fromkeys(TARGETS.values()))))
        print(self.own.out / "index.md")
        return self.code

    @property
    def worker(self) -> int | None:
        """The number of this process if `--processes` started it."""
        number = os.environ.get("FASTMERGE_REPRODUCE_WORKER")
        return None if number is None else int(number)

    def start_others(self) -> list[subprocess.Popen]:
        """Start the other processes of `--processes`, each with its share of the threads; they train, and draw the
        figures that train models of their own."""
        if self.own.processes == 1 or self.worker is not None:
            return []
        import torch

        threads = max(1, torch.get_num_threads() // self.own.processes)
        torch.set_num_threads(threads)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
        return [
            subprocess.Popen(
                self.command_of_worker(),
                env=environment | {"FASTMERGE_REPRODUCE_WORKER": str(number)},
                stdout=subprocess.DEVNULL,
            )
            for number in range(1, self.own.processes)
        ]

    def command_of_worker(self) -> list[str]:
        own = self.own
        words = ["--processes", str(own.processes), "--runs", str(own.runs), "--out", str(own.out)]
        words += ["--small"] if own.small else []
        words += ["--seeds", *map(str, own.seeds)] if own.seeds else []
        words += ["--only", *own.only] if own.only else []
        words += ["--data-root", own.data_root] if own.data_root else []
        names = [target.name for target in self.targets]
        return [sys.executable, "-m", "fastmerge", "reproduce", *names, *words, "--quiet", *self.rest]

    def train(self, again: bool = False) -> int:
        """Run the trainer on every column; returns the code of a stopped one, else 0. What is not trained is noted. again:
        only where a result is missing."""
        for place in self.busy:
            del self.why[place]  # it may be free now
        self.busy.clear()
        todo = [part for part in self.together() if not again or not self.complete(part)]
        first = (self.worker or 0) * len(todo) // self.own.processes  # processes begin at different places
        for part in todo[first:] + todo[:first]:
            if not all(self.reason(part, spec) for spec in part.specs) and (code := self.train_part(part)):
                return code
        return 0

    def train_part(self, part: Part) -> int:
        """One command of the trainer; where one of its methods fails, each by itself."""
        from fastmerge.__main__ import run
        from fastmerge.ranks import end

        if os.environ.get("RANK", "0") == "0":
            print(f"{part.column.folder}: {', '.join(part.specs)}", flush=True)
        try:
            return run(self.config(part))
        except Exception as error:
            outside = isinstance(error, Unprepared | Busy)  # nothing that a method did
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not isinstance(error, Unprepared):
                raise  # the other processes of torchrun may be elsewhere
            end()
            if not outside and len(part.specs) > 1:
                alone = (part._replace(rows={spec: spec}) for spec in part.specs)
                return next((code for code in map(self.train_part, alone) if code), 0)
            command = shlex.join(["python", "-m", "fastmerge", *self.words(part)])
            place = part.column.folder, part.column.flags, "" if outside else part.specs[0]
            self.why[place] = self.failed(error, "run", command, self.config(part))
            if isinstance(error, Busy):
                self.busy.add(place)
            return 0

    def reason(self, part: Part, spec: str) -> str:
        """Why a method of a part is not trained; "" if nothing is known."""
        place = part.column.folder, part.column.flags
        return self.why.get((*place, ""), self.why.get((*place, spec), ""))

    def failed(self, error: Exception, what: str, command: str, config: Any = None) -> str:
        """Say that a column was not run or drawn; returns why, in words. Missing data and a busy folder are no failures."""
        from fastmerge.__main__ import unexpected

        if not isinstance(error, UserError):
            self.code = self.code or unexpected(error, config)
            why = f"{type(error).__name__}: {first_line(error)}"
        else:
            self.code = self.code or (0 if isinstance(error, Unprepared | Busy) else 2)
            why = str(error)
        by_itself = "with the data" if isinstance(error, Unprepared) else "by itself"
        print(f"not {what}: {why}\n{by_itself}: {command}", file=sys.stderr)
        return why

    def labels(self, part: Part) -> dict[str, str]:
        """spec -> label in the run folder."""
        from fastmerge.methods import METHODS
        from fastmerge.plan import label_of, read_method

        config, found = self.config(part), dict[str, str]()
        for spec in part.specs:
            name, its = read_method(spec, config)
            found[spec] = label_of(spec, METHODS[name].protocols(its)[0])
        return found

    def results(self, part: Part) -> dict[str, dict[str, dict[str, Any]]]:
        """row -> seed -> result; the untrained model has seed 0."""
        from fastmerge.results import read_run

        folder = self.folder(part.column)
        if not any(folder.glob("*-seed*/result.json")):
            return {}
        methods, zero_shot = read_run(folder)
        labels, found = self.labels(part), dict[str, dict[str, dict[str, Any]]]()
        for row, spec in part.rows.items():
            if spec == UNTRAINED:
                found[row] = {"0": zero_shot} if zero_shot else {}
                continue
            seeds = methods.get(labels[spec], {})
            found[row] = {str(seed): seeds[str(seed)] for seed in self.seeds(part.target) if str(seed) in seeds}
        return found

    def command(self, target: Target) -> str:
        """What repeats this target, on any machine."""
        data = ["--data-root", "DIR"] if any(map(self.data_flags, self.columns(target))) else []
        small = ["--small"] if self.own.small else []
        seeds = ["--seeds", *map(str, self.own.seeds)] if self.own.seeds else []
        only = ["--only", *self.own.only] if self.own.only else []
        return shlex.join(["fastmerge", "reproduce", target.name, *small, *data, *seeds, *only, *self.rest])

    def write(self, target: Target) -> list[Path]:
        """Write the table or figure; returns its files."""
        from fastmerge.reproduce.compare import cells, save

        found, stand_in = [], {}
        for column in self.columns(target):
            why, results = self.missing(target), dict[str, dict[str, dict[str, Any]]]()
            for part in self.parts(target, column):
                results |= self.results(part)
                for row, spec in part.rows.items():
                    wanted = 1 if spec == UNTRAINED else len(self.seeds(target))
                    said = self.reason(part, part.specs[0] if spec == UNTRAINED else spec)
                    if said and len(results.get(row, ())) < wanted:
                        why[row] = said
                    elif spec == UNTRAINED and not results.get(row) and any(results.values()):
                        why[row] = "an untrained model has an accuracy with a text head alone"
            found += cells(target, column, results, why, list(self.rows(target)))
            if self.own.small and not target.ours:
                stand_in[column.name] = f"`{column.dataset}`, {EMBEDDED[column.dataset]}"
        self.own.out.mkdir(parents=True, exist_ok=True)
        paths = save(target, found, stand_in, self.command(target), self.own.out) if target.rows else []
        return paths + (self.draw(target) if target.draw else [])

    def draw_share(self) -> None:
        """Of the figures that train models of their own, draw those of this process of several."""
        if self.own.processes > 1 and os.environ.get("RANK", "0") == "0":
            figures = [target for target in self.targets if "{flags}" in target.draw]
            for target in figures[self.worker or 0 :: self.own.processes]:
                self.draw(target)

    def draw(self, target: Target) -> list[Path]:
        """Draw the figure of every column; returns the folders. One that this command has drawn before is kept."""
        from fastmerge.analysis.__main__ import analyse

        paths, columns = [], self.columns(target)
        for column in columns:
            place = column.folder, column.flags, ""
            if place in self.why or (target.name, column.folder) in self.not_drawn:
                continue
            out = self.own.out / target.file / (column.folder if len(columns) > 1 else "")
            rest = [word for word in self.rest if word != "--quiet"]  # the other processes have it
            flags = [*column.words, "--seeds", *map(str, self.seeds(target)), *rest, *self.data_flags(column)]
            labels = [
                self.labels(part)[part.rows[row]]
                for part in self.parts(target, column)
                for row, seeds in self.results(part).items()
                if seeds and part.rows[row] != UNTRAINED
            ]
            if "{labels}" in target.draw and not labels:
                print(f"{target.name} · {column.name}: not drawn, no row of it is finished", file=sys.stderr)
                continue
            words = []
            for word in shlex.split(self.own.small and target.draw_small or target.draw):
                if word == "{results}":
                    words.append(str(self.save_results(target, column, out)))
                else:
                    words += {"{runs}": [str(self.folder(column))], "{flags}": flags, "{labels}": labels}.get(
                        word, [word]
                    )
            words += ["--out", str(out)]
            if "{flags}" in target.draw and drawn(out, words):
                paths.append(out)
                continue
            try:
                for path in analyse(words):
                    print(path)
                paths.append(out)
            except Exception as error:
                self.not_drawn.add((target.name, column.folder))
                print(f"{target.name} · {column.name}", file=sys.stderr)
                self.failed(error, "drawn", shlex.join(["python", "-m", "fastmerge", "analyse", *words]))
        return paths

    def save_results(self, target: Target, column: Column, out: Path) -> Path:
        """Write the results of the target's rows to `out`, without the other runs of their folder."""
        from fastmerge.checkpoint import save_json

        out.mkdir(parents=True, exist_ok=True)
        rows = {row: its for part in self.parts(target, column) for row, its in self.results(part).items() if its}
        save_json(out / "results.json", {"methods": rows})
        return out / "results.json"

    def plan(self) -> str:
        """What would run, for --dry-run."""
        from fastmerge.reproduce.cost import costs

        found = costs((part.target, part.column, self.config(part)) for part in self.trainings())
        lines = [cost.line() for cost in found]
        lines += [
            f"{t.name}: trains the models of its figure, not counted" for t in self.targets if "{flags}" in t.draw
        ]
        runs, hours, size = sum(c.runs for c in found), sum(c.hours for c in found), sum(c.bytes for c in found)
        lines.append(
            f"in all {counted(runs, 'run')}, about {hours:.1f} hours of training and merging on this machine in fp32, "
            f"without evaluation; models of {size / 1e9:.1f} GB in {self.own.runs}"
        )
        return "\n".join(lines)


def drawn(out: Path, words: Sequence[str]) -> bool:
    """Whether `out` has a picture by these words of `fastmerge analyse`; every picture names its command."""
    from PIL import Image

    command = shlex.join(words)
    return any(str(Image.open(path).info.get("Description", "")).endswith(command) for path in out.glob("*.png"))
