"""HiDe-Prompt (Wang et al. 2023, NeurIPS, arXiv 2310.07234): a prompt for every task in a frozen transformer, a head that
tells the task, and Gaussians of the features of all classes, with and without prompts.

    python -m fastmerge --method hide

Its three parts:
1. Task identity: a linear head on the feature without prompts is trained with cross-entropy over the task's own classes,
   then on features drawn from the Gaussians of the unprompted features of all classes. At test time the task of its best
   class says which prompt an image gets.
2. Within a task: prefixes of keys and values at the chosen blocks. The prompt is (1 - momentum) p_t + momentum times the
   mean of the earlier ones. The loss is cross-entropy over the task's own classes plus `contrast` times the mean over the
   images of

       -log exp(f f / tau) / (exp(f f / tau) + sum over stored class means m of exp(f m / tau)),   f the prompted feature.
3. Prediction over all tasks: after every task but the first, the head is trained on features drawn from the Gaussians of the
   prompted features: SGD with momentum 0.9, weight decay 5e-4, a cosine by epoch, Sigma + 1e-4 I.

Differences. In the released contrast the images of a batch repel each other too, also in the first task; here they are not
compared, so that no loss depends on how a batch is cut. Features are not normalised there, as in released code. Released
code draws all features of an epoch but uses only as many batches as there are old classes (`range(crct_num)`); here all
are used. Its default statistics are 10 centroids for a class; here they are Gaussians. It trains part 1 in a run of its own,
and aligns it with a fifth of the samples; here parts 1 and 2 share the images of a step and the clipping of its gradient, so
that the unprompted feature is computed once. Its statistics are of augmented images. It divides the prompts' rate by ten at
every 30th epoch by default; here the rate is constant. The next task's prompt starts as the previous one's, and the first
uniform in (-1, 1), as in released code. A class that returns in another domain gets another Gaussian, and another row in
the head of part 1, since it belongs to two tasks. Head rows start at zero.

Rates that differ. The head learns at `--head-lr` (1e-2); in the released scripts at a tenth of the rate of the prompts. The
released code multiplies the rates of part 1 and of its alignment by batch size / 256; here they are `identity_lr` and
`align_lr` as they are. The released alignment has no weight decay; here 5e-4. The released head of part 1 has a residual
MLP (768, 1536, 768) and a LayerNorm before it; here it is linear.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.checkpoint import joined, select
from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.gaussians import Gaussians
from fastmerge.methods.method import Tensors
from fastmerge.methods.prompt_method import PromptMethod, TrainPrompts
from fastmerge.models.backbone import Backbone
from fastmerge.models.precision import tf32
from fastmerge.models.prompt_pools import HidePool, identity_logits
from fastmerge.models.trainable import query
from fastmerge.statistics_pass import ByClass, ClassMoments, StatisticsPass, Sums
from fastmerge.training import Learner, Phase, gradients, load_optimiser, optimiser_tensors, positions

MOMENTUM, WEIGHT_DECAY, RIDGE = 0.9, 5e-4, 1e-4
PLAIN, PROMPTED = "plain", "prompted"


class HiDe(PromptMethod):
    """It keeps its pool, and the Gaussians of the features without and with prompts, whose classes are rows of the pool."""

    groups = ("hide",)
    ignores = ("training.lr", "training.warmup_steps", "training.weight_decay")
    layers = ("layers",)
    head = "linear"
    pool: HidePool

    def __init__(self, learner: Learner):
        super().__init__(learner)
        d = learner.backbone.feature_dim
        self.gaussians = {name: Gaussians(d, learner.device) for name in (PLAIN, PROMPTED)}

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass; the alignment sees no images

    def start(self, backbone: Backbone, generator: torch.Generator) -> HidePool:
        s = self.settings
        return HidePool.start(s.layers, s.length, backbone.width, backbone.feature_dim, s.momentum, generator)

    def begin(self, task: Task) -> Tensors:
        super().begin(task)
        self.pool = HidePool(self.pool.rows_for(task.classes)).to(self.learner.device)
        return {}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainHide(self, task, images)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Align(self, task, images)

    def identity(self) -> list[nn.Parameter]:
        """The head that tells the task, as parameters that share its memory."""
        return [nn.Parameter(self.pool.identity_weight), nn.Parameter(self.pool.identity_bias)]

    def state_dict(self) -> Tensors:
        return joined(pool=self.pool.state_dict(), **{name: g.state_dict() for name, g in self.gaussians.items()})

    def load_state_dict(self, tensors: Tensors) -> None:
        super().load_state_dict(select(tensors, "pool"))
        for name, gaussians in self.gaussians.items():
            gaussians.load_state_dict(select(tensors, name))


class TrainHide(TrainPrompts):
    """A step trains the prompt, the model's head, and the head that tells the task."""

    def __init__(self, method: HiDe, task: Task, images: TaskImages):
        super().__init__(method, task, images)
        self.pool, self.settings, self.means = method.pool, method.settings, method.gaussians[PROMPTED].mean
        self.identity = method.identity()
        self.optimiser.add_param_group({"params": self.identity, "peak": self.settings.identity_lr})

    def step(self, i: int) -> dict[str, Tensor]:
        for p in self.identity:
            p.grad = None
        return super().step(i)

    def regularise(self) -> None:
        self.learner.ranks.add_(*gradients(self.identity))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        backbone, k = self.learner.backbone, len(self.classes)
        plain = query(backbone, images)
        features = backbone.prompted(images, self.pool.at_blocks(self.pool.own()[None]))
        logits = identity_logits(plain, *(p[-k:] for p in self.identity))
        loss = self.task_loss(features, labels) + F.cross_entropy(logits, positions(labels, self.classes))
        if self.settings.contrast and len(self.means):
            loss = loss + self.settings.contrast * contrast(features, self.means, self.settings.temperature)
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        self.pool.prompt.copy_(self.pool.own())
        super().finish()


def contrast(features: Tensor, means: Tensor, temperature: float) -> Tensor:
    """Part 2, the mean over `features` `[b, d]`. means: `[k, d]`."""
    with tf32(False):
        others = features @ means.T
    own = features.square().sum(1, keepdim=True)
    return -(torch.cat([own, others], 1) / temperature).log_softmax(1)[:, 0].mean()


class Both(Sums):
    """The moments of features without and with prompts, which are one vector `[2 d]`."""

    def __init__(self, learner: Learner, task: Task, batches: ByClass):
        self.moments = {name: ClassMoments(learner, task, batches) for name in (PLAIN, PROMPTED)}

    def add(self, features: Tensor, labels: Tensor, i: int) -> None:
        for moments, own in zip(self.moments.values(), features.chunk(2, 1), strict=True):
            moments.add(own, labels, i)

    def tensors(self) -> dict[str, Tensor]:
        return joined(**{name: moments.tensors() for name, moments in self.moments.items()})


class Align(StatisticsPass):
    """The pass for the Gaussians of the task's classes; then the alignment, whose steps train both heads."""

    sums: Both

    def __init__(self, method: HiDe, task: Task, images: TaskImages):
        batches = ByClass(method.learner, task, images)
        super().__init__(method.learner, task, images, batches, Both(method.learner, task, batches))
        self.method, self.settings, self.pool = method, method.settings, method.pool
        first = len(self.pool.task) - len(task.classes)
        self.rows = tuple(range(first, len(self.pool.task)))  # of the task's classes
        known = set(method.gaussians[PLAIN].known) | {self.rows[place] for place in batches.present}
        self.per_epoch = len(known)  # batches: a class has as many features as a batch
        if len(self.pool.prompts):
            self.steps += self.settings.align_epochs * self.per_epoch
        self.identity = method.identity()
        heads = self.identity + method.learner.head.trainable()
        self.optimiser = torch.optim.SGD(heads, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.passed = False  # whether the sums are in the Gaussians
        self.drawn = -1  # the epoch of `features` and `places`

    def both(self, images: Tensor) -> Tensor:
        prompt = self.pool.at_blocks(self.pool.prompt[None])
        backbone = self.learner.backbone
        return torch.cat([backbone(images), backbone.prompted(images, prompt)], 1)

    def step(self, i: int) -> dict[str, Tensor]:
        if i >= self.batches.steps:
            return self.align(i - self.batches.steps)
        pixels, labels = self.images.batch(self.batches.rows(i))
        features = self.learner.without_gradient(self.both, pixels)
        self.learner.parts.changes()
        with torch.no_grad(), tf32(False):
            self.sums.add(features, labels, i)
        if i == self.batches.steps - 1:
            for name, gaussians in self.method.gaussians.items():
                gaussians.update(replace(self.task, classes=self.rows), self.sums.moments[name])
            self.passed = True
        return {}

    def align(self, i: int) -> dict[str, Tensor]:
        epoch, part = divmod(i, self.per_epoch)
        if epoch != self.drawn:
            self.draw(epoch)
        some = slice(part * self.settings.samples, (part + 1) * self.settings.samples)
        (plain, rows), (features, labels) = ((x[some], y[some]) for x, y in (self.plain, self.prompted))
        self.optimiser.zero_grad()
        told = identity_logits(plain, *(p[self.known] for p in self.identity))
        logits = self.learner.head(features, self.candidates)
        losses = [F.cross_entropy(told, rows), F.cross_entropy(logits, labels)]
        sum(losses, losses[0].new_zeros(())).backward()
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.align_lr * 0.5 * (1 + math.cos(math.pi * epoch / self.settings.align_epochs))
        self.learner.parts.changes()
        self.optimiser.step()
        return {"identity_loss": losses[0].detach(), "loss": losses[1].detach()}

    @torch.no_grad()
    def draw(self, epoch: int) -> None:
        """Draw the features of an epoch, and the column of each: of the rows `known` of the head that tells the task, and of
        the classes `candidates`."""
        gaussians, n = self.method.gaussians, self.settings.samples
        if self.drawn < 0:
            self.roots = {name: own.roots(RIDGE) for name, own in gaussians.items()}
            self.known = gaussians[PLAIN].classes
            self.candidates, self.column = self.pool.classes[self.known].unique(return_inverse=True)
        found = [
            own.drawn(self.roots[name], n, self.learner.generator("align", name, self.task.index, epoch))
            for name, own in gaussians.items()
        ]
        self.plain, self.prompted = found[0], (found[1][0], self.column[found[1][1]])
        self.drawn = epoch

    def tensors(self) -> dict[str, Tensor]:
        return optimiser_tensors(self.optimiser) if self.passed else super().tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.passed = f"{PLAIN}.count" not in tensors
        if not self.passed:
            super().load(tensors)
        load_optimiser(self.optimiser, tensors)
