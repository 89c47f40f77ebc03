"""Train once, merge often: un-merged training does not depend on any merge, so all methods that use it share it.

The first method writes the model of every task (weights and head) into the run folder; the others read it. These files
are not state: a method keeps only its `state_dict()` and ends with the same bits as if it had trained itself.
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
    """The un-merged models of one seed. folder: their files. share: which of 'sequential' and 'independent' training to
    save, for other methods or because the user keeps it."""

    def __init__(self, folder: Path, share: Collection[str]):
        self.folder, self.share = folder, share

    def train(self, learner: Learner, task: Task, images: TaskImages, init: str = "sequential") -> Phase:
        """Return the training phase of `task`, or a phase that reads its saved result."""
        path = self.folder / f"{init}-task-{task.index + 1}.safetensors"
        if path.exists():
            return Reused(learner, path)
        return Recorded(learner, task, images, path) if init in self.share else Train(learner, task, images)

    def keep(self) -> None:
        """Mark the models as kept: only the user deletes them."""
        if self.folder.exists():
            (self.folder / "keep").touch()

    def delete(self) -> None:
        """Delete the models unless they are marked as kept."""
        if not (self.folder / "keep").exists():
            shutil.rmtree(self.folder, ignore_errors=True)


class Recorded(Train):
    """Training that saves its result and the seconds it took."""

    def __init__(self, learner: Learner, task: Task, images: TaskImages, path: Path):
        super().__init__(learner, task, images)
        self.path, self._before, self._begun = path, 0.0, time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._begun

    def finish(self) -> None:
        super().finish()
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)  # time finished work, not queued work
        about = {"seconds": self.seconds()}
        self.path.parent.mkdir(exist_ok=True)
        save_tensors(self.path, joined(learner=self.learner.state_dict()), about)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"seconds": torch.tensor(self.seconds(), dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self._before = float(tensors["seconds"])


class Reused(Phase):
    """A phase without steps that loads the model another method trained. seconds_elsewhere: time of that training."""

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
        """This run stopped between writing the file and its checkpoint: do not count its own time twice."""
        self._counted = float(tensors["seconds"])
