"""What every method is. A method acts on the `Learner`, which owns the model and the head, and states its own facts.

For every task the loop calls `begin`, works through the phases that `train` and `merge` return, and evaluates `features()`.
Tensors that live for one task only (theta_{t-1} as an anchor, say) are in a dict: `begin` makes it, phases read and change
it, the loop saves it and lets it go when the task ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.models.features import Features, plain
from fastmerge.training import Learner, Phase

if TYPE_CHECKING:
    from fastmerge.methods.trajectory import Trajectory

Tensors = dict[str, Tensor]


class Method(ABC):
    """Facts (class attributes):

    groups: groups of settings that the method reads, its own first. head: the kind of head it needs, None for any. lora:
    whether `--lora-rank` may be used. frozen: whether the backbone stays as it is. trains: whether it has a training phase.
    joint: whether all tasks are joined into one.
    """

    groups: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[str | None] = None
    lora: ClassVar[bool] = True
    frozen: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    joint: ClassVar[bool] = False

    learner: Learner

    def __init__(self, learner: Learner):
        self.learner = learner

    @classmethod
    def build(cls, learner: Learner, trajectory: Trajectory, protocol: str | None) -> Method:
        """The method of one run; trajectory: the un-merged training of its seed, protocol: one of `protocols`."""
        return cls(learner)

    @classmethod
    def protocols(cls, config: Config) -> tuple[str | None, ...]:
        """One run is made for each; None where `--protocol` does not apply."""
        return (None,)

    @classmethod
    def trajectory(cls, config: Config, protocol: str | None) -> str | None:
        """The un-merged training it can share: 'sequential', 'independent', or None where training depends on a merge."""
        return None

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        """How often the merging phase goes through a task's images; for the time left."""
        return 0

    def begin(self, task: Task) -> Tensors:
        """Put the model where the training of `task` starts; returns the tensors that live until the task ends."""
        return {}

    @abstractmethod
    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase | None:
        """The training phase, None where nothing is trained. during: from `begin`."""

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase | None:
        """The merging phase after it, None where there is none. A rule without steps merges in `finish()`."""
        return None

    def features(self) -> Features:
        """What is evaluated after a task, and saved at the end."""
        return plain(self.learner.backbone)

    def also_evaluated(self) -> dict[str, Features]:
        """Other ways of using the same weights, by name; the table shows them too."""
        return {}

    def state_dict(self) -> Tensors:
        """All that the method keeps between tasks besides the learner's model and head. The loop saves this and nothing
        else, so it can be measured."""
        return {}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Continue from what `state_dict` returned."""
