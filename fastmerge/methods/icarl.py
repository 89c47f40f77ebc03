"""iCaRL, Incremental Classifier and Representation Learning (Rebuffi et al., CVPR 2017, arXiv 1611.07725).

    python -m fastmerge --method icarl
    python -m fastmerge --method icarl icarl:exemplars=200

It keeps images, so it is no data-free method; the table says so. A task trains on its images and the exemplars of the tasks
before, with cross-entropy over all classes so far, and distillation of the previous model's predictions for the old classes.
Then herding chooses exemplars (exemplars.py): K images are kept in all, K / (number of classes) of each.

Two classifiers: the network's own gives the accuracy of the method and is in the saved model (PILOT's "CNN" curve); the
nearest mean of the exemplars' present features (Algorithm 1, PILOT's "NME") has a row of its own. Papers quote either.

The paper trains with sigmoids; PILOT, whose numbers later papers quote, with softmax and distillation at temperature 2. We
follow PILOT's loss. Its optimiser is SGD; ours is that of the other methods (`--lr`, AdamW).
"""

from __future__ import annotations

import torch

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Scenario, Task
from fastmerge.exemplars import Exemplars, check_tasks
from fastmerge.methods.lwf import Distil, LwF
from fastmerge.methods.method import Tensors
from fastmerge.models.features import Features, with_head
from fastmerge.models.heads import PrototypeHead
from fastmerge.settings.statistics import ICaRLSettings
from fastmerge.training import Learner, Phase

EXEMPLARS = "--icarl.exemplars"


class ICaRL(LwF):
    """It keeps exemplars and the known classes. During a task: the previous model and its head."""

    groups = ("icarl",)
    keeps_images = True
    settings: ICaRLSettings

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.icarl
        self.kept = Exemplars(learner, self.settings.exemplars, EXEMPLARS)

    @classmethod
    def check_tasks(cls, config: Config, scenario: Scenario) -> None:
        check_tasks(config.icarl.exemplars, EXEMPLARS, scenario)

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass for herding

    def begin(self, task: Task) -> Tensors:
        self.kept.check_room(task)
        return super().begin(task)

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Rehearse(self, task, self.kept.joined(images), during)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:  # type: ignore[override]
        super().merge(task, images, during)
        return self.kept.herding(task, images)

    def also_evaluated(self) -> dict[str, Features]:
        learner, kept = self.learner, self.kept
        classes = len(learner.head.get_buffer(learner.head.per_class[0]))
        head = PrototypeHead(learner.backbone.feature_dim, classes).to(learner.device)
        size = learner.config.training.batch_size
        for pixels, labels in zip(kept.exemplars.split(size), kept.labels.split(size), strict=True):
            head.observe(learner.without_gradient(learner.backbone, pixels), labels)
        return {"nearest mean of exemplars": with_head(learner.backbone, head)}

    def state_dict(self) -> Tensors:
        return super().state_dict() | self.kept.state_dict()

    def load_state_dict(self, tensors: Tensors) -> None:
        super().load_state_dict(tensors)
        self.kept.load_state_dict(tensors)


class Rehearse(Distil):
    """Cross-entropy over all classes so far, on the images of the task and the exemplars, plus distillation."""

    def __init__(self, method: ICaRL, task: Task, images: TaskImages, during: Tensors):
        super().__init__(method, task, images, during)
        known = method.known.tolist()
        self.classes = torch.tensor([*known, *(c for c in task.classes if c not in known)], device=self.learner.device)
