"""Train once, merge often: un-merged training does not depend on any merge, so all methods that use it share it.

The first method writes the model of every task (weights and head) into the run folder; the others read it. These files
are not state: a method keeps only its `state_dict()` and ends with the same bits as if it had trained itself.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.checkpoint import joined, load_tensors, save_tensors, select
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Scenario, Task
from fastmerge.errors import UserError
from fastmerge.models.features import plain
from fastmerge.models.saved import recipe
from fastmerge.ranks import ranks
from fastmerge.results import expect
from fastmerge.training import Learner, Phase, Train


class Trajectory:
    """The un-merged models of one seed. folder: their files. share: which of 'sequential' and 'independent' training to
    save, for other methods or because the user keeps it. run: who uses it; a run that goes on from before a file of its
    own trains again, to the same bits and with the same lines in its metrics. scenario: described in the files, so that
    `fastmerge.load` takes them. variant: names other settings of training, whose models have their own files.

    Raises:
        UserError: a file stands where the folder should be.
    """

    def __init__(
        self, folder: Path, share: Collection[str], run: str = "", scenario: Scenario | None = None, variant: str = ""
    ):
        self.folder, self.share, self.run, self.scenario = folder, share, run, scenario
        self.variant = variant
        expect(folder, folder=True)

    def train(self, learner: Learner, task: Task, images: TaskImages, init: str = "sequential") -> Phase:
        """Return the training phase of `task`, or a phase that reads its saved result."""
        name = init + self.variant
        path = self.folder / f"{name}-task-{task.index + 1}.safetensors"
        if ranks().agree(int(path.exists())):  # a command that shares the folder may write it between two looks
            model, seconds, run = saved(path)
            if run != self.run:
                return Reused(learner, model, seconds)
        elif name not in self.share:
            return Train(learner, task, images)
        return Recorded(learner, task, images, path, self.run, self.scenario)

    def keep(self) -> None:
        """Mark the models as kept: only the user deletes them."""
        if self.folder.exists():
            (self.folder / "keep").touch()

    def delete(self) -> None:
        """Delete the models unless they are marked as kept."""
        if not (self.folder / "keep").exists():
            shutil.rmtree(self.folder, ignore_errors=True)


class Recorded(Train):
    """Training that saves its result and the seconds it took. A file that another process finished meanwhile has the same
    bits and is kept."""

    def __init__(
        self, learner: Learner, task: Task, images: TaskImages, path: Path, run: str, scenario: Scenario | None = None
    ):
        super().__init__(learner, task, images)
        self.scenario = scenario
        self.path, self.run, self._before, self._begun = path, run, 0.0, time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._begun

    def finish(self) -> None:
        super().finish()
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)  # time finished work, not queued work
        if ranks().agree(int(self.path.exists())):
            return
        about: dict[str, Any] = {"seconds": self.seconds(), "run": self.run}
        if self.scenario is not None:
            own = {"method": f"{self.run}, not merged", "seed": self.learner.seed, "final_accuracy": None}
            about |= recipe(self.learner, plain(self.learner.backbone), self.scenario, self.task.index, **own)
        self.path.parent.mkdir(exist_ok=True)
        self.bytes_written = save_tensors(self.path, joined(learner=self.learner.state_dict()), about)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"seconds": torch.tensor(self.seconds(), dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self._before = float(tensors.get("seconds", 0.0))  # missing if this training was not shared when it began


class Reused(Phase):
    """A phase without steps that loads the model another method trained. seconds_elsewhere: time of that training."""

    name = "train"
    steps = 0
    batches = None

    def __init__(self, learner: Learner, tensors: dict[str, Tensor], seconds: float):
        self.learner, self.model, self.seconds_elsewhere = learner, tensors, seconds

    def step(self, i: int) -> dict[str, Tensor]:
        return {}

    def finish(self) -> None:
        self.learner.load_state_dict(self.model)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """This run stopped during its own training, so do not count that time twice."""
        self.seconds_elsewhere -= float(tensors.get("seconds", 0.0))


def saved(path: Path) -> tuple[dict[str, Tensor], float, str]:
    """A model that `Recorded` wrote, the seconds of its training, and the run that trained it.

    Raises:
        UserError: the file is damaged or something else.
    """
    try:
        tensors, about = load_tensors(path)
        return select(tensors, "learner"), float(about["seconds"]), about["run"]
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be used as a saved model ({error}). Delete it, and the same command trains it again"
        ) from None
