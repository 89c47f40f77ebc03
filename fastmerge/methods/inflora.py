"""InfLoRA, interference-free low-rank adaptation (Liang & Li, CVPR 2024, arXiv 2404.00228).

    python -m fastmerge --method inflora --head linear
    python -m fastmerge --method inflora inflora:lamb=0.98 inflora:rank=16 --head linear

LoRA on key and value: W becomes W + B A. A is designed before the training of a task and fixed; only B learns, so the
weights move inside the span of A's rows (section 3.2). A pass over the task's images at theta_{t-1} gives the second
moment X^T X of every layer's input. Its part outside the input space of the old tasks (DualGPM, methods/dual_gpm.py) has
left singular vectors; A holds the first r, divided by sqrt 3 (section 3.3 and Algorithm 1; the divisor is of the released
code). After the training W + B A becomes W, a second pass gives the moments at theta_t, and the memory grows.

As in the released code: the threshold rises linearly from `lamb` towards `lame` with the task's number divided by the
number of tasks, and it measures fourth powers, not the energy of the paper's eq. 5 (see dual_gpm.py); Adam at 5e-4 without
weight decay; logits of earlier classes are excluded. Different: the released code takes the number of tasks from the run
(10 in its main tables), while here `tasks` is a setting, because a sequence can go on (`--continue-from`); its passes see
augmented images, ours plain ones; its cosine changes every epoch, ours every step; a linear head learns at `--head-lr`.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `inflora:clip=0` switches it off.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.dual_gpm import Memory, grown, left_vectors, memories_of, tensors_of
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.backbone import Backbone
from fastmerge.models.lora import OnlyUp, Projections, check_rank
from fastmerge.moments_pass import MomentsPass
from fastmerge.training import ADAPTED, Batches, Learner, Phase, TrainWithAdam, learning_rate


class InfLoRA(Method):
    """It keeps the memory of every adapted weight: at most half of the squared length of its input."""

    groups = ("inflora",)
    ignores = ("training.lr", "training.weight_decay")
    lora = False

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.inflora
        self.memory: dict[str, Memory] = {}

    @classmethod
    def train_epochs(cls, config: Config) -> int:
        return config.training.epochs + 1  # the pass that designs A

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass for the memory

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        check_rank("--inflora.rank", config.inflora.rank, backbone, ADAPTED)

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainUp(self, task, images)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Remember(self, task, images)

    def threshold(self, task: Task) -> float:
        """It rises with every task and stays below `lame`, which the released code never reaches either."""
        s = self.settings
        return s.lamb + (s.lame - s.lamb) * min(task.index, s.tasks - 1) / s.tasks

    def design(self, name: str, moment: Tensor) -> Tensor:
        """A of the adapter of this weight, `[rank, in]` fp32, from the second moment of its input."""
        free = self.memory[name].free(moment) if name in self.memory else moment.cpu().double()
        rows = left_vectors(free)[0][:, : self.settings.rank].mT / math.sqrt(3)
        return rows.to(self.learner.theta)

    def state_dict(self) -> Tensors:
        return tensors_of(self.memory)

    def load_state_dict(self, tensors: Tensors) -> None:
        self.memory = memories_of(tensors)


class TrainUp(TrainWithAdam):
    """The first epoch is the pass that designs A, the others train B."""

    trainable: OnlyUp

    def __init__(self, method: InfLoRA, task: Task, images: TaskImages):
        learner, settings = method.learner, method.settings
        super().__init__(learner, task, images, trainable=OnlyUp(learner.flat, settings.rank, ADAPTED), lr=settings.lr)
        self.method = method
        self.batches = Batches(learner, task, images, self.name, learner.config.training.epochs + 1)
        self.steps, self.first = self.batches.steps, self.batches.per_epoch
        self.names = [block.name for block in self.trainable.blocks]
        self.moments = MomentsPass(learner, task, images, set(self.names), self.batches)
        self.designed = False

    def rate(self, peak: float, i: int) -> float:
        return learning_rate(peak, i - self.first, self.steps - self.first, self.learner.config.training.warmup_steps)

    def step(self, i: int) -> dict[str, Tensor]:
        if i >= self.first:
            return super().step(i)
        terms = self.moments.step(i)
        if i == self.first - 1:
            made = {name: self.method.design(name, moment) for name, moment in self.moments.result().items()}
            self.trainable.downs, self.designed = [made[name] for name in self.names], True
        return terms

    def tensors(self) -> dict[str, Tensor]:
        if not self.designed:
            return self.moments.tensors()
        downs = dict(zip(self.names, self.trainable.downs, strict=True))  # key and value of one weight have the same
        return super().tensors() | {f"down.{name}": down for name, down in downs.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.designed = "adapter" in tensors
        if not self.designed:
            self.moments.load(tensors)
            return
        super().load(tensors)
        device = self.learner.device
        self.trainable.downs = [tensors[f"down.{name}"].to(device) for name in self.names]


class Remember(MomentsPass):
    """The pass at theta_t; at its end the memory takes in the inputs of this task."""

    name = "merge"

    def __init__(self, method: InfLoRA, task: Task, images: TaskImages):
        names = {block.name for block in Projections(method.learner.flat, ADAPTED).blocks}
        super().__init__(method.learner, task, images, names)
        self.method, self.task = method, task

    def finish(self) -> None:
        memory, threshold = self.method.memory, self.method.threshold(self.task)
        for name, moment in self.result().items():
            memory[name] = grown(memory.get(name), moment, threshold)
