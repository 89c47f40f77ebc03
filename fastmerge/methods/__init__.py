"""Continual-learning methods, one file each. `METHODS` is the only registry: name -> class.

A method is built with the `Learner`, and has
    train(task, images) -> Phase            the training phase of a task
    merge(task, images) -> Phase | None     the merging phase after it, None where there is none
    searches                                whether merge() has training steps of its own (for the time left)
    state_dict() / load_state_dict()        everything it keeps, the model included: the loop saves this and nothing else,
                                            so what a method stores between tasks can be measured, and cannot hide
`merge` is also where a rule without steps works: a Phase with steps = 0 that merges in `finish()`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.finetune import Finetune
from fastmerge.methods.trm import TRM
from fastmerge.training import Phase


class Method(Protocol):
    searches: bool

    def train(self, task: Task, images: TaskImages) -> Phase: ...

    def merge(self, task: Task, images: TaskImages) -> Phase | None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None: ...


METHODS = {"trm": TRM, "finetune": Finetune}
