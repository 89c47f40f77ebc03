"""Progress output: one live line with the time left for the whole command, or plain lines without a terminal."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from fastmerge.data.scenario import Task
from fastmerge.output import plain
from fastmerge.plan import Run, images_per_task
from fastmerge.report import clock, results_table
from fastmerge.report import number as percent
from fastmerge.runfolder import State
from fastmerge.training import Phase

PLAIN_SECONDS = 15.0  # between progress lines without a terminal
# Cost of an image relative to training, until it is measured. Evaluation is a forward pass, training costs three, the search
# of TRM nine; other methods merge at less.
GUESS = {"train": 1.0, "merge": 3.0, "evaluate": 0.3}
ENOUGH_STEPS, ENOUGH_SECONDS = 5, 5.0  # of one kind of work, before the time left is shown


@dataclass
class Measured:
    """Measured steps of one kind of work of one method. The first step is left out: it also decodes images and compiles."""

    begun: bool = False
    steps: int = 0
    images: int = 0
    seconds: float = 0.0

    @property
    def known(self) -> bool:
        return self.images > 0 and (self.steps >= ENOUGH_STEPS or self.seconds >= ENOUGH_SECONDS)


class Work:
    """Estimate the time left for the whole command from the images left, by kind of work, and the time per image."""

    def __init__(self, runs: Sequence[Run]):
        self.methods = [run.label for run in runs]
        self.per_task = [images_per_task(run) for run in runs]
        self.remaining = [self.of(number, 0) for number in range(len(runs))]
        self.measured: dict[tuple[str, str], Measured] = {}
        # of the last task: images processed, and their share of the planned ones (less for a Fisher of a few images)
        self.went: dict[str, int] = {}
        self.share: dict[tuple[str, str], float] = {}
        self.whole = True
        self.total = sum(self._units(r) for r in self.remaining)

    def of(self, run: int, task: int, phase: int = 0) -> dict[str, int]:
        """Images left in one run, from phase `phase` of task `task` on."""
        left = dict.fromkeys(GUESS, 0)
        for index, images in enumerate(self.per_task[run][task:], start=task):
            for number, (kind, n) in enumerate(images.items()):
                if index > task or number >= phase:
                    left[kind] += n
        return left

    @staticmethod
    def _units(images: dict[str, int]) -> float:
        return sum(GUESS[kind] * n for kind, n in images.items())

    def done(self, run: int, kind: str, images: int, seconds: float) -> None:
        """One step of work."""
        measured = self.measured.setdefault((self.methods[run], kind), Measured())
        if measured.begun:
            measured.steps, measured.images = measured.steps + 1, measured.images + images
            measured.seconds += seconds
        measured.begun = True
        self.went[kind] = self.went.get(kind, 0) + images
        self.remaining[run][kind] = max(0, self.remaining[run][kind] - images)

    def at(self, run: int, task: int, phase: int = 0, step: int = 0) -> None:
        """The run is at this phase: skipped work (such as the merge of the first task) no longer counts as left."""
        if task and self.whole:
            for kind, images in self.went.items():
                if planned := self.per_task[run][task - 1][kind]:
                    self.share[self.methods[run], kind] = images / planned
        self.went, self.whole = {}, not phase and not step
        self.remaining[run] = self.of(run, task, phase)

    def fraction(self) -> float:
        return 1 - sum(self._units(r) for r in self.remaining) / self.total if self.total else 1.0

    def cost(self, method: str, kind: str, guess: bool = False) -> float | None:
        """Seconds per image; None until it is known. Training may be measured with another method, and a merge that was not
        measured is only guessed on demand."""
        own = self.measured.get((method, kind))
        if own and own.known:
            return own.seconds / own.images
        train = [m for (_, k), m in self.measured.items() if k == "train" and m.known] if kind != "merge" else []
        others = [m for (_, k), m in self.measured.items() if k == kind and m.known] if kind != "merge" else []
        if kind == "merge" and guess:
            train = [m for (_, k), m in self.measured.items() if k == "train" and m.known]
        found = others or train
        if not found:
            return None
        return sum(m.seconds for m in found) / sum(m.images for m in found) * (1 if others else GUESS[kind])

    def seconds_left(self, run: int | None = None, guess: bool = False) -> float | None:
        """Seconds left for one run or for all; None until the cost of all remaining work is known, or can be guessed."""
        runs, total = range(len(self.remaining)) if run is None else [run], 0.0
        for number in runs:
            for kind, n in self.remaining[number].items():
                cost = self.cost(self.methods[number], kind, guess) if n else 0.0
                if cost is None:
                    return None
                total += n * cost * self.share.get((self.methods[number], kind), 1.0)
        return total

    def left(self, run: int) -> str:
        """The time left in words, for the command if it is known, else for this run; empty if neither is known."""
        if (seconds := self.seconds_left()) is not None:
            return f"{clock(seconds)} left"
        if len(self.remaining) > 1 and (seconds := self.seconds_left(run)) is not None:
            return f"{clock(seconds)} left in run {run + 1} of {len(self.remaining)}"
        return ""


class Console:
    """All output of a command. `quiet` prints only the final table and errors."""

    def __init__(self, quiet: bool = False, file: Any = None):
        # the stream is named because rich assumes utf-8 otherwise
        self.rich = RichConsole(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.live: Progress | None = None
        self._parts: Sequence[str] = [""]
        self._printed = time.monotonic()

    def line(self, text: str, style: str | None = None) -> None:
        if not self.quiet:
            self.rich.print(text, style=style, markup=False)

    def table(self, rows: list[list[str]]) -> None:
        """Print the result table, even with `quiet`. A terminal limits its width; a file does not."""
        rows = [[plain(cell, self.rich.encoding) for cell in row] for row in rows]
        limit = self.rich.width if self.rich.is_terminal or "COLUMNS" in os.environ else None
        table, left_out = results_table(rows, limit)
        self.rich.print(table, width=table.width, no_wrap=True, overflow="ignore", crop=False)
        if left_out:
            self.line(f"not shown at this width, but in results.md: {', '.join(left_out)}")

    def encoding(self, done: int, prompts: int) -> None:
        """Report that the text head is being computed; it is cached, so this wait comes once."""
        if time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.line(f"text head: {done} of {prompts} prompts encoded")

    def start(self, runs: Sequence[Run], finished: Sequence[int] = ()) -> None:
        """Start the progress display for these runs; finished: indices of runs that are already complete."""
        self.work, self.runs, self.run = Work(runs), runs, -1
        for number in finished:
            self.work.remaining[number] = dict.fromkeys(GUESS, 0)
        self._printed = time.monotonic()
        if not self.quiet and self.rich.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[left]}"))
            self.live = Progress(*columns, console=self.rich, transient=True, refresh_per_second=4)
            self.live.start()
            self.bar = self.live.add_task("", total=1.0, left="")

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def next_run(self, run: int) -> None:
        self.run = run

    def skip(self, run: int) -> None:
        """A run that this command does not make."""
        self.work.remaining[run] = dict.fromkeys(GUESS, 0)

    def begin(self, state: State) -> None:
        """Start the current run at `state`."""
        self._clock = time.perf_counter()
        run = self.runs[self.run]
        self.work.at(self.run, state.task, state.phase, state.step)
        if state.task or state.phase or state.step:
            self.line(f"{run.label} seed {run.seed}: continues at task {state.task + 1}, step {state.step}")

    def _advance(self, kind: str, images: int, parts: Sequence[str]) -> None:
        """Show a finished step. parts: what to show, the most important part first."""
        now = time.perf_counter()
        self.work.done(self.run, kind, images, now - self._clock)
        self._clock = now
        left = self.work.left(self.run)
        if self.live:
            text, room = parts[0], self.rich.width - 16 - len(left) - 4  # the bar and spaces
            for part in parts[1:]:
                if len(text) + len(part) + 3 > room:
                    break  # a number is never cut
                text += f" · {part}"
            self.live.update(self.bar, completed=self.work.fraction(), description=text, left=left)
        elif not self.quiet and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.line(" · ".join(filter(None, (*parts, left))))

    def _where(self, task: Task) -> str:
        run = self.runs[self.run]
        return f"{run.label} seed {run.seed} · task {task.index + 1}/{len(run.scenario.tasks)}"

    def step(self, task: Task, name: str, i: int, phase: Phase, terms: dict[str, Any]) -> None:
        batches = phase.batches
        assert batches is not None  # a phase with steps has batches
        epochs = math.ceil(min(phase.steps, batches.steps) / batches.per_epoch)
        inside = i < batches.steps  # a phase may end with a step that takes no images
        images = len(batches.rows(i)) if inside else 0
        show = self.live is not None or time.monotonic() - self._printed >= PLAIN_SECONDS
        if show and (i % 10 == 0 or self.live is None):  # reading the loss waits for the device
            measured = self.work.measured.get((self.runs[self.run].label, name), Measured())
            self._parts = [
                self._where(task),
                f"{name} epoch {min(i // batches.per_epoch + 1, epochs)}/{epochs}",
                *(f"loss {float(v):.3f}" for k, v in terms.items() if k == "loss"),
                *([f"{measured.images / measured.seconds:.0f} images/s"] if measured.images else []),
            ]
        self._advance(name, images, self._parts)

    def evaluated(self, task: Task, images: int) -> None:
        self._advance("evaluate", images, [self._where(task), "evaluate"])

    def task_done(self, task: Task, summary: dict[str, Any], state: State) -> None:
        self._clock = time.perf_counter()
        self.work.at(self.run, task.index + 1)
        row = summary["accuracy"]
        own = row[task.index] if task.index < len(row) else None
        seen = summary["seen_accuracy"]
        left = self.work.left(self.run)
        if not left and (seconds := self.work.seconds_left(guess=True)):
            left = f"about {clock(seconds)} left (merging is not measured yet)"
        self.line(
            f"{self._where(task)} · {task.name}: accuracy on seen {percent([seen])}, on this task {percent([own])} · "
            f"so far {clock(sum(state.seconds.values()))}{left and f', {left}'}"
        )
