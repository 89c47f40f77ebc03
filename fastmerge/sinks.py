"""Where a run's numbers go besides its folder: Weights & Biases (`--wandb`) and TensorBoard (`--tensorboard`).

Both are optional and imported only with their flag. A sink gets the rows of `metrics.jsonl` with their line numbers, so a run
that was stopped continues the same curves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import uuid
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

from fastmerge.config import Config, to_dict
from fastmerge.errors import UserError, first_line

ABOUT = ("task", "phase", "step")  # where a row belongs; the other entries are its numbers


class Sink(ABC):
    """One run of one method and seed.

    name: `<method>-seed<seed>`. folder: the run's own.
    """

    package: str  # must be installed; the optional extra has the same name

    @abstractmethod
    def __init__(self, name: str, folder: Path, config: Config): ...

    @abstractmethod
    def write(self, number: int, scalars: dict[str, float]) -> None:
        """Take the scalars of row `number`, counted from 0. After a stop the numbers continue from the last checkpoint."""

    @abstractmethod
    def close(self) -> None: ...


class TensorBoard(Sink):
    """Event files in `<run>/tensorboard/<method>-seed<seed>`."""

    package = "tensorboard"

    def __init__(self, name: str, folder: Path, config: Config):
        from torch.utils.tensorboard import SummaryWriter

        self.make = partial(SummaryWriter, str(folder.parent / "tensorboard" / name))
        self.writer: Any = None

    def write(self, number: int, scalars: dict[str, float]) -> None:
        if self.writer is None:  # rows after the last checkpoint are written again
            self.writer = self.make(purge_step=number)
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, number)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB(Sink):
    """A run in the project `fastmerge`, or WANDB_PROJECT, in a group named like the run folder."""

    package = "wandb"

    def __init__(self, name: str, folder: Path, config: Config):
        import wandb

        known = folder / "wandb-id"  # in the folder, so that a new run folder is a new run there too
        if not known.exists():
            folder.mkdir(exist_ok=True)
            known.write_text(uuid.uuid4().hex)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastmerge"),
            group=folder.parent.name,
            name=name,
            id=known.read_text(),
            resume="allow",
            dir=str(folder.parent),
            config=to_dict(config),
        )

    def write(self, number: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=number)

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, type[Sink]] = {"wandb": WandB, "tensorboard": TensorBoard}  # by setting


def wanted(config: Config) -> list[type[Sink]]:
    """The sinks that the settings ask for.

    Raises:
        UserError: a package is not installed.
    """
    kinds = [kind for name, kind in SINKS.items() if getattr(config.run, name)]
    for kind in kinds:
        if importlib.util.find_spec(kind.package) is None:
            raise UserError(
                f"--{kind.package}: the package {kind.package} is not installed; "
                f"pip install 'fastmerge[{kind.package}]', or leave the flag out"
            )
    return kinds


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by name: 'task' (from 1), 'train/loss', 'evaluate/seen_accuracy'."""
    numbers = {f"{row['phase']}/{key}": value for key, value in row.items() if key not in ABOUT and value is not None}
    return {"task": row["task"] + 1} | numbers


class Sinks:
    """All sinks of one run; without any it does nothing."""

    def __init__(self, kinds: list[type[Sink]], name: str, folder: Path, config: Config):
        self.open: list[Sink] = []
        for kind in kinds:
            try:
                self.open.append(kind(name, folder, config))
            except Exception as error:  # such as no login, no network, or an unsuitable version
                raise UserError(f"--{kind.package}: cannot begin ({first_line(error)}); leave the flag out") from error

    def write(self, number: int, row: dict[str, Any]) -> None:
        """Pass on row `number` of metrics.jsonl. A sink that fails is dropped, so that it cannot end the run."""
        for sink in list(self.open):
            try:
                sink.write(number, scalars(row))
            except Exception as error:
                self.open.remove(sink)
                print(f"warning: --{sink.package} stopped ({first_line(error)}); the run goes on", file=sys.stderr)

    def close(self) -> None:
        for sink in self.open:
            with contextlib.suppress(Exception):  # the run itself is saved
                sink.close()
