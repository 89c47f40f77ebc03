"""CMM, "Toward a Holistic Approach to Continual Model Merging": train in the tangent space, merge by AdamW's Fisher, align.

    python -m fastmerge --method cmm --cmm.lam 0.4
    python -m fastmerge --method cmm --cmm.no-tangent --cmm.align-epochs 0      # merging alone, a row of Table 4

1. task t trains theta in f_lin(x; theta) = f(x; theta_0) + J(x; theta_0)(theta - theta_0) from the previous merged weights;
   theta_0 are the starting weights for every task (Algorithm 1 and eq. 2).
2. theta <- (lam F_t theta_t + (1 - lam) F theta) / F', F <- F' = lam F_t + (1 - lam) F (eq. 4, Algorithm 1), F_t = the second
   moment of AdamW at the end of the task. Where both Fishers are 0: plain interpolation. The first task is not merged.
3. the last projection alone is trained on task t so that the features of the merged model match those of the previous one.

Against the released code: the second moment is bias-corrected (`--cmm.fisher adam-raw` is as released; its scale then grows
with the steps of a task), 0 / 0 is defined, theta_0 is never touched (there it is "interpolated with itself"), and only the
projection needs a gradient in step 3. As there, F is not changed by step 3, AdamW starts afresh with every task, and its
gradients are those after clipping.
"""

from __future__ import annotations

from collections.abc import Callable

import fastmerge_kernels as fk
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.models.linearised import Linearised, check_linearisable
from fastmerge.training import Batches, Learner, Phase, Train, load_optimiser, optimiser_tensors


class CMM:
    """Between tasks it keeps the merged model, its Fisher, and theta_0 for the tangent space: constant memory."""

    def __init__(self, learner: Learner):
        self.learner, self.settings = learner, learner.config.cmm
        self.initial: Tensor | None = None
        self.plain = self.trained_as = learner.features
        if self.settings.tangent:
            check_linearisable(learner.flat, learner.backbone.image_size)
            self.initial = learner.theta.clone()
            self.trained_as = Linearised(learner.flat, self.initial)
        self.fisher: Tensor | None = None  # F of the tasks before
        self.fisher_t: Tensor | None = None  # F_t, from the end of training to the merge
        self.previous: Tensor | None = None  # the merged model of the tasks before, during a task
        self.infer()

    @property
    def also_evaluated(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The other way of using the same weights."""
        if not self.settings.tangent:
            return {}
        return {"plain": self.plain} if self.settings.inference == "linearised" else {"linearised": self.trained_as}

    def infer(self) -> None:
        """From now on the model is evaluated."""
        self.learner.features = self.trained_as if self.settings.inference == "linearised" else self.plain

    def begin(self, task: Task) -> None:
        if task.index:
            self.previous = self.learner.theta.clone()

    def train(self, task: Task, images: TaskImages) -> Phase:
        self.learner.features = self.trained_as
        return TrainWithFisher(self, task, images)

    def merge(self, task: Task, images: TaskImages) -> Phase:
        return MergeAndAlign(self, task, images)

    def state_dict(self) -> dict[str, Tensor]:
        kept = {name: getattr(self, name) for name in ("initial", "fisher", "fisher_t", "previous")}
        return {"theta": self.learner.theta} | {k: v for k, v in kept.items() if v is not None}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.learner.theta.copy_(tensors["theta"])
        if self.initial is not None:
            self.initial.copy_(tensors["initial"])
        for name in ("fisher", "fisher_t", "previous"):
            setattr(self, name, tensors[name].to(self.learner.device) if name in tensors else None)


class TrainWithFisher(Train):
    """Step 1, and F_t from the optimiser, which ends here, so its second moment is taken over and not copied."""

    def __init__(self, method: CMM, task: Task, images: TaskImages):
        super().__init__(method.learner, task, images)
        self.method = method

    def finish(self) -> None:
        super().finish()
        if self.method.settings.merge != "fisher":
            return
        state, group = self.optimiser.state[self.learner.flat.theta], self.optimiser.param_groups[0]
        fisher = state.pop("exp_avg_sq", None)
        if fisher is None:  # no step was made
            fisher = torch.zeros_like(self.learner.theta)
        elif self.method.settings.fisher == "adam":
            fisher /= 1 - group["betas"][1] ** float(state["step"])
        self.method.fisher_t = fisher


class MergeAndAlign:
    """Steps 2 and 3: the merge before the first step, then the projection, step by step."""

    name = "merge"

    def __init__(self, method: CMM, task: Task, images: TaskImages):
        self.method, self.task, self.images = method, task, images
        self.learner, self.settings = method.learner, method.settings
        self.batches = Batches(self.learner, task, images, self.name, self.settings.align_epochs if task.index else 0)
        self.steps = self.batches.steps
        views = dict(zip(self.learner.flat.names, self.learner.flat.views(self.learner.theta), strict=True))
        # views of theta, so that a step of the optimiser is a step of the model
        self.projection = {name: torch.nn.Parameter(views[name]) for name in self.learner.backbone.last_projection()}
        # weight decay 0.01, AdamW's own, as released
        self.optimiser = torch.optim.AdamW(self.projection.values(), lr=self.settings.align_lr)
        self.merged = False

    @torch.no_grad()
    def merge(self) -> None:
        """Step 2, once."""
        if self.merged:
            return
        self.merged = True
        method, theta, lam = self.method, self.learner.theta, self.settings.lam
        if self.settings.merge == "fisher":
            if self.task.index:  # written from the side of the new model, in place: theta_t and F_t become theta and F'
                fk.fisher_merge_(theta, method.fisher_t, method.previous, method.fisher, 1 - lam)
            method.fisher, method.fisher_t = method.fisher_t, None
        elif self.settings.merge == "average" and self.task.index:
            fk.lerp(method.previous, theta, lam, out=theta)

    def features(self, theta: Tensor, images: Tensor, projection: dict[str, Tensor] | None = None) -> Tensor:
        """At `theta` `[n]`, as the model is trained; `projection` takes the place of its entries there."""
        method, flat = self.method, self.learner.flat
        if method.initial is None:
            return functional_call(flat.module, flat.as_dict(theta) | (projection or {}), (images,))
        shift = flat.as_dict(theta - method.initial)
        if projection:
            start = flat.as_dict(method.initial)
            shift |= {name: value - start[name] for name, value in projection.items()}
        return method.trained_as.at(shift, images)

    def step(self, i: int) -> dict[str, Tensor]:
        self.merge()
        pixels, _ = self.images.batch(self.batches.rows(i))
        images = self.learner.plain(pixels)
        with torch.no_grad():
            wanted = self.features(self.method.previous, images)
        found = self.features(self.learner.theta, images, self.projection)
        loss = (F.l1_loss if self.settings.align_loss == "l1" else F.mse_loss)(found, wanted)
        self.optimiser.zero_grad()
        loss.backward()
        if clip := self.learner.config.training.clip:
            torch.nn.utils.clip_grad_norm_(self.projection.values(), clip)
        self.optimiser.step()
        return {"loss": loss.detach()}

    def finish(self) -> None:
        self.merge()
        self.method.previous = None
        self.method.infer()

    def tensors(self) -> dict[str, Tensor]:
        return optimiser_tensors(self.optimiser)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_optimiser(self.optimiser, tensors)
        self.merged = True  # before the first step
