"""Progress output: one live line with the time left for the whole command, or plain lines without a terminal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from fastmerge.data.scenario import Task
from fastmerge.plan import Run
from fastmerge.report import clock
from fastmerge.runfolder import State
from fastmerge.training import PHASES, Phase

PLAIN_SECONDS = 15.0  # between progress lines without a terminal
GUESS = {"train": 1.0, "merge": 4.0, "evaluate": 0.3}  # cost of an image relative to training, used until measured


class Work:
    """Estimate the time left for the whole command from the images left, by kind of work, and the time per image."""

    def __init__(self, runs: Sequence[Run]):
        self.per_task = [self._images(run) for run in runs]
        self.remaining = [self.of(number, 0) for number in range(len(runs))]
        self.seconds: dict[str, tuple[float, int]] = {}
        self.total = sum(self._units(r) for r in self.remaining)

    @staticmethod
    def _images(run: Run) -> list[dict[str, int]]:
        """Number of images to process in each task of a run, by kind of work."""
        tests, rows = [len(task.test) for task in run.scenario.tasks], []
        for task in run.scenario.tasks:
            seen = sum(tests) if run.scenario.kind == "dil" else sum(tests[: task.index + 1])
            rows.append({kind: run.epochs[kind] * len(task.train) for kind in PHASES} | {"evaluate": seen})
        return rows

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
        before, count = self.seconds.get(kind, (0.0, 0))
        self.seconds[kind] = (before + seconds, count + images)
        self.remaining[run][kind] = max(0, self.remaining[run][kind] - images)

    def fraction(self) -> float:
        return 1 - sum(self._units(r) for r in self.remaining) / self.total if self.total else 1.0

    def seconds_left(self) -> float | None:
        """Estimated seconds left; None before the first measurement."""
        cost = {kind: s / n for kind, (s, n) in self.seconds.items() if n}
        if not cost:
            return None
        unit = statistics.median(c / GUESS[kind] for kind, c in cost.items())
        return sum(n * cost.get(kind, GUESS[kind] * unit) for left in self.remaining for kind, n in left.items())


class Console:
    """All output of a command. `quiet` prints only the final table and errors."""

    def __init__(self, quiet: bool = False, file: Any = None):
        self.rich = RichConsole(file=file, highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = 140  # otherwise rich cuts the table to 80 columns in a file
        self.quiet = quiet
        self.live: Progress | None = None
        self._text = ""
        self._printed = time.monotonic()

    def line(self, text: str, style: str | None = None) -> None:
        if not self.quiet:
            self.rich.print(text, style=style, markup=False)

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
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[eta]} left"))
            self.live = Progress(*columns, console=self.rich, transient=True, refresh_per_second=4)
            self.live.start()
            self.bar = self.live.add_task("", total=1.0, eta="--:--")

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def next_run(self, run: int) -> None:
        self.run = run

    def begin(self, state: State) -> None:
        """Start the current run at `state`."""
        self._clock = time.perf_counter()
        run = self.runs[self.run]
        self.work.remaining[self.run] = self.work.of(self.run, state.task, state.phase)
        if state.task or state.phase or state.step:
            self.line(f"{run.label} seed {run.seed}: continues at task {state.task + 1}, step {state.step}")

    def _advance(self, kind: str, images: int, text: str) -> None:
        now = time.perf_counter()
        self.work.done(self.run, kind, images, now - self._clock)
        self._clock = now
        if self.live:
            self.live.update(
                self.bar, completed=self.work.fraction(), description=text, eta=clock(self.work.seconds_left())
            )
        elif not self.quiet and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.line(f"{text} · {clock(self.work.seconds_left())} left")

    def _where(self, task: Task) -> str:
        run = self.runs[self.run]
        return f"{run.label} seed {run.seed} · task {task.index + 1}/{len(run.scenario.tasks)}"

    def step(self, task: Task, name: str, i: int, phase: Phase, terms: dict[str, Any]) -> None:
        batches = phase.batches
        assert batches is not None  # a phase with steps has batches
        images = len(batches.rows(i))
        show = self.live is not None or time.monotonic() - self._printed >= PLAIN_SECONDS
        if show and (i % 10 == 0 or self.live is None):  # reading the loss waits for the device
            seconds, count = self.work.seconds.get(name, (0.0, 0))
            self._text = (
                f"{self._where(task)} · {name} epoch {i // batches.per_epoch + 1}/{max(1, phase.steps // batches.per_epoch)}"
                f"{''.join(f' · loss {float(v):.3f}' for k, v in terms.items() if k == 'loss')}"
                f" · {count / seconds if seconds else 0:.0f} images/s"
            )
        self._advance(name, images, self._text)

    def evaluated(self, task: Task, images: int) -> None:
        self._advance("evaluate", images, f"{self._where(task)} · evaluate")

    def task_done(self, task: Task, summary: dict[str, Any], state: State) -> None:
        self._clock = time.perf_counter()
        row = summary["accuracy"]
        own = row[task.index] if task.index < len(row) else None
        seen = summary["seen_accuracy"]
        self.line(
            f"{self._where(task)} · {task.name}: accuracy on seen {seen:.1f}, on this task {own:.1f} · "
            f"so far {clock(sum(state.seconds.values()))}, {clock(self.work.seconds_left())} left"
        )
