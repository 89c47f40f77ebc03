"""The base class of methods. A method acts on the `Learner`, which owns the model and the head.

For every task the loop calls `begin`, runs the phases that `train` and `merge` return, and evaluates `features()`.
Tensors that are needed for one task only (such as theta_{t-1} as an anchor) are kept in a dict: `begin` creates it,
phases read and change it, and the loop saves it and clears it after the last phase.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Scenario, Task
from fastmerge.errors import UserError
from fastmerge.models.features import Features, plain
from fastmerge.models.lora import check_rank
from fastmerge.models.prompts import check_prompts
from fastmerge.training import ADAPTED, Learner, Phase

if TYPE_CHECKING:
    from fastmerge.methods.trajectory import Trajectory
    from fastmerge.models.backbone import Backbone
    from fastmerge.models.text_context import ClassPrompts

Tensors = dict[str, Tensor]


class Method(ABC):
    """Class attributes:

    groups: groups of settings that the method reads, its own first. ignores: settings of these groups and of training that
    change nothing, as GROUP.SETTING. head: the kind of head it needs, None for any.
    needs_text: whether it needs a text head and trains through the text tower (`learner.text`). lora: whether
    `--lora-rank` and `--prompt-length` may be used. frozen: whether the backbone never changes. trains: whether it has a
    training phase. joint: whether all tasks are joined into one. keeps_images: whether it keeps training images between
    tasks, which the table says.
    """

    groups: ClassVar[tuple[str, ...]] = ()
    ignores: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[str | None] = None
    needs_text: ClassVar[bool] = False
    lora: ClassVar[bool] = True
    frozen: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    keeps_images: ClassVar[bool] = False
    chosen_on_test: bool = False  # whether it chose something on the images that are evaluated, which the table says

    learner: Learner

    def __init__(self, learner: Learner):
        self.learner = learner

    @classmethod
    def build(cls, learner: Learner, trajectory: Trajectory, protocol: str | None) -> Method:
        """Create the method of a run. trajectory: un-merged training of its seed; protocol: one of `protocols`."""
        return cls(learner)

    @classmethod
    def protocols(cls, config: Config) -> tuple[str | None, ...]:
        """The protocols, one run for each; None where `--protocol` does not apply."""
        return (None,)

    @classmethod
    def groups_read(cls, config: Config) -> tuple[str, ...]:
        """The groups of settings that a run with `config` reads: `groups`, and those of rules that `config` names."""
        return cls.groups

    @classmethod
    def unread(cls, config: Config) -> set[str]:
        """Settings of these groups and of training, as GROUP.SETTING, that change nothing: a row cannot set them."""
        head = "text" if cls.needs_text else cls.head or config.model.head or "linear"
        return {*cls.ignores} | ({"training.head_lr"} if head != "linear" else set())

    @classmethod
    def trajectory(cls, config: Config, protocol: str | None) -> str | None:
        """The un-merged training that it shares with other methods: 'sequential', 'independent', or None."""
        return None

    @classmethod
    def train_epochs(cls, config: Config) -> int:
        """Epochs of the training phase, used to estimate the time left."""
        return config.training.epochs

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        """Epochs of the merging phase, used to estimate the time left."""
        return 0

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        """Raise UserError for a setting that the backbone cannot serve, before anything is trained. config: with the kind
        of head that the run has."""
        if cls.lora and cls.trains and config.training.lora_rank:
            check_rank("--lora-rank", config.training.lora_rank, backbone, ADAPTED)
        if cls.lora and cls.trains and config.training.prompt_length:
            check_prompts(backbone, range(backbone.layers), "--prompt-length")

    @classmethod
    def check_classes(cls, config: Config, names: Sequence[str]) -> None:
        """Raise UserError for a setting that does not fit the classes of the data, before anything is trained."""

    @classmethod
    def check_tasks(cls, config: Config, scenario: Scenario) -> None:
        """Raise UserError for a setting that does not fit the tasks, before anything is trained."""

    @classmethod
    def check_text(cls, config: Config, text: ClassPrompts) -> None:
        """Raise UserError for a setting that the text tower cannot serve, before anything is trained; of methods with
        `needs_text`."""

    @classmethod
    def contents(cls, config: Config) -> dict[str, str]:
        """Hashes of the files that its settings name, by setting: a file may move but not change."""
        return {}

    def begin(self, task: Task) -> Tensors:
        """Set the model to where training on `task` starts; return the tensors that are needed during the task."""
        return {}

    @abstractmethod
    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase | None:
        """Return the training phase, or None if nothing is trained. during: the dict from `begin`."""

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase | None:
        """Return the merging phase, or None if there is none. A rule without steps merges in `finish()`."""
        return None

    def features(self) -> Features:
        """The features that are evaluated after a task and saved at the end."""
        return plain(self.learner.backbone)

    def also_evaluated(self) -> dict[str, Features]:
        """Other ways of using the same weights, by name; the table shows them too."""
        return {}

    def state_dict(self) -> Tensors:
        """All that the method keeps between tasks besides the learner's model and head. The loop saves nothing else, so
        its size can be measured."""
        return {}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Continue from what `state_dict` returned."""


def check_text_head(config: Config, backbone: Backbone, why: str) -> None:
    """Raise UserError unless the run has a text head. why: what the method, named first, does with it."""
    if config.model.head not in (None, "text") or backbone.family == "timm":
        raise UserError(
            f"{why}: it needs --head text and a model with a text tower "
            f"(given: --head {config.model.head or 'prototype'}, {backbone.name}); leave it out of --method"
        )
