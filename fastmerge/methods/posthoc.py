"""Post-hoc merging: any rule of `fastmerge.merging` applied after every task, under one of three storage protocols.

    python -m fastmerge --method ties magmax average --protocol full running strict
    python -m fastmerge --method magmax --protocol full --init independent

protocol  training of task t starts at              the rule merges                         (TRM, Figure 1)
full      the un-merged theta_{t-1}, or theta_init  theta_1, ..., theta_t                   A
running   the un-merged theta_{t-1}                 the merge of t - 1 tasks, and theta_t   B
strict    the merged theta_{t-1}                    theta_{t-1} and theta_t; from t = 2 on  C

Under `running` the rule takes the merged task vector without the rule's scale, as in MagMax's code. So MagMax and task
arithmetic give the same result as under `full`. Under `strict` only the merged model exists. Even under `full` most
rules keep no models, because sums over them are enough; `merging/keeps_all.py` is the base of those that do.

With `--lora-rank` a rule merges the vector of the adapted weights, each projection one tensor: a density is a share of what
can move, and a norm is a norm of it. It keeps vectors of that length.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmerge.checkpoint import joined, select
from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.fisher_pass import FisherPass
from fastmerge.merging import RULES, build_rule
from fastmerge.merging.rule import Base
from fastmerge.methods.method import Method, Tensors
from fastmerge.methods.trajectory import Trajectory
from fastmerge.models.backbone import Backbone
from fastmerge.models.lora import Projections
from fastmerge.moments_pass import MomentsPass
from fastmerge.training import Learner, Phase, Train


class PostHoc(Method):
    """It keeps what rule and protocol need: theta_init (`initial`), the un-merged model (`trained`), and the rule's state.
    During a task: `previous`, the merged model of the previous tasks. `method_of(rule)` makes a rule's class."""

    rule_name: ClassVar[str]

    def __init__(self, learner: Learner, trajectory: Trajectory | None, rule: str, protocol: str):
        super().__init__(learner)
        self.shared, self.protocol = trajectory, protocol
        self.init = learner.config.training.init if protocol == "full" else "sequential"
        rank = learner.config.training.lora_rank
        # with LoRA the rule sees the weights that move and no others: a fraction or a norm is one of what moved
        self.adapted = learner.adapted(rank)
        base = Base.of(
            self.adapted if isinstance(self.adapted, Projections) else learner.flat, learner.seed_for("rule", rule)
        )
        self.initial = base.theta if RULES[rule].needs_base or self.init == "independent" else None
        if self.initial is None:
            base.theta = self.weights()  # the rule reads only its shape
        self.rule = build_rule(rule, base, learner.config)
        self.trained: Tensor | None = None

    def weights(self) -> Tensor:
        """What the rule merges, `[m]`: the model itself, or a copy of its adapted weights."""
        theta = self.learner.theta
        return self.adapted.gather(theta) if isinstance(self.adapted, Projections) else theta

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        rule = RULES[cls.rule_name]
        rule.check(*(getattr(config, group) for group in rule.groups))

    @classmethod
    def build(cls, learner: Learner, trajectory: Trajectory, protocol: str | None) -> PostHoc:
        assert protocol is not None
        return cls(learner, trajectory, cls.rule_name, protocol)

    @classmethod
    def protocols(cls, config: Config) -> tuple[str | None, ...]:
        return config.training.protocol

    @classmethod
    def trajectory(cls, config: Config, protocol: str | None) -> str | None:
        return {"full": config.training.init, "running": "sequential"}.get(protocol or "")

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        return int(RULES[cls.rule_name].needs_fisher or RULES[cls.rule_name].needs_moments)

    def begin(self, task: Task) -> Tensors:
        during = {}
        if task.index and self.protocol == "running":
            during["previous"] = self.rule.unscaled(self.weights())
        if task.index and self.protocol == "strict":
            during["previous"] = self.weights().clone()
        if self.init == "independent" and self.initial is not None:
            self.adapted.scatter(self.initial, self.learner.theta)
        elif self.trained is not None:
            self.adapted.scatter(self.trained, self.learner.theta)
            self.trained = None
        return during

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        if self.protocol == "strict" or self.shared is None:
            return Train(self.learner, task, images)
        return self.shared.train(self.learner, task, images, self.init)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Merge(self, task, images, during.get("previous"))

    def state_dict(self) -> Tensors:
        kept = {"trained": self.trained, "initial": self.initial}
        return joined(own={k: v for k, v in kept.items() if v is not None}, rule=self.rule.state_dict())

    def load_state_dict(self, tensors: Tensors) -> None:
        own = select(tensors, "own")
        if self.initial is not None:
            self.initial.copy_(own["initial"])
        self.trained = own["trained"].to(self.learner.device) if "trained" in own else None
        self.rule.load_state_dict(select(tensors, "rule"))


def method_of(name: str) -> type[PostHoc]:
    """The method that applies the rule `name` of `RULES`; its class attributes follow from the rule's."""
    rule = RULES[name]
    fisher = ("fisher",) if rule.needs_fisher else ()
    facts = {"rule_name": name, "groups": tuple(dict.fromkeys((*rule.groups, *fisher)))}
    return type(f"PostHoc{rule.__name__}", (PostHoc,), facts)


class Merge(Phase):
    """The merging phase; it has steps only if the rule needs a pass over the images. previous: merge of the previous tasks,
    `[m]`."""

    name = "merge"

    def __init__(self, method: PostHoc, task: Task, images: TaskImages, previous: Tensor | None):
        self.method, self.task, self.previous = method, task, previous
        learner, rule, adapted = method.learner, method.rule, method.adapted
        self.fisher = FisherPass(learner, task, images, adapted=adapted) if rule.needs_fisher else None
        names = {block.name for block in adapted.blocks} if isinstance(adapted, Projections) else None
        self.moments = MomentsPass(learner, task, images, names) if rule.needs_moments else None
        self.over = self.fisher or self.moments
        self.steps = self.over.steps if self.over else 0
        self.batches = self.over.batches if self.over else None

    def step(self, i: int) -> dict[str, Tensor]:
        return self.over.step(i) if self.over else {}

    def about(self) -> Any:
        """What the rule needs of the data: the Fisher `[m]`, or the moments by the number of the tensor."""
        if self.fisher:
            return self.fisher.result()
        if not self.moments:
            return None
        found, axes = self.moments.result(), self.moments.axes
        names = enumerate(self.method.rule.base.names)
        return {k: (axes[name], found[name]) for k, name in names if name in found}

    @torch.no_grad()
    def finish(self) -> None:
        method, rule, weights = self.method, self.method.rule, self.method.weights()
        about = self.about()
        if self.previous is not None:
            rule.restart(self.previous)
            self.previous = None
        rule.update(weights, about)
        if method.protocol != "strict" and method.init == "sequential":
            method.trained = weights.clone()
        if method.protocol != "strict" or self.task.index:  # strict: the first task's model stays as it is
            rule.merged(out=weights)
            if isinstance(method.adapted, Projections):
                method.adapted.scatter(weights, method.learner.theta)
        if method.protocol != "full":
            rule.forget()

    def tensors(self) -> dict[str, Tensor]:
        return self.over.tensors() if self.over else {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        if self.over:
            self.over.load(tensors)
