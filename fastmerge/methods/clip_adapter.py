"""CLIP-Adapter (Gao et al. 2021, arXiv 2110.04544) trained on the tasks in sequence, behind a frozen backbone.

    python -m fastmerge --method clip-adapter --clip-adapter.ratio 0.2

The adapter of section 3.2 (visual branch; models/adapter.py) is trained by cross-entropy over the task's own classes,
with Adam and cosine annealing. All tasks share one adapter. As in the released code there is no text adapter. The last
ReLU makes the learned part non-negative. The released code reads its optimiser from a configuration that is not in its
repository; the learning rate is the paper's.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `clip-adapter:clip=0` switches it off.
"""

from __future__ import annotations

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.adapter import ClipAdapter
from fastmerge.models.features import Features, adapted
from fastmerge.models.trainable import Beside
from fastmerge.training import Learner, Phase, TrainWithAdam


class CLIPAdapter(Method):
    """It keeps the adapter."""

    groups = ("clip_adapter",)
    ignores = ("training.lr", "training.weight_decay")
    lora = False
    frozen = True

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings, d = learner.config.clip_adapter, learner.backbone.feature_dim
        hidden = max(1, d // self.settings.reduction)
        self.adapter = ClipAdapter(d, hidden, self.settings.ratio, learner.generator("adapter")).to(learner.device)
        self.beside = Beside(learner.backbone, self.adapter)

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainWithAdam(self.learner, task, images, trainable=self.beside, lr=self.settings.lr)

    def features(self) -> Features:
        return adapted(self.learner.backbone, self.adapter)

    def state_dict(self) -> Tensors:
        return {"adapter": self.beside.theta.detach()}

    def load_state_dict(self, tensors: Tensors) -> None:
        self.beside.theta.data.copy_(tensors["adapter"])
