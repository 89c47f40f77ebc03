"""PROOF, projection fusion (Zhou et al., "Learning without Forgetting for Vision-Language Models", TPAMI 2025, arXiv
2305.19270): projections of each task behind a frozen CLIP, and attention that fuses image, classes and context.

    python -m fastmerge --method proof --proof.exemplars 2000

It keeps images, so it is no data-free method; the table says so. Every task adds a linear projection of the image, one of
the text, and context prompts; those of earlier tasks are frozen, and the outputs of all projections are summed (expandable
projections). The projected image, class texts, class means of image features (visual prototypes) and the contexts attend to
each other (projection fusion; models/fusion.py). The logits of an image are the sum of three parts, and the loss is the sum
of their cross-entropies over all classes so far, on the images of the task and the exemplars:

* projected: scale * cosine of projected image and class text;
* textual: products of image and class text after the attention; visual: of image and prototype after the attention.

As in the released code: SGD with momentum 0.9, cosine, weight decay 0.05, 3 contexts a task from N(0, 1), one attention that
all tasks train, exemplars by herding on frozen features, 2000 images shared by all classes. The projections are linear, so
the earlier ones are kept as their sum, and what is kept grows by the contexts alone.

Differences from the released code. It averages class texts and prototypes after the attention over the batch, also at test
time; here they are those of each image, and `--proof.fusion batch` averages. It has CLIP's contrast within a batch for the
first part, where images of one class repel each other's texts; here it is the paper's loss over the classes, so a batch can
be cut. It adds the first part without the scale, and at test time with images that are not normalised as in training. It
projects features as they are; here image, text and the features behind a prototype have length 1. A class text is the mean
over its templates, projected once; there each template is projected, and training sees the first alone. It trains the
projections of the text of earlier tasks on, and CLIP's scale; here both are frozen. It has dropout in the attention.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `proof:clip=0` switches it off. Under
`--proof.fusion batch` a batch is what is computed at once, so that training depends on `--micro-batch` and on the number of
processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Scenario, Task
from fastmerge.exemplars import Exemplars, check_tasks
from fastmerge.methods.method import Method, Tensors, check_text_head
from fastmerge.models.backbone import Backbone
from fastmerge.models.fusion import FusionHead, NewProjections
from fastmerge.models.trainable import Beside
from fastmerge.training import Learner, Phase, Train, positions

EXEMPLARS = "--proof.exemplars"


class Proof(Method):
    """It keeps exemplars; the head keeps projections, attention, contexts and prototypes."""

    groups = ("proof",)
    ignores = ("training.lr", "training.weight_decay", "training.head_lr")
    lora = False
    frozen = True
    keeps_images = True

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings, start = learner.config.proof, learner.head
        weight, scale = start.get_buffer("weight"), float(start.get_buffer("scale"))
        self.fusion = FusionHead(weight, scale, self.settings.fusion == "batch").to(learner.device)
        self.kept = Exemplars(learner, self.settings.exemplars, EXEMPLARS)
        learner.head = self.fusion

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        check_text_head(config, backbone, "proof projects the text embeddings of class names")

    @classmethod
    def check_tasks(cls, config: Config, scenario: Scenario) -> None:
        check_tasks(config.proof.exemplars, EXEMPLARS, scenario)

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass for herding

    def begin(self, task: Task) -> Tensors:
        self.kept.check_room(task)
        return {}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainFusion(self, task, self.kept.joined(images))

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return self.kept.herding(task, images)

    def state_dict(self) -> Tensors:
        return self.kept.state_dict()

    def load_state_dict(self, tensors: Tensors) -> None:
        self.kept.load_state_dict(tensors)


class TaskProjections(Beside):
    """What a task trains, until `fold` adds it to the head."""

    def __init__(self, method: Proof, task: Task):
        learner, self.fusion = method.learner, method.fusion
        self.own = NewProjections(self.fusion, method.settings.context, learner.generator("projections", task.index))
        super().__init__(learner.backbone, self.own.to(learner.device))

    @torch.no_grad()
    def fold(self) -> None:
        for name, tensor in self.own.added(self.fusion).items():
            setattr(self.fusion, name, tensor.clone())

    def tensors(self) -> Tensors:
        return {"projections": self.theta.detach()}

    def load(self, tensors: Tensors) -> None:
        self.theta.data.copy_(tensors["projections"])


class TrainFusion(Train):
    trainable: TaskProjections

    def __init__(self, method: Proof, task: Task, images: TaskImages):
        self.fusion, self.weight_decay = method.fusion, method.settings.weight_decay
        super().__init__(method.learner, task, images, trainable=TaskProjections(method, task), lr=method.settings.lr)

    def optimiser_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=self.weight_decay)

    def task_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        truth = positions(labels, self.fusion.known)
        parts = self.fusion.parts(features, self.trainable.own.added(self.fusion))
        losses = [F.cross_entropy(logits, truth) for logits in parts]
        return losses[0] + losses[1] + losses[2]
