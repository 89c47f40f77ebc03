"""BECAME, Bayesian continual learning with adaptive model merging (Li et al., ICML 2025, arXiv 2504.02666).

    python -m fastmerge --method became
    python -m fastmerge --method became became:project=false became:threshold=0.9

Two stages of `--epochs` each train a task. In the first every step stays in the input space that old tasks leave free, so it
ends at theta_s, near theta_{t-1} for the old tasks; the second goes on without constraint to theta_t*. With the Laplace
approximation of both posteriors, L_old of precision S around theta_s and L_t of precision F_t around theta_t*, the least sum
of the losses on the line between the two models is at

    theta_t = theta_s + lambda D,   D = theta_t* - theta_s,   lambda = <D, F_t D> / <D, (S + F_t) D>,   S <- S + F_t

with diagonal Fishers F_t at theta_t*. So one vector stands for the past, and lambda is always in [0, 1]. It is P&M's
coefficient (methods/pam.py) with all old solutions moved to theta_s. `--became.no-project` leaves the first stage out:
theta_s is theta_{t-1}.

No code is released (a README alone), so these are our choices. The first stage projects what an optimiser step has changed,
as Adam-NSCL does, since AdamW would leave the subspace of projected gradients; weights that are no linear layer (biases,
normalisation, embeddings) stay there from the second task on. The memory of input spaces is DualGPM's (methods/dual_gpm.py,
also on what `threshold` measures), with a constant threshold, from a pass at theta_t without augmentation. F_t is that of the
group `fisher`, a mean over images, so tasks of any size count alike. Both stages of the first task are free. Rows of a linear
head are not merged. lambda is 1 / t where a product is zero or not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.fisher_pass import FisherPass
from fastmerge.methods.dual_gpm import Memory, grown, memories_of, tensors_of
from fastmerge.methods.method import Method, Tensors
from fastmerge.methods.pam import merged_by_fisher
from fastmerge.models.inputs import linear_inputs
from fastmerge.models.precision import tf32
from fastmerge.moments_pass import MomentsPass
from fastmerge.training import Batches, Learner, Phase, Train, learning_rate


class BECAME(Method):
    """It keeps the sum of the Fishers `[n]`, and the memory of every linear layer: at most half of the squared length of its
    input. During a task: `stable`, theta_s."""

    groups = ("became", "fisher")
    ignores = ("fisher.accumulate", "fisher.lam")
    lora = False

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.became
        self.total = torch.zeros_like(learner.theta)
        self.memory: dict[str, Memory] = {}

    @classmethod
    def train_epochs(cls, config: Config) -> int:
        return config.training.epochs * (1 + config.became.project)

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return 1 + config.became.project  # the Fisher pass, and the pass for the memory

    def begin(self, task: Task) -> Tensors:
        return {"stable": self.learner.theta.clone()} if task.index else {}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        if self.settings.project:
            return TwoStages(self, task, images, during)
        return Train(self.learner, task, images)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Merge(self, task, images, during)

    def state_dict(self) -> Tensors:
        return {"total": self.total} | tensors_of(self.memory)

    def load_state_dict(self, tensors: Tensors) -> None:
        self.total.copy_(tensors["total"])
        self.memory = memories_of(tensors)


class TwoStages(Train):
    """The first half of the steps is projected, the second is free; each has its own warm-up, cosine and optimiser state."""

    def __init__(self, method: BECAME, task: Task, images: TaskImages, during: Tensors):
        learner = method.learner
        super().__init__(learner, task, images)
        self.during, self.each = during, self.steps
        self.batches = Batches(learner, task, images, self.name, 2 * learner.config.training.epochs)
        self.steps = self.batches.steps
        self.spaces = {name: (m.basis.to(learner.theta), m.retain) for name, m in method.memory.items()}
        self.axes = linear_inputs(learner.flat, learner.backbone.image_size) if self.spaces else {}

    def rate(self, peak: float, i: int) -> float:
        return learning_rate(peak, i % self.each, self.each, self.learner.config.training.warmup_steps)

    def step(self, i: int) -> dict[str, Tensor]:
        theta = self.learner.theta
        if i == self.each:
            self.optimiser.state.clear()
            if self.task.index:
                self.during["stable"] = theta.clone()
        before = theta.clone() if i < self.each and self.spaces else None
        terms = super().step(i)
        if before is not None:
            self.project(before)
        return terms

    @torch.no_grad()
    def project(self, before: Tensor) -> None:
        """Leave of the last step what is free. before: theta before it, the only copy of the model that a step makes."""
        flat = self.learner.flat
        for name, old, own in zip(flat.names, flat.views(before), flat.views(flat.theta), strict=True):
            if name not in self.spaces:
                own.copy_(old)
                continue
            change = own.sub_(old)
            by_input = self.axes[name][1] == 1
            free = free_part(change if by_input else change.mT, *self.spaces[name])
            own.copy_(old).add_(free if by_input else free.mT)


def free_part(change: Tensor, basis: Tensor, retain: bool) -> Tensor:
    """What the rows of `change` `[out, in]` have outside the old input space; basis, retain: as in `Memory`."""
    with tf32(False):
        inside = change @ basis @ basis.mT
    return inside if retain else change - inside


class Merge(Phase):
    """The Fisher pass at theta_t*, the merge at its end, and the pass for the memory at theta_t."""

    name = "merge"
    batches: Batches

    def __init__(self, method: BECAME, task: Task, images: TaskImages, during: Tensors):
        learner, project = method.learner, method.settings.project
        self.method, self.task, self.during = method, task, during
        self.batches = Batches(learner, task, images, self.name, 1 + project)
        self.fisher = FisherPass(learner, task, images)
        self.fisher.batches = self.batches
        self.moments = MomentsPass(learner, task, images, batches=self.batches) if project else None
        self.steps = self.fisher.steps + (self.moments.steps if self.moments else 0)

    def step(self, i: int) -> dict[str, Tensor]:
        last = self.fisher.steps - 1
        if i > last:
            assert self.moments
            return self.moments.step(self.batches.per_epoch + i - last - 1)
        terms = self.fisher.step(i)
        return terms | self.merged() if i == last else terms

    def merged(self) -> dict[str, Tensor]:
        """Take in the Fisher and merge; returns lambda, for the log."""
        total, theta = self.method.total, self.method.learner.theta
        if not self.task.index:
            total.add_(self.fisher.result())
            return {}
        stable = self.during["stable"]
        found, share, _ = merged_by_fisher(
            total, torch.zeros_like(total), self.fisher.result(), stable, theta, stable, self.task
        )
        theta.copy_(found)
        return {"lambda": torch.tensor(share)}

    def finish(self) -> None:
        memory, threshold = self.method.memory, self.method.settings.threshold
        for name, moment in (self.moments.result() if self.moments else {}).items():
            memory[name] = grown(memory.get(name), moment, threshold)

    def tensors(self) -> dict[str, Tensor]:
        return self.fisher.tensors() | (self.moments.tensors() if self.moments else {})

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.fisher.load(tensors)
        if self.moments:
            self.moments.load(tensors)
