"""iCaRL, Incremental Classifier and Representation Learning (Rebuffi et al., CVPR 2017, arXiv 1611.07725).

    python -m fastmerge --method icarl
    python -m fastmerge --method icarl icarl:exemplars=200

It keeps images, so it is no data-free method; the table says so. A task trains on its images and the exemplars of the tasks
before, with cross-entropy over all classes so far, and distillation of the previous model's predictions for the old classes.
Then herding (Algorithm 4) chooses exemplars: features have length 1, and each new image brings the mean of the chosen as near
as possible to the class mean. K images are kept in all, K / (number of classes) of each; Algorithm 5 drops the last chosen.

Two classifiers: the network's own gives the accuracy of the method and is in the saved model (PILOT's "CNN" curve); the
nearest mean of the exemplars' present features (Algorithm 1, PILOT's "NME") has a row of its own. Papers quote either.

The paper trains with sigmoids; PILOT, whose numbers later papers quote, with softmax and distillation at temperature 2. We
follow PILOT's loss. Its optimiser is SGD; ours is that of the other methods (`--lr`, AdamW). A class that returns in another
domain gets exemplars of its own there, and the K images are shared by all pairs of class and task.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.rehearsal import Joined
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.lwf import Distil, LwF
from fastmerge.methods.method import Tensors
from fastmerge.models.features import Features, with_head
from fastmerge.models.heads import PrototypeHead
from fastmerge.settings.statistics import ICaRLSettings
from fastmerge.statistics_pass import ByClass, StatisticsPass, Sums
from fastmerge.training import Learner, Phase


class ICaRL(LwF):
    """It keeps, pair after pair of class and task, `exemplars` `[e, 3, s, s]` uint8 in the order of their choice and `labels`
    `[e]`; `sizes`, the number of each pair; and the known classes. During a task: the previous model and its head."""

    groups = ("icarl",)
    keeps_images = True
    settings: ICaRLSettings

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.icarl
        size, device = learner.backbone.image_size, learner.device
        self.exemplars = torch.zeros(0, 3, size, size, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(0, dtype=torch.int64, device=device)
        self.sizes: list[int] = []

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass for herding

    def begin(self, task: Task) -> Tensors:
        needed = len(self.sizes) + len(task.classes)
        if needed > self.settings.exemplars:
            raise UserError(
                f"{task.name}: --icarl.exemplars {self.settings.exemplars} is less than one image for each of {needed} pairs "
                "of class and task; give a larger number with another --run-dir"
            )
        return super().begin(task)

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Rehearse(self, task, Joined(images, self.exemplars, self.labels), during)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:  # type: ignore[override]
        return Herd(self, task, images)

    def also_evaluated(self) -> dict[str, Features]:
        learner = self.learner
        classes = len(learner.head.get_buffer(learner.head.per_class[0]))
        head = PrototypeHead(learner.backbone.feature_dim, classes).to(learner.device)
        size = learner.config.training.batch_size
        for pixels, labels in zip(self.exemplars.split(size), self.labels.split(size), strict=True):
            head.observe(learner.without_gradient(learner.backbone, pixels), labels)
        return {"nearest mean of exemplars": with_head(learner.backbone, head)}

    def state_dict(self) -> Tensors:
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return super().state_dict() | {"exemplars": self.exemplars, "labels": self.labels, "sizes": sizes}

    def load_state_dict(self, tensors: Tensors) -> None:
        super().load_state_dict(tensors)
        self.exemplars, self.labels, self.sizes = tensors["exemplars"], tensors["labels"], tensors["sizes"].tolist()


class Rehearse(Distil):
    """Cross-entropy over all classes so far, on the images of the task and the exemplars, plus distillation."""

    def __init__(self, method: ICaRL, task: Task, images: TaskImages, during: Tensors):
        super().__init__(method, task, images, during)
        known = method.known.tolist()
        self.classes = torch.tensor([*known, *(c for c in task.classes if c not in known)], device=self.learner.device)


class AllFeatures(Sums):
    """The features of a task's images, of length 1, in the order of the pass: `[n, d]`."""

    def __init__(self, learner: Learner, n: int):
        self.size = learner.config.training.batch_size
        self.features = torch.zeros(n, learner.backbone.feature_dim, device=learner.device)

    def add(self, features: Tensor, labels: Tensor, i: int) -> None:
        self.features[i * self.size : i * self.size + len(features)] = F.normalize(features, dim=1)

    def tensors(self) -> Tensors:
        return {"features": self.features}


class Herd(StatisticsPass):
    """The pass, then the choice of exemplars for the task's classes, and fewer for the classes before."""

    batches: ByClass
    sums: AllFeatures

    def __init__(self, method: ICaRL, task: Task, images: TaskImages):
        super().__init__(
            method.learner,
            task,
            images,
            ByClass(method.learner, task, images),
            AllFeatures(method.learner, len(images)),
        )
        self.method = method

    @torch.no_grad()
    def finish(self) -> None:
        method, (places, ends) = self.method, self.batches.ends()
        each = method.settings.exemplars // (len(method.sizes) + len(places))
        groups = list(zip(method.exemplars.split(method.sizes), method.labels.split(method.sizes), strict=True))
        groups = [(pixels[:each], labels[:each]) for pixels, labels in groups]
        start = 0
        for end in ends:
            chosen = herd(self.sums.features[start:end], each).cpu()
            groups.append(self.images.batch(self.batches.sorted[start:end][chosen]))
            start = end
        method.exemplars, method.labels = (torch.cat(part) for part in zip(*groups, strict=True))
        method.sizes = [len(labels) for _, labels in groups]
        known = torch.tensor(self.task.classes, device=method.known.device)
        method.known = torch.unique(torch.cat([method.known, known]))


def herd(features: Tensor, m: int) -> Tensor:
    """Algorithm 4: the rows of up to m features in the order of their choice, int64.

    features: `[n, d]`, of length 1. Choice k is the row x, not chosen before, for which (x + sum of the chosen) / k is
    nearest to the mean.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    taken, chosen = torch.zeros(len(features), device=features.device), []
    for k in range(1, min(m, len(features)) + 1):
        distance = torch.linalg.vector_norm(mean - (features + total) / k, dim=1)
        best = (distance + taken).argmin()[None]
        chosen.append(best)
        total = total + features[best][0]
        taken[best] = torch.inf
    return torch.cat(chosen)
