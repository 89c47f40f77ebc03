"""CMM, "Toward a Holistic Approach to Continual Model Merging": train in the tangent space, merge by AdamW's Fisher, align.

    python -m fastmerge --method cmm --cmm.lam 0.4
    python -m fastmerge --method cmm --cmm.no-tangent --cmm.align-epochs 0      # merging alone, a row of Table 4

1. Task t starts from the previous merged weights and trains theta in f_lin(x; theta) = f(x; theta_0) +
   J(x; theta_0)(theta - theta_0), where theta_0 is the starting weights for every task (Algorithm 1 and eq. 2).
2. theta <- (lam F_t theta_t + (1 - lam) F theta) / F', F <- F' = lam F_t + (1 - lam) F (eq. 4, Algorithm 1), F_t = the second
   moment of AdamW at the end of the task. Where both Fishers are 0: plain interpolation. Task 1 is not merged.
3. Only the last projection is trained on task t, so that the merged model's features match those of the previous one.

Unlike in the released code, the second moment is bias-corrected (`--cmm.fisher adam-raw` is as released; its scale
grows with the steps of a task), 0 / 0 is defined, theta_0 is never touched (released: "interpolated with itself"), and
only the projection needs a gradient in step 3. As in the released code, step 3 does not change F, AdamW restarts with
every task, and its gradients are clipped.
"""

from __future__ import annotations

from collections.abc import Mapping

import fastmerge_kernels as fk
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.methods.method import Method, Tensors
from fastmerge.models.backbone import Backbone
from fastmerge.models.features import Features, linearised
from fastmerge.models.linearised import Linearised, TangentSpace, check_linearisable
from fastmerge.training import Batches, Learner, Phase, Train, gradients, load_optimiser, optimiser_tensors


class CMM(Method):
    """It keeps the Fisher of the merged model, and theta_0 for the tangent space: constant memory.

    During a task: `previous`, the merged model of the previous tasks, and, between the two phases, `fisher_t`.
    """

    groups = ("cmm",)
    lora = False

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.cmm
        self.initial: Tensor | None = None
        self.tangent: Linearised | None = None
        if self.settings.tangent:
            check_linearisable(learner.flat, learner.backbone.image_size)
            self.initial = learner.theta.clone()
            self.tangent = Linearised(learner.flat, self.initial)
        self.fisher: Tensor | None = None  # F of the previous tasks

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return config.cmm.align_epochs

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        if config.cmm.align_epochs:
            backbone.last_projection()

    def features(self) -> Features:
        return self.trained_as() if self.settings.inference == "linearised" else super().features()

    def also_evaluated(self) -> dict[str, Features]:
        if self.tangent is None:
            return {}
        if self.settings.inference == "linearised":
            return {"plain": super().features()}
        return {"linearised": self.trained_as()}

    def trained_as(self) -> Features:
        """The features that training optimises."""
        return super().features() if self.tangent is None else linearised(self.learner.backbone, self.tangent)

    def begin(self, task: Task) -> Tensors:
        return {"previous": self.learner.theta.clone()} if task.index else {}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return TrainWithFisher(self, task, images, during)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> MergeAndAlign:
        return MergeAndAlign(self, task, images, during)

    def state_dict(self) -> Tensors:
        kept = {"initial": self.initial, "fisher": self.fisher}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    def load_state_dict(self, tensors: Tensors) -> None:
        if self.initial is not None:
            self.initial.copy_(tensors["initial"])
        self.fisher = tensors["fisher"].to(self.learner.device) if "fisher" in tensors else None


class TrainWithFisher(Train):
    """Step 1. F_t is the optimiser's second moment; the optimiser ends here, so F_t is moved, not copied."""

    def __init__(self, method: CMM, task: Task, images: TaskImages, during: Tensors):
        trainable = TangentSpace(method.learner.flat, method.tangent) if method.tangent else None
        super().__init__(method.learner, task, images, trainable=trainable)
        self.kind = "tangent" if method.tangent else "train"
        self.method, self.during = method, during

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
        self.during["fisher_t"] = fisher


class MergeAndAlign(Phase):
    """Steps 2 and 3: the merge, before the first step, then the training of the projection."""

    name = "merge"
    batches: Batches

    def __init__(self, method: CMM, task: Task, images: TaskImages, during: Tensors):
        self.method, self.task, self.images, self.during = method, task, images, during
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
            fisher_t = self.during.pop("fisher_t")
            if method.fisher is not None:  # in place: theta_t and F_t become theta and F'
                fk.fisher_merge_(theta, fisher_t, self.during["previous"], method.fisher, 1 - lam)
            method.fisher = fisher_t
        elif self.settings.merge == "average" and self.task.index:
            fk.lerp(self.during["previous"], theta, lam, out=theta)

    def features(self, theta: Tensor, images: Tensor, projection: Mapping[str, Tensor] | None = None) -> Tensor:
        """The trained function's features at `theta` `[n]`; `projection` replaces entries of theta by name."""
        method, flat = self.method, self.learner.flat
        if method.initial is None or method.tangent is None:
            return functional_call(flat.module, {**flat.as_dict(theta), **(projection or {})}, (images,))
        shift = flat.as_dict(theta - method.initial)
        if projection:
            start = flat.as_dict(method.initial)
            shift |= {name: value - start[name] for name, value in projection.items()}
        return method.tangent.at(shift, images)

    def step(self, i: int) -> dict[str, Tensor]:
        self.merge()
        pixels, _ = self.images.batch(self.batches.rows(i))
        images = self.learner.plain(pixels)
        self.optimiser.zero_grad()
        loss = self.learner.theta.new_zeros(())
        for part, share in self.learner.parts.of(len(images), "tangent" if self.method.tangent else "train"):
            with torch.no_grad():
                wanted = self.features(self.during["previous"], images[part])
            found = self.features(self.learner.theta, images[part], self.projection)
            value = (F.l1_loss if self.settings.align_loss == "l1" else F.mse_loss)(found, wanted) * share
            value.backward()
            loss += value.detach()
        self.learner.ranks.add_(loss, *gradients(list(self.projection.values())))
        if clip := self.learner.config.training.clip:
            torch.nn.utils.clip_grad_norm_(self.projection.values(), clip)
        self.learner.parts.changes()
        self.optimiser.step()
        return {"loss": loss}

    def finish(self) -> None:
        self.merge()

    def tensors(self) -> dict[str, Tensor]:
        return optimiser_tensors(self.optimiser)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_optimiser(self.optimiser, tensors)
        self.merged = True  # the merge comes before the first step
