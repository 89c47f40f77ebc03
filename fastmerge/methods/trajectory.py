"""Train once, merge many: un-merged training does not depend on any merge, so all methods that train so share it.

The first of them writes the model of every task (weights and head) into the run folder; the others read it. They are
files, not state: a method keeps what its `state_dict()` says, as if it had trained itself, and ends with the same bits.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from fastmerge.checkpoint import joined, load_tensors, save_tensors, select
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.training import Learner, Phase, Train


class Trajectory:
    """The un-merged models of one seed. folder: where they lie. share: which of 'sequential' and 'independent' training to
    write down, because others will ask for it or it is to be kept."""

    def __init__(self, folder: Path, share: Collection[str]):
        self.folder, self.share = folder, share

    def train(self, learner: Learner, task: Task, images: TaskImages, init: str = "sequential") -> Phase:
        """The training phase of `task`, or the phase that reads its outcome."""
        path = self.folder / f"{init}-task-{task.index + 1}.safetensors"
        if path.exists():
            return Reused(learner, path)
        return Recorded(learner, task, images, path) if init in self.share else Train(learner, task, images)

    def keep(self) -> None:
        """No command deletes these models any more; a user may."""
        if self.folder.exists():
            (self.folder / "keep").touch()

    def delete(self) -> None:
        """Unless they are kept."""
        if not (self.folder / "keep").exists():
            shutil.rmtree(self.folder, ignore_errors=True)


class Recorded(Train):
    """Training whose outcome, and what it cost, is written down."""

    def __init__(self, learner: Learner, task: Task, images: TaskImages, path: Path):
        super().__init__(learner, task, images)
        self.path, self._before, self._begun = path, 0.0, time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._begun

    def finish(self) -> None:
        super().finish()
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)  # the seconds are of work done, not queued
        about = {"seconds": self.seconds()}
        self.path.parent.mkdir(exist_ok=True)
        save_tensors(self.path, joined(learner=self.learner.state_dict()), about)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"seconds": torch.tensor(self.seconds(), dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self._before = float(tensors["seconds"])


class Reused(Phase):
    """No steps: it takes over the model that another method trained. seconds_elsewhere: how long that training took."""

    name = "train"
    steps = 0
    batches = None

    def __init__(self, learner: Learner, path: Path):
        self.learner, self.path = learner, path
        self._counted = 0.0

    def step(self, i: int) -> dict[str, Tensor]:
        return {}

    def finish(self) -> None:
        tensors, about = load_tensors(self.path)
        self.learner.load_state_dict(select(tensors, "learner"))
        self.seconds_elsewhere = about["seconds"] - self._counted

    def load(self, tensors: dict[str, Tensor]) -> None:
        """This run was stopped after it wrote the file and before its checkpoint; do not count its own time again."""
        self._counted = float(tensors["seconds"])
