"""Files of a run: where they are, when they are written, and whether a run may continue.

runs/<name>/config.json  environment.json  manifest.json  results.json  results.md  report.html  plots/
runs/<name>/trajectory-seed<seed>/   un-merged models that methods share; deleted at the end without --keep-trajectory
runs/<name>/<method>-seed<seed>/metrics.jsonl      one line per step and per task
                                accuracy.csv       the accuracy matrix
                                model.safetensors  the final model; its recipe is in the metadata
                                state.safetensors  what the method keeps besides, for --continue-from; not if nothing
                                models/            with --keep-models: task-<t>.safetensors, the model after task t
                                result.json        this run's part of results.json
                                checkpoint.safetensors   during the run, and checkpoint-before.safetensors, the one
                                                         before it; the same command continues from them
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastmerge.checkpoint import (
    json_text,
    load_tensors,
    replace,
    save_csv,
    save_json,
    save_tensors,
    text_writer,
)
from fastmerge.config import Config, to_dict
from fastmerge.errors import UserError
from fastmerge.identity import differences, fingerprint
from fastmerge.ranks import ranks
from fastmerge.results import expect, read_json, read_result
from fastmerge.training import PHASES

STATE = "state.safetensors"
LOCK = ".lock"  # of the folder: while its files change; of a method and seed: while a command works on it
try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None  # type: ignore[assignment]

FLUSH_STEPS = 20  # steps between host reads of the losses: reading every step would stall a GPU


class Interrupted(Exception):
    """A signal stopped the run; the last checkpoint continues it."""


class StopRequest:
    """Set by a signal handler and checked between steps."""

    signal: int | None = None


class RunFolder:
    """The folder of one command. Opening it compares what determines the numbers with the files there, and writes the new
    files. A refused command changes nothing. Several commands may share a folder: each claims its runs.

    determined: see `identity.determinants`. warn(text): called for everything that the user should know.
    """

    def __init__(
        self,
        config: Config,
        environment: dict[str, Any],
        manifest: dict[str, Any],
        determined: dict[str, dict[str, Any]],
        warn: Callable[[str], None],
    ):
        self.path, self.determined, self.warn = Path(config.run.run_dir), determined, warn
        self._claims: dict[str, TextIO] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.changing():
                pass
        except OSError as error:
            raise UserError(
                f"--run-dir {self.path}: cannot write there ({error}); choose another folder with --run-dir"
            ) from None
        for name in ("config.json", "environment.json", "manifest.json", "results.json", "results.md"):
            expect(self.path / name)
        expect(self.path / "plots", folder=True)
        with self.changing():
            runs = known_runs(self.path, determined)
            starts = self._starts(environment)
            save_json(self.path / "manifest.json", manifest | {"determines": determined | {"runs": runs}})
            save_json(self.path / "config.json", to_dict(config))
            save_json(self.path / "environment.json", starts)

    def _starts(self, environment: dict[str, Any]) -> list[Any]:
        """The environments of all starts, this one last."""
        path = self.path / "environment.json"
        old = read_json(path, "a list with an entry per start; move it away") if path.exists() else []
        old = old if isinstance(old, list) else [old]
        if old and isinstance(old[-1], dict):
            versions = {name: (old[-1].get(name), environment[name]) for name in ("fastmerge", "gpu", "cuda")}
            if isinstance(before := old[-1].get("versions"), dict):
                versions |= {name: (before.get(name), new) for name, new in environment["versions"].items()}
            if moved := [f"{name} {a} -> {b}" for name, (a, b) in versions.items() if a != b]:
                self.warn(f"since the last start here: {', '.join(moved)}; numbers may differ in their last bits")
        return [*old, {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | environment]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Wait until no other command changes the files of this folder, and keep it so."""
        if ranks().rank:  # rank 0 holds the lock for all
            yield
            return
        with open(self.path / LOCK, "w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def claim(self, name: str) -> str:
        """Claim the run `name` for this command until `release` or its end: 'claimed', 'finished' if it has results now, or
        'busy' if another command works on it. All processes of this command get the same answer.

        Raises:
            UserError: since this command opened the folder, another one began there with other settings.
        """
        answers = ("claimed", "finished", "busy")
        answer = 0
        if not ranks().rank:
            with self.changing():
                answer = self._claim(name)
        return answers[ranks().agree(answer)]

    def _claim(self, name: str) -> int:
        folder, path = self.path / name, self.path / "manifest.json"
        manifest, own = read_json(path, "the manifest.json of this run"), self.determined["runs"][name]
        if changed := differences(manifest["determines"], self.determined | {"runs": {name: own}}):
            raise UserError(
                f"--run-dir {self.path}: since this command started, another one began there with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse another --run-dir for one of them"
            )
        if (folder / "result.json").exists():
            return 1
        folder.mkdir(exist_ok=True)
        file = open(folder / LOCK, "w")
        if not lock(file):
            file.close()
            return 2
        self._claims[name] = file
        if name not in manifest["determines"]["runs"]:  # another command started since, and knew no file of this run
            manifest["determines"]["runs"][name] = own
            replace(path, text_writer(json_text(manifest)))
        return 0

    def release(self, name: str) -> None:
        """End the claim of a finished run."""
        if name in self._claims:
            with self.changing():
                (self.path / name / LOCK).unlink(missing_ok=True)
                self._claims.pop(name).close()

    def leave(self) -> None:
        """End the claims of runs that are not finished, as the end of this process would."""
        while self._claims:
            self._claims.popitem()[1].close()

    def alone(self) -> bool:
        """Whether no other command works here."""
        return not any(held(path) for path in self.path.glob(f"*-seed*/{LOCK}") if path.parent.name not in self._claims)

    def record(self, name: str, save_every: float) -> Record:
        return Record(self.path / name, save_every, fingerprint(self.determined, name), self.warn)


def lock(file: TextIO) -> bool:
    """Lock an open file until it is closed or this process ends; False if another process has locked it. True where the
    system has no file locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def held(path: Path) -> bool:
    """Whether a process has locked the file. Only rank 0 looks, under `RunFolder.changing`: a look locks the file for a
    moment, and the file may go. The others say False."""
    if ranks().rank:
        return False
    with open(path, "r+") as file:
        return not lock(file)


def _learned(folder: Path, pattern: str = "*-seed*") -> bool:
    """Whether the folders in `folder` that match `pattern` contain a checkpoint, a model or a result, or another command
    works on one of them."""
    return any(
        path.suffix == ".safetensors" or path.name == "result.json" or (path.name == LOCK and held(path))
        for path in folder.glob(f"{pattern}/*")
    )


def known_runs(folder: Path, determined: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What determines each run of a folder, including runs of earlier commands. It changes nothing.

    Raises:
        UserError: a run here had other settings or contents; the message lists them.
    """
    if not _learned(folder):
        return determined["runs"]
    path = folder / "manifest.json"
    old = read_json(path, "the manifest.json of this run; restore it, or choose another --run-dir")
    old = old.get("determines") if isinstance(old, dict) else None
    if not isinstance(old, dict) or not all(
        isinstance(old.get(part), dict) for part in ("settings", "contents", "runs")
    ):
        raise UserError(
            f"{path} does not say what determines the numbers of the runs there (an older fastmerge made it, or it "
            "was changed); choose another --run-dir"
        )
    old["runs"] = {name: values for name, values in old["runs"].items() if _learned(folder, glob.escape(name))}
    if changed := differences(old, determined):
        raise UserError(
            f"--run-dir {folder} holds runs that were made from something else:\n  "
            + "\n  ".join(changed)
            + "\nGo back to what it was to continue them, or use another --run-dir"
        )
    return old["runs"] | determined["runs"]


@dataclass
class State:
    """The position in a run and its results so far. phase: index into PHASES; len(PHASES) means evaluation."""

    task: int = 0
    phase: int = 0
    step: int = 0
    matrix: list[list[float | None]] = field(default_factory=list)
    kept_bytes: list[int] = field(default_factory=list)  # after every task
    peak_memory_bytes: list[int] = field(default_factory=list)  # of every task
    test_counts: list[int] = field(default_factory=list)  # test images of every task evaluated
    also: dict[str, list[list[float | None]]] = field(default_factory=dict)  # matrices of `also_evaluated`, by name
    before: list[float | None] = field(default_factory=list)  # accuracy on every task before it was trained on
    retained: list[float | None] = field(default_factory=list)  # accuracy on the data of --retain after every task
    bad_images: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, "evaluate"), 0.0))
    bytes_written: int = 0  # to the disk, without metrics.jsonl and what is written at the end
    parts: dict[str, int] = field(default_factory=dict)  # images at once, by kind of step (`Parts.sizes`)
    log_bytes: int = 0  # length of metrics.jsonl at this state; later lines are cut off when the run continues


class Record:
    """Checkpoints and metrics of one method with one seed.

    fingerprint: hash of what determines this run; a checkpoint of another run is refused. Two generations of the
    checkpoint are kept, so that a damaged one costs the steps since the one before it.

    Raises:
        UserError: a folder is where a file should be, or the reverse.
    """

    def __init__(self, folder: Path, save_every: float, fingerprint: str, warn: Callable[[str], None]):
        self.folder, self.save_every, self.fingerprint, self.warn = folder, save_every, fingerprint, warn
        self.checkpoint = folder / "checkpoint.safetensors"
        self.before = folder / "checkpoint-before.safetensors"
        expect(folder, folder=True)
        for name in ("metrics.jsonl", "accuracy.csv", "model.safetensors", STATE, "result.json"):
            expect(folder / name)
        expect(self.checkpoint)
        expect(self.before)
        self.waiting: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.listen: Callable[[int, dict[str, Any]], None] | None = None  # gets every row and its number
        self._saved_at = time.monotonic()

    def finished(self) -> dict[str, Any] | None:
        """The result of this run if it is already complete."""
        path = self.folder / "result.json"
        return read_result(path) if path.exists() else None

    def open(self) -> tuple[State, dict[str, Tensor]]:
        """The state to continue from and the tensors saved with it (none for a new run).

        Raises:
            UserError: there are checkpoints, and none of them is good.
        """
        self.folder.mkdir(exist_ok=True)
        self.rows = 0
        state, tensors = self._newest()
        ranks().wait()  # nobody writes before all have read
        path = self.folder / "metrics.jsonl"
        try:
            if ranks().rank:  # rank 0 writes the log
                self._log = open(os.devnull, "r+b")
                return state, tensors
            self._log = open(path, "r+b" if path.exists() else "w+b")
            content = self._log.read(state.log_bytes)
            kept = _whole_lines(content, state.log_bytes)
            self.rows = content.count(b"\n", 0, kept)
            self._log.truncate(kept)
            self._log.seek(kept)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}; fix it, then run the same command again") from None
        if kept < state.log_bytes:
            self.warn(
                f"{path} was cut since this run was stopped: {kept} of {state.log_bytes} bytes are left, and the steps in "
                "the others are missing from it. The run continues; its results do not depend on that file"
            )
        return state, tensors

    def _newest(self) -> tuple[State, dict[str, Tensor]]:
        """The newest checkpoint that can be read. A damaged newer one is renamed, with a warning."""
        bad: list[tuple[Path, UserError]] = []
        for path in filter(Path.exists, (self.checkpoint, self.before)):
            try:
                tensors, about = load_tensors(path)
                state = self._state(path, about)
            except UserError as error:
                bad.append((path, error))
                continue
            for damaged, why in bad:
                aside = damaged.with_name(damaged.name + ".damaged")
                if not ranks().rank:
                    os.replace(damaged, aside)
                self.warn(f"{why}. It is now {aside.name}; this run continues from the checkpoint before it")
            state.bytes_written += path.stat().st_size
            return state, tensors
        if bad:
            raise UserError(f"{bad[0][1]}. Delete {' and '.join(str(path) for path, _ in bad)} to restart this run")
        return State(), {}

    def _state(self, path: Path, about: dict[str, Any]) -> State:
        if about.get("run") != self.fingerprint:
            raise UserError(f"{path}: not a checkpoint of this run, but of one with another seed, settings or contents")
        try:
            return State(**about["state"])
        except (KeyError, TypeError):
            raise UserError(f"{path}: its state has another form; another version of fastmerge wrote it") from None

    def log(self, about: dict[str, Any], terms: dict[str, Tensor]) -> None:
        """Log the terms (0-d tensors) of a step; they are read from the device every FLUSH_STEPS steps."""
        self.waiting.append((about, terms))
        if len(self.waiting) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> dict[str, float]:
        """Write the waiting terms; return the newest.

        Raises:
            UserError: a loss is not finite. The checkpoint on disk is older, so it is valid.
        """
        values: dict[str, float] = {}
        for about, terms in self.waiting:
            values = (
                dict(zip(terms, torch.stack([t.double() for t in terms.values()]).tolist(), strict=True))
                if terms
                else {}
            )
            if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                where = ", ".join(f"{k} {v}" for k, v in about.items())
                self.waiting.clear()
                raise UserError(
                    f"{bad[0]} became {values[bad[0]]} at {where} in {self.folder}. Any checkpoint there is valid; "
                    "try a smaller --lr (for the merging phase, --trm.lr or --trm.lambda2) with another --run-dir"
                )
            self._line(about | values)
        self.waiting.clear()
        return values

    def _line(self, values: dict[str, Any]) -> None:
        try:
            self._log.write((json.dumps(values, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"cannot write {self._log.name}: {error}; free space, then run the same command again"
            ) from None
        if self.listen is not None:
            self.listen(self.rows, values)
        self.rows += 1

    def task(self, values: dict[str, Any]) -> None:
        """Log the results of a task."""
        self.flush()
        self._line(values)

    def save(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Flush the metrics to disk, then replace the checkpoint."""
        self.flush()
        try:
            self._log.flush()
            if not ranks().rank:
                os.fsync(self._log.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self._log.name}: {error}; free space, then run the same command again"
            ) from None
        state.log_bytes = self._log.tell()
        about = {"run": self.fingerprint, "state": vars(state)}
        state.bytes_written += save_tensors(self.checkpoint, tensors, about, older=self.before)
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether to save now: `save_every` seconds have passed or a signal arrived, in any process of the command."""
        stop = ranks().any(StopRequest.signal is not None)
        if stop and StopRequest.signal is None:
            StopRequest.signal = signal.SIGTERM  # another process got it
        return stop or ranks().any(time.monotonic() - self._saved_at >= self.save_every)

    def keep(self, task: int, model: dict[str, Tensor], recipe: dict[str, Any]) -> int:
        """Write the model after a task to `models/`; returns the bytes written."""
        folder = self.folder / "models"
        folder.mkdir(exist_ok=True)
        return save_tensors(folder / f"task-{task + 1}.safetensors", model, recipe)

    def finish(
        self,
        result: dict[str, Any],
        names: list[str],
        model: dict[str, Tensor],
        recipe: dict[str, Any],
        kept: dict[str, Tensor],
    ) -> None:
        """Write the model, what the method keeps, and the results, then delete the checkpoints, so an interrupted call is
        repeated.

        Adds to `bytes_written` of the result what is written at the end, and the metrics.
        """
        self._log.close()
        result["bytes_written"] += (self.folder / "metrics.jsonl").stat().st_size
        result["bytes_written"] += save_tensors(self.folder / "model.safetensors", model, recipe)
        if kept:
            result["bytes_written"] += save_tensors(self.folder / STATE, kept, {"run": self.fingerprint})
        rows = zip(names, result["accuracy_matrix"], strict=True)
        cells = [[name, *("" if r is None else f"{r:.4f}" for r in row)] for name, row in rows]
        save_csv(self.folder / "accuracy.csv", ["after task", *names], cells)
        save_json(self.folder / "result.json", result)
        for path in (self.checkpoint, self.before):
            path.unlink(missing_ok=True)


def _whole_lines(read: bytes, expected: int) -> int:
    """How many of the bytes `read` to keep: all that are expected, or those up to the last end of a line."""
    return expected if len(read) == expected and read[-1:] in (b"", b"\n") else read.rfind(b"\n") + 1
