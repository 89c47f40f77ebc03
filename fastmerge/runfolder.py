"""A run on the disk: what lies where, what may continue, and what is written when.

runs/<name>/config.json  environment.json  manifest.json  results.json  results.md  report.html  plots/
runs/<name>/trajectory-seed<seed>/   un-merged models that several methods share; deleted at the end (but --keep-trajectory)
runs/<name>/<method>-seed<seed>/metrics.jsonl      every step and every task
                                accuracy.csv       the accuracy matrix
                                model.safetensors  the one model at the end; its recipe is in the metadata
                                result.json        this run's part of results.json
                                checkpoint.safetensors   while it runs; the same command goes on from it
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastmerge.checkpoint import load_tensors, save_json, save_tensors, write_atomically
from fastmerge.config import Config, differences, to_dict
from fastmerge.errors import UserError
from fastmerge.training import PHASES

FLUSH_STEPS = 20  # steps between host reads of the losses: a read per step would stall a GPU


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to the last step is saved."""


class StopRequest:
    """Set by a signal handler, looked at between steps."""

    signal: int | None = None


class RunFolder:
    """The folder of one command. Opening it locks it, checks that its settings agree, and writes the three descriptions."""

    def __init__(self, config: Config, environment: dict[str, Any], manifest: dict[str, Any]):
        self.path = Path(config.run.run_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise UserError(
                f"--run-dir {self.path}: cannot write there ({error}); choose another with --run-dir"
            ) from None
        old = self.path / "config.json"
        if old.exists():
            changed = differences(self._read(old), to_dict(config))
            if changed:
                raise UserError(
                    f"--run-dir {self.path} holds a run with other settings:\n  "
                    + "\n  ".join(changed)
                    + "\nUse the same settings to continue it, or another --run-dir"
                )
            known = (
                self._read(self.path / "manifest.json").get("sha256")
                if (self.path / "manifest.json").exists()
                else None
            )
            if known is not None and known != manifest["sha256"]:
                raise UserError(
                    f"--run-dir {self.path} was made with other images (split hash {known}, now {manifest['sha256']}): "
                    "the dataset changed on the disk. Restore it, or use another --run-dir"
                )
        save_json(old, to_dict(config))
        save_json(self.path / "environment.json", environment)
        save_json(self.path / "manifest.json", manifest)

    def _locked(self) -> TextIO:
        """Hold a lock on the folder for as long as this process lives (where the system has file locks)."""
        file = open(self.path / ".lock", "w")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise UserError(
                f"--run-dir {self.path}: another fastmerge process is at work there; wait, or choose another"
            ) from None
        return file

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); delete the folder or choose another --run-dir"
            ) from None

    def record(self, method: str, seed: int, save_every: float) -> Record:
        return Record(self.path / f"{method}-seed{seed}", save_every)


@dataclass
class State:
    """The position in a run, besides its tensors. phase: index into PHASES, len(PHASES) is evaluation."""

    task: int = 0
    phase: int = 0
    step: int = 0
    matrix: list[list[float | None]] = field(default_factory=list)
    kept_bytes: list[int] = field(default_factory=list)  # after every task
    peak_memory_bytes: list[int] = field(default_factory=list)  # of every task
    test_counts: list[int] = field(default_factory=list)  # test images of every task evaluated
    also: dict[str, list[list[float | None]]] = field(default_factory=dict)  # matrices of other ways to use the weights
    bad_images: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, "evaluate"), 0.0))
    log_bytes: int = 0  # length of metrics.jsonl at this state: what a stopped process wrote beyond it is cut off


class Record:
    """Checkpoints and metrics of one method with one seed."""

    def __init__(self, folder: Path, save_every: float):
        self.folder, self.save_every = folder, save_every
        self.checkpoint = folder / "checkpoint.safetensors"
        self.waiting: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.listen: Callable[[int, dict[str, Any]], None] | None = None  # gets every row and its number
        self._saved_at = time.monotonic()

    def finished(self) -> dict[str, Any] | None:
        """The result of this run if it ended before."""
        path = self.folder / "result.json"
        return RunFolder._read(path) if path.exists() else None

    def open(self) -> tuple[State, dict[str, Tensor]]:
        """The state to go on from, and the tensors saved with it (none for a fresh start)."""
        self.folder.mkdir(exist_ok=True)
        state = State()
        tensors: dict[str, Tensor] = {}
        if self.checkpoint.exists():
            tensors, about = load_tensors(self.checkpoint)
            state = State(**about["state"])
        path = self.folder / "metrics.jsonl"
        self._log = open(path, "r+b" if path.exists() else "w+b")
        self._log.truncate(state.log_bytes)
        self._log.seek(0)
        self.rows = sum(1 for _ in self._log)  # and is at the end then
        return state, tensors

    def log(self, about: dict[str, Any], terms: dict[str, Tensor]) -> None:
        """Note the terms (0-d tensors) of a step; they are read from the device every few steps."""
        self.waiting.append((about, terms))
        if len(self.waiting) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> dict[str, float]:
        """Write what waits; returns the newest terms.

        Raises:
            UserError: a loss is not finite. The checkpoint on the disk is older than that, so it is a good one.
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
                    f"{bad[0]} became {values[bad[0]]} at {where} in {self.folder}. The last good state is saved there; "
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
        """Note the end of a task."""
        self.flush()
        self._line(values)

    def save(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint. The metrics are on the disk before it."""
        self.flush()
        try:
            self._log.flush()
            os.fsync(self._log.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self._log.name}: {error}; free space, then run the same command again"
            ) from None
        state.log_bytes = self._log.tell()
        save_tensors(self.checkpoint, tensors, {"state": vars(state)})
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save, by the clock or because a signal came."""
        return StopRequest.signal is not None or time.monotonic() - self._saved_at >= self.save_every

    def finish(
        self, result: dict[str, Any], names: list[str], model: dict[str, Tensor], recipe: dict[str, Any]
    ) -> None:
        """Write the model and the results; the checkpoint goes last, so a stop in between repeats this step."""
        self._log.close()
        save_tensors(self.folder / "model.safetensors", model, recipe)
        write_atomically(self.folder / "accuracy.csv", lambda path: _csv(path, result["accuracy_matrix"], names))
        save_json(self.folder / "result.json", result)
        self.checkpoint.unlink(missing_ok=True)


def _csv(path: Path, matrix: list[list[float | None]], names: list[str]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["after task", *names])
        for name, row in zip(names, matrix, strict=True):
            writer.writerow([name, *("" if r is None else f"{r:.4f}" for r in row)])
