"""CLG-CBM, Language Guided Concept Bottleneck Models for Interpretable Continual Learning (Yu et al., CVPR 2025, arXiv
2503.23283).

    python -m fastmerge --method clg-cbm --clg-cbm.concepts concepts.json

The file has texts for every class (data/concepts.py); none comes with this package. The frozen CLIP gives features of length
1, which one pass over the images of a task keeps until its end. Two parts are trained on them:

1. A gate (a linear layer with a row for every concept of the task's new classes, batch normalisation, and a linear layer)
   with cross-entropy over the new classes, and a regulariser that keeps the rows as far from the mean of the concepts' text
   embeddings as these are. Each row in turn takes the nearest concept that is free, `per_class` for each new class.
2. The bottleneck: logits = W L f (models/concepts.py), L with a row for every concept chosen so far, W with one for every
   class so far. Loss: cross-entropy, plus `align` times the alignment of the scores L f with the concepts' texts (cos^3,
   Oikarinen et al. 2023), plus the elastic net of W. Old classes have pseudo-features: those of the new class whose mean is
   nearest to the old class's name, moved to the old class's mean. A batch also has `samples` features drawn from the
   Gaussian of each of two old classes.

As in the released code: Adam, its rates and epochs, a tenth of the rate after 1/2, 2/3 and 5/6 of part 2, 10 concepts a
class. Old rows of L and W go on training, new ones are drawn. The saved head names its concepts (`load(...).head.concepts`).

Differences from the released code. **It keeps the epoch of both parts that is best on the test images** (of every tenth);
here the last epoch counts, and `--clg-cbm.select test` does as it does, which the table marks. It inverts the covariance of
fewer concepts than dimensions, which has no inverse; here it is the pseudo-inverse. Its features are of one random crop of
an image; here of the whole. It has prompts by data set; here one for all (`--clg-cbm.prompt`), and names have the templates
of the data set. An old class has as many pseudo-features as a new class has on average, which is the same where all classes
have as many images. A root of a covariance is symmetric. A class that returns in another domain brings no new concepts, and
joins its images to its Gaussian.

The batch normalisation of the gate has, there, the running statistics of the first epoch in 30 of 31 epochs; here those of
the batches. In a domain-incremental run every task has all classes, so none is old and nothing is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.checkpoint import joined, select
from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.concepts import check_classes, file_hash, read_concepts
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.exemplars import AllFeatures
from fastmerge.gaussians import Gaussians
from fastmerge.methods.method import Method, Tensors, check_text_head
from fastmerge.models.backbone import Backbone
from fastmerge.models.concepts import Bottleneck, ConceptHead, Gate, alignment, mahalanobis, nearest_unused
from fastmerge.models.precision import tf32
from fastmerge.statistics_pass import ByClass, ClassMoments, StatisticsPass, Sums
from fastmerge.training import Learner, Phase, load_optimiser, optimiser_tensors, positions

FILE = "--clg-cbm.concepts"
MILESTONES, DECAY, RIDGE, L1_SHARE = (1 / 2, 2 / 3, 5 / 6), 0.1, 1e-4, 0.99
OLD = 2  # classes in a batch of which features are drawn
CHECKED = 10  # epochs from one test accuracy to the next


class CLGCBM(Method):
    """It keeps a Gaussian of every class; the head keeps the bottleneck."""

    groups = ("clg_cbm",)
    lora = False
    frozen = True
    trains = False
    needs_text = True

    def __init__(self, learner: Learner):
        super().__init__(learner)
        assert learner.text is not None and learner.config.clg_cbm.concepts is not None
        self.text, self.settings = learner.text, learner.config.clg_cbm
        self.names = learner.head.get_buffer("weight")  # the embeddings of the class names
        self.concepts = read_concepts(learner.config.clg_cbm.concepts, FILE)
        self.gaussians = Gaussians(learner.backbone.feature_dim, learner.device)
        self.bottleneck = ConceptHead(learner.backbone.feature_dim).to(learner.device)
        self.chosen_on_test = self.settings.select == "test"
        learner.head = self.bottleneck

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        check_text_head(config, backbone, "clg-cbm encodes concepts")
        settings = config.clg_cbm
        if settings.concepts is None:
            raise UserError(f"clg-cbm needs a file of concepts: {FILE} FILE.json (docs/METHODS.md has its form)")
        if "{}" not in settings.prompt:
            raise UserError(f"--clg-cbm.prompt {settings.prompt!r}: expected {{}} in the place of the concept")
        read_concepts(settings.concepts, FILE)

    @classmethod
    def check_classes(cls, config: Config, names: Sequence[str]) -> None:
        assert config.clg_cbm.concepts is not None
        check_classes(read_concepts(config.clg_cbm.concepts, FILE), names, f"{FILE} {config.clg_cbm.concepts}")

    @classmethod
    def contents(cls, config: Config) -> dict[str, str]:
        return {"clg_cbm.concepts": file_hash(config.clg_cbm.concepts)} if config.clg_cbm.concepts else {}

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1  # the pass; the rest sees no images

    def train(self, task: Task, images: TaskImages, during: Tensors) -> None:
        return None

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return LearnConcepts(self, task, images)

    def state_dict(self) -> Tensors:
        return self.gaussians.state_dict()

    def load_state_dict(self, tensors: Tensors) -> None:
        self.gaussians.load_state_dict(tensors)


class Kept(Sums):
    """All features of the task, of length 1, and their moments by class."""

    def __init__(self, learner: Learner, task: Task, images: TaskImages, batches: ByClass):
        self.every, self.moments = AllFeatures(learner, len(images)), ClassMoments(learner, task, batches)

    def add(self, features: Tensor, labels: Tensor, i: int) -> None:
        self.every.add(features, labels, i)
        self.moments.add(F.normalize(features, dim=1), labels, i)

    def tensors(self) -> dict[str, Tensor]:
        return self.every.tensors() | self.moments.tensors()


class LearnConcepts(StatisticsPass):
    """The pass, then the steps of the gate, then those of the bottleneck."""

    batches: ByClass
    sums: Kept

    def __init__(self, method: CLGCBM, task: Task, images: TaskImages):
        learner, head = method.learner, method.bottleneck
        batches = ByClass(learner, task, images)
        super().__init__(learner, task, images, batches, Kept(learner, task, images, batches))
        self.method, self.head, self.settings = method, head, method.settings
        known, self.size = head.known.tolist(), learner.config.training.batch_size
        self.fresh = [c for c in task.classes if c not in known]
        self.old = [c for c in method.gaussians.known if c not in task.classes]
        self.order = torch.tensor(known + self.fresh, dtype=torch.int64, device=learner.device)  # of the logits
        places, ends = batches.ends()
        self.parts = {
            task.classes[p]: slice(start, end) for p, start, end in zip(places, [0, *ends], ends, strict=False)
        }
        self.each = len(images) // max(1, len(places))  # pseudo-features of an old class
        rows = [torch.arange(part.start, part.stop) for c, part in self.parts.items() if c in self.fresh]
        self.fresh_rows = torch.cat([torch.zeros(0, dtype=torch.int64), *rows]).to(learner.device)
        self.texts = [text for c in self.fresh for text in method.concepts[method.text.names[c]]]
        prompts = [self.settings.prompt.replace("{}", text) for text in self.texts]
        self.embeddings = method.text.encode(prompts) if prompts else method.names[:0]
        self.per_gate = math.ceil(len(self.fresh_rows) / self.size)
        self.per_epoch = math.ceil((len(images) + len(self.old) * self.each) / self.size)
        self.gate_steps = self.settings.gate_epochs * self.per_gate
        self.steps += self.gate_steps + self.settings.epochs * self.per_epoch
        self.module: Gate | Bottleneck | None = None
        self.chosen: Tensor | None = None  # rows of `texts`
        self.best: Tensors = {}  # of the present part, with `--clg-cbm.select test`
        self.epoch = -1

    def step(self, i: int) -> dict[str, Tensor]:
        if i < self.batches.steps:
            return super().step(i)
        i -= self.batches.steps
        with tf32(False):
            return self.gate_step(i) if i < self.gate_steps else self.bottleneck_step(i - self.gate_steps)

    def rows(self, what: str, count: int, i: int, per_epoch: int) -> Tensor:
        """The rows of step i of a part whose epoch has `count` rows."""
        epoch, place = divmod(i, per_epoch)
        if epoch != self.epoch:
            order = torch.randperm(count, generator=self.learner.generator(what, self.task.index, epoch))
            self.split, self.epoch = order.to(self.learner.device, non_blocking=True).split(self.size), epoch
        return self.split[place]

    def update(self, loss: Tensor) -> dict[str, Tensor]:
        self.optimiser.zero_grad()
        loss.backward()
        self.learner.parts.changes()
        self.optimiser.step()
        return {"loss": loss.detach()}

    def open_gate(self) -> None:
        self.learner.parts.changes()
        settings, texts = self.settings, self.embeddings.double()
        generator = self.learner.generator("gate", self.task.index)
        gate = Gate(len(texts), texts.shape[1], len(self.fresh), generator).to(self.learner.device)
        self.module, self.optimiser = gate, torch.optim.Adam(gate.parameters(), lr=settings.gate_lr)
        mean = texts.mean(0)
        inverse = torch.linalg.pinv((texts - mean).T @ (texts - mean) / max(1, len(texts) - 1), hermitian=True)
        wanted = mahalanobis(texts, mean, inverse).clamp(min=1)  # 0 for one concept
        self.spread = mean.float(), inverse.float(), wanted.float()
        self.fresh_labels = positions(self.labels()[self.fresh_rows], self.order[-len(self.fresh) :])

    def labels(self) -> Tensor:
        """Classes of the features, in the order of the pass."""
        labels = torch.cat([torch.full((part.stop - part.start,), c) for c, part in self.parts.items()])
        return labels.to(self.learner.device)

    def gate_step(self, i: int) -> dict[str, Tensor]:
        if self.module is None:
            self.open_gate()
        gate, count = self.module, len(self.fresh_rows)
        assert isinstance(gate, Gate)
        rows = self.rows("gate order", count, i, self.per_gate)
        features = self.sums.every.features[self.fresh_rows[rows]]
        loss = F.cross_entropy(gate(features), self.fresh_labels[rows]) + gate.distance(*self.spread)
        terms = self.update(loss)
        self.look(gate, i, self.per_gate, self.settings.gate_epochs)
        return terms

    def choose(self) -> Tensor:
        """Rows of `texts`: those that the gate's centres are nearest to."""
        count = min(len(self.texts), self.settings.per_class * len(self.fresh))
        if not isinstance(self.module, Gate):  # no new class has an image
            return torch.arange(count, device=self.learner.device)
        self.take_best()
        with torch.no_grad():
            return nearest_unused(self.module.centres, self.embeddings, count)

    def open_bottleneck(self, chosen: Tensor) -> None:
        learner, head, gaussians = self.learner, self.head, self.method.gaussians
        learner.parts.changes()
        self.chosen, self.best, self.epoch = chosen, {}, -1
        count = len(head.layer) + len(chosen)
        generator = learner.generator("bottleneck", self.task.index)
        self.module = Bottleneck(head, count, len(self.order), generator).to(learner.device)
        self.optimiser = torch.optim.Adam(self.module.parameters(), lr=self.settings.lr)
        self.all_embeddings = torch.cat([head.embeddings, self.embeddings[chosen]])
        features = self.sums.every.features
        inputs, labels = features, self.labels()
        if self.old:
            device, parts = learner.device, list(self.parts.values())
            starts = torch.tensor([part.start for part in parts], device=device)
            counts = torch.tensor([part.stop - part.start for part in parts], device=device)
            means = torch.stack([features[part].mean(0) for part in parts])
            near = (self.method.names[self.old] @ F.normalize(means, dim=1).T).argmax(1)
            rows = starts[near][:, None] + torch.arange(self.each, device=device) % counts[near][:, None]
            known = torch.tensor([gaussians.known.index(c) for c in self.old], device=device)
            moved = features[rows] - means[near][:, None] + gaussians.mean[known][:, None]  # [old, each, d]
            inputs = torch.cat([inputs, moved.flatten(0, 1)])
            labels = torch.cat([labels, gaussians.classes[known].repeat_interleave(self.each)])
            self.roots = gaussians.roots(RIDGE)
            order = torch.randperm(len(known), generator=learner.generator("old classes", self.task.index))
            self.turns = known[order.to(device)]  # rows of the Gaussians
        self.inputs, self.targets = inputs, positions(labels, self.order)

    def bottleneck_step(self, i: int) -> dict[str, Tensor]:
        if not isinstance(self.module, Bottleneck):
            self.open_bottleneck(self.choose())
        module, settings = self.module, self.settings
        assert isinstance(module, Bottleneck)
        rows = self.rows("concept order", len(self.inputs), i, self.per_epoch)
        features, targets = self.inputs[rows], self.targets[rows]
        if self.old and settings.samples:
            drawn, columns = self.draw(i)
            features, targets = torch.cat([features, drawn]), torch.cat([targets, columns])
        scores, logits = module(features)
        loss = F.cross_entropy(logits, targets) + module.sparsity(settings.sparsity, L1_SHARE)
        if settings.align:
            loss = loss + settings.align * alignment(features, scores, self.all_embeddings)
        part = (i // self.per_epoch) / settings.epochs
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * DECAY ** sum(part >= milestone for milestone in MILESTONES)
        terms = self.update(loss)
        self.look(module, i, self.per_epoch, settings.epochs)
        return terms

    def draw(self, i: int) -> tuple[Tensor, Tensor]:
        """Features of two old classes, which take turns, and their columns."""
        gaussians, n, place = self.method.gaussians, self.settings.samples, i % self.per_epoch
        rows = self.turns[(torch.arange(OLD, device=self.turns.device) + OLD * place) % len(self.turns)]
        noise = torch.randn(
            OLD, n, gaussians.mean.shape[1], generator=self.learner.generator("drawn", self.task.index, i)
        )
        noise = noise.to(rows.device, non_blocking=True)
        features = torch.baddbmm(gaussians.mean[rows][:, None], noise, self.roots[rows]).flatten(0, 1)
        return features, positions(gaussians.classes[rows], self.order).repeat_interleave(n)

    def look(self, module: Gate | Bottleneck, i: int, per_epoch: int, epochs: int) -> None:
        """With `--clg-cbm.select test`: after every tenth epoch and the last one, keep the module if it is the best so far on
        the test images. The gate stops at the first look that is no better."""
        epoch, place = divmod(i, per_epoch)
        due = place == per_epoch - 1 and (epoch % CHECKED == 0 or epoch == epochs - 1)
        if not self.method.chosen_on_test or not due or "stopped" in self.best:
            return
        accuracy = self.test_accuracy(module.eval())
        module.train()
        if accuracy > float(self.best.get("accuracy", 0.0)):
            state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            self.best = joined(state=state) | {"accuracy": torch.tensor(accuracy)}
        elif isinstance(module, Gate) and epoch:
            self.best = self.best | {"stopped": torch.ones(())}

    @torch.no_grad()
    def test_accuracy(self, module: Gate | Bottleneck) -> float:
        """On the task's test images: of the gate among its classes, of the bottleneck among all so far."""
        if not hasattr(self, "tests"):
            learner = self.learner
            assert learner.test_images is not None
            images = learner.test_images(self.task.index)
            parts = [images.batch(rows) for rows in torch.arange(len(images)).split(self.size)]
            found = [(learner.without_gradient(learner.backbone, pixels), labels) for pixels, labels in parts]
            self.tests = F.normalize(torch.cat([f for f, _ in found]), dim=1), torch.cat([y for _, y in found])
        features, labels = self.tests
        if isinstance(module, Gate):
            own = self.order[-len(self.fresh) :]
            inside = torch.isin(labels, own)
            return float((own[module(features[inside]).argmax(1)] == labels[inside]).double().mean())
        return float((self.order[module(features)[1].argmax(1)] == labels).double().mean())

    def take_best(self) -> None:
        if state := select(self.best, "state"):
            assert self.module is not None
            self.module.load_state_dict(state)

    @torch.no_grad()
    def finish(self) -> None:
        self.method.gaussians.update(self.task, self.sums.moments)
        if not isinstance(self.module, Bottleneck):
            return  # no image is left
        assert self.chosen is not None
        self.take_best()
        head, module = self.head, self.module
        head.layer, head.weight = module.layer.detach().clone(), module.weight.detach().clone()
        head.embeddings, head.known = self.all_embeddings, self.order
        head.add_texts([self.texts[row] for row in self.chosen.tolist()])

    def tensors(self) -> dict[str, Tensor]:
        found = joined(sums=self.sums.tensors())
        if self.module is not None:
            found |= joined(module=self.module.state_dict(), best=self.best) | optimiser_tensors(self.optimiser)
        return found if self.chosen is None else found | {"chosen": self.chosen}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(select(tensors, "sums"))
        device = self.learner.device
        if "chosen" in tensors:
            self.open_bottleneck(tensors["chosen"].to(device))
        elif select(tensors, "module"):
            self.open_gate()
        if self.module is not None:
            self.module.load_state_dict(select(tensors, "module"))
            load_optimiser(self.optimiser, tensors)
            self.best = select(tensors, "best")
