"""Post-hoc merging: any rule of `fastmerge.merging` applied after every task, under one of three storage protocols.

    python -m fastmerge --method ties magmax average --protocol full running strict
    python -m fastmerge --method magmax --protocol full --init independent

protocol  training of task t starts at              the rule merges                         (TRM, Figure 1)
full      the un-merged theta_{t-1}, or theta_init  theta_1, ..., theta_t                   A
running   the un-merged theta_{t-1}                 the merge of t - 1 tasks, and theta_t   B
strict    the merged theta_{t-1}                    theta_{t-1} and theta_t; from t = 2 on  C

Under `running` the merged task vector is kept as it was before the rule's scale (MagMax's code keeps it so), hence MagMax and
task arithmetic end there as under `full`; under `strict` only the merged model exists. Under `full` no rule keeps all models
either, as sums over them are enough (`fastmerge.merging`): what differs is where training starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmerge.checkpoint import joined, select
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.fisher import FisherPass
from fastmerge.merging import RULES, build_rule
from fastmerge.merging.rule import Base
from fastmerge.methods.trajectory import Trajectory
from fastmerge.training import Learner, Phase, Train


class PostHoc:
    """Between tasks it keeps the merged model (theta) and, as rule and protocol need them, theta_init (`initial`), the
    un-merged model (`trained`), and the rule's state. `previous`: the merged model during a task."""

    def __init__(self, learner: Learner, trajectory: Trajectory, rule: str, protocol: str):
        self.learner, self.trajectory, self.protocol = learner, trajectory, protocol
        self.init = learner.config.training.init if protocol == "full" else "sequential"
        base = Base.of(learner.flat, learner.seed_for("rule", rule))
        self.initial = base.theta if RULES[rule][0].needs_base or self.init == "independent" else None
        if self.initial is None:
            base.theta = learner.theta  # the rule reads its shape only
        self.rule = build_rule(rule, base, learner.config)
        self.trained: Tensor | None = None
        self.previous: Tensor | None = None

    def begin(self, task: Task) -> None:
        theta = self.learner.theta
        if task.index and self.protocol == "running":
            self.previous = self.rule.unscaled(theta)
        if task.index and self.protocol == "strict":
            self.previous = theta.clone()
        if self.init == "independent":
            theta.copy_(self.initial)
        elif self.trained is not None:
            theta.copy_(self.trained)
            self.trained = None

    def train(self, task: Task, images: TaskImages) -> Phase:
        if self.protocol == "strict":
            return Train(self.learner, task, images)
        return self.trajectory.train(self.learner, task, images, self.init)

    def merge(self, task: Task, images: TaskImages) -> Phase:
        return Merge(self, task, images)

    def state_dict(self) -> dict[str, Tensor]:
        kept = {"theta": self.learner.theta, "trained": self.trained, "previous": self.previous}
        if self.initial is not None:
            kept["initial"] = self.initial
        return joined(own={k: v for k, v in kept.items() if v is not None}, rule=self.rule.state_dict())

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        own, device = select(tensors, "own"), self.learner.device
        self.learner.theta.copy_(own["theta"])
        if self.initial is not None:
            self.initial.copy_(own["initial"])
        self.trained, self.previous = (own[k].to(device) if k in own else None for k in ("trained", "previous"))
        self.rule.load_state_dict(select(tensors, "rule"))


class Merge:
    """The merging phase: steps only where the rule needs a Fisher."""

    name = "merge"

    def __init__(self, method: PostHoc, task: Task, images: TaskImages):
        self.method, self.task = method, task
        self.adapted = self.fisher = None
        if method.rule.needs_fisher:
            learner, rank = method.learner, method.learner.config.training.lora_rank
            # of LoRA's weights alone: elsewhere the models are equal, whatever the Fisher
            self.adapted = learner.adapted(rank) if rank else None
            self.fisher = FisherPass(learner, task, images, adapted=self.adapted)
        self.steps = self.fisher.steps if self.fisher else 0
        self.batches = self.fisher.batches if self.fisher else None

    def step(self, i: int) -> dict[str, Tensor]:
        return self.fisher.step(i)

    @torch.no_grad()
    def finish(self) -> None:
        method, rule, theta = self.method, self.method.rule, self.method.learner.theta
        fisher = self.fisher.finish() if self.fisher else None
        if self.adapted:
            part, fisher = fisher, torch.zeros_like(theta)
            self.adapted.scatter(part, fisher)
        if method.previous is not None:
            rule.restart(method.previous)
            method.previous = None
        rule.update(theta, fisher)
        if method.protocol != "strict" and method.init == "sequential":
            method.trained = theta.clone()
        if method.protocol != "strict" or self.task.index:  # strict: the first task's model stays as it is
            rule.merged(out=theta)
        if method.protocol != "full":
            rule.forget()

    def tensors(self) -> dict[str, Tensor]:
        return self.fisher.tensors() if self.fisher else {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        if self.fisher:
            self.fisher.load(tensors)
