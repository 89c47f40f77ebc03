"""Post-hoc merging: any rule of `fastmerge.merging` applied after every task, under one of three storage protocols.

    python -m fastmerge --method ties magmax average --protocol full running strict
    python -m fastmerge --method magmax --protocol full --init-rule zero-shot
    python -m fastmerge --method ema average:init_rule=ema ties:init_rule=ema,density=0.3 --protocol full

protocol  training of task t starts at              the rule merges                         (TRM, Figure 1)
full      the un-merged theta_{t-1}                 theta_1, ..., theta_t                   A
running   the un-merged theta_{t-1}                 the merge of t - 1 tasks, and theta_t   B
strict    the merged theta_{t-1}                    theta_{t-1} and theta_t; from t = 2 on  C

Under `running` the rule takes the merged task vector without the rule's scale, as in MagMax's code. So MagMax and task
arithmetic give the same result as under `full`. Under `strict` only the merged model exists. Even under `full` most
rules keep no models, because sums over them are enough; `merging/keeps_all.py` is the base of those that do.

Where training starts and what is deployed are two choices in TIME (Dziadzio et al., CVPR 2025, "How to Merge Your Multimodal
Models Over Time?", arXiv 2412.06712). The protocol says what a rule may see of the past, and these two which rule is meant:

--init-rule    training of task t starts at     --deploy-rule   evaluated and saved after task t
zero-shot      theta_init                       last            theta_t
last           the un-merged theta_{t-1}        RULE            the rule's merge, by default of the method's rule
RULE           the rule's merge of t - 1 tasks

Without `--init-rule` training starts as the first table says, and where `--deploy-rule` is given at the merge of the method's
rule. Two rules keep a state each: under `full` their sums, else their merged models. Under `strict` no un-merged model
is kept, so `last` is refused as a start. TIME's best choice, EMA for both, is `--method ema` under `strict`. We found no
released code; the paper's other starts and deployments are pairs of the two tables.

With `--lora-rank` a rule merges the vector of the adapted weights, each projection one tensor: a density is a share of what
can move, and a norm is a norm of it. It keeps vectors of that length.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastmerge.checkpoint import joined, select
from fastmerge.config import Config, declarations
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.merging import RULES, build_rule
from fastmerge.merging.rule import Base, Rule
from fastmerge.methods.method import Method, Tensors
from fastmerge.methods.trajectory import Trajectory
from fastmerge.models.lora import Projections
from fastmerge.moments_pass import MomentsPass
from fastmerge.training import Learner, Phase, Train

if TYPE_CHECKING:
    from fastmerge.models.backbone import Backbone


LAST, ZERO_SHOT = "last", "zero-shot"
AXES = {"init_rule": (ZERO_SHOT, LAST, *RULES), "deploy_rule": (LAST, *RULES)}


def axes(rule: str, protocol: str, config: Config) -> tuple[str, str]:
    """Where training starts and what is deployed, for the method of `rule`: one of `AXES` each."""
    given = config.training
    own = rule if protocol == "strict" or given.deploy_rule else LAST
    return given.init_rule or own, given.deploy_rule or rule


def rules_of(rule: str, protocol: str, config: Config) -> list[str]:
    """The rules that merge: of the start and of the deployment, each once."""
    return [name for name in dict.fromkeys(axes(rule, protocol, config)) if name in RULES]


def training_of(rule: str, protocol: str, config: Config) -> str | None:
    """Names the training, which methods that start alike share; None if it starts at the merge by the method's rule."""
    start, deploy = axes(rule, protocol, config)
    if start not in RULES:
        return {LAST: "sequential", ZERO_SHOT: "independent"}[start]
    if start == deploy and not config.training.init_rule:
        return None
    declared = declarations()
    places = [(group, name) for group in groups_of(start) for name in declared[group]]
    values = {f"{g}.{n}": getattr(getattr(config, g), n) for g, n in places}
    words = [f"{g}.{n}={values[f'{g}.{n}']}" for g, n in places if values[f"{g}.{n}"] != declared[g][n][1]]
    return f"{protocol}-{start}" + (f"({','.join(words)})" if words else "")


class PostHoc(Method):
    """It keeps what rules and protocol need: theta_init (`initial`), the un-merged model (`trained`), the merged model where
    training starts if it is not the deployed one (`start`), and the rules' states. During a task: `previous` and
    `previous_start`, the two rules' merged models of the previous tasks. `method_of(rule)` makes a rule's class."""

    rule_name: ClassVar[str]

    def __init__(self, learner: Learner, trajectory: Trajectory | None, rule: str, protocol: str):
        super().__init__(learner)
        config = learner.config
        self.shared, self.protocol = trajectory, protocol
        self.init, self.deploy = axes(rule, protocol, config)
        self.training = training_of(rule, protocol, config)
        # with LoRA the rule sees the weights that move and no others: a fraction or a norm is one of what moved
        self.adapted = learner.adapted(config.training.lora_rank)
        base = Base.of(self.adapted if isinstance(self.adapted, Projections) else learner.flat, seed=0)
        names = rules_of(rule, protocol, config)
        keeps = self.init == ZERO_SHOT or any(RULES[name].needs_base for name in names)
        self.initial = base.theta if keeps else None
        if self.initial is None:
            base.theta = self.weights()  # the rules read only its shape
        bases = {name: dataclasses.replace(base, seed=learner.seed_for("rule", name)) for name in names}
        self.rules: dict[str, Rule] = {name: build_rule(name, bases[name], config) for name in names}
        self.trained: Tensor | None = None
        self.start: Tensor | None = None

    def weights(self) -> Tensor:
        """What the rules merge, `[m]`: the model itself, or a copy of its adapted weights."""
        theta = self.learner.theta
        return self.adapted.gather(theta) if isinstance(self.adapted, Projections) else theta

    def role(self, name: str, of: str) -> str:
        """The name of a tensor, or of tensors, of the rule `name`, among those of both rules."""
        return of if name == self.deploy else f"{of}_start"

    def place(self, weights: Tensor) -> None:
        """Put `weights` `[m]` into the model."""
        self.adapted.scatter(weights, self.learner.theta)

    @classmethod
    def build(cls, learner: Learner, trajectory: Trajectory, protocol: str | None) -> PostHoc:
        assert protocol is not None
        return cls(learner, trajectory, cls.rule_name, protocol)

    @classmethod
    def protocols(cls, config: Config) -> tuple[str | None, ...]:
        return config.training.protocol

    @classmethod
    def rules_read(cls, config: Config) -> list[str]:
        """The rules that merge under any of the protocols, each once."""
        return list(dict.fromkeys(n for p in config.training.protocol for n in rules_of(cls.rule_name, p, config)))

    @classmethod
    def groups_read(cls, config: Config) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group for name in cls.rules_read(config) for group in groups_of(name)))

    @classmethod
    def unread(cls, config: Config) -> set[str]:
        names = cls.rules_read(config)
        readers = {group: [name for name in names if group in groups_of(name)] for group in cls.groups_read(config)}
        unread = {setting for name in names for setting in RULES[name].unread}
        unread = {s for s in unread if all(s in RULES[name].unread for name in readers[s.partition(".")[0]])}
        return unread | super().unread(config)

    @classmethod
    def trajectory(cls, config: Config, protocol: str | None) -> str | None:
        return training_of(cls.rule_name, protocol or "", config)

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        rules = [RULES[name] for p in config.training.protocol for name in rules_of(cls.rule_name, p, config)]
        return int(any(rule.needs_fisher for rule in rules)) + int(any(rule.needs_moments for rule in rules))

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        if "strict" in config.training.protocol and config.training.init_rule == LAST:
            raise UserError(
                "--init-rule last: --protocol strict keeps no un-merged model where training could start; choose --protocol "
                "running or full, or start at zero-shot or at a rule's merge"
            )
        for rule in (RULES[name] for p in config.training.protocol for name in rules_of(cls.rule_name, p, config)):
            rule.check(*(getattr(config, group) for group in rule.groups))

    @staticmethod
    def kept(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor

    def begin(self, task: Task) -> Tensors:
        during, weights = dict[str, Tensor](), self.weights()
        for name, rule in self.rules.items():
            if not task.index and rule.begins_at_base:
                during[self.role(name, "previous")] = weights.clone()
            elif task.index and self.protocol != "full":
                merged = weights if name == self.deploy else self.kept(self.start)
                previous = rule.unscaled(merged) if self.protocol == "running" else merged.clone()
                during[self.role(name, "previous")] = previous
        if task.index and self.init != self.deploy:
            if self.init in self.rules and self.protocol == "full":
                self.place(self.rules[self.init].merged(out=torch.empty_like(weights)))
            else:
                self.place(self.kept({ZERO_SHOT: self.initial, LAST: self.trained}.get(self.init, self.start)))
            self.trained = self.start = None
        return during

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        if self.training is None or self.shared is None:
            return Train(self.learner, task, images)
        return self.shared.train(self.learner, task, images, self.training)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Merge(self, task, images, during)

    def state_dict(self) -> Tensors:
        kept = {"trained": self.trained, "initial": self.initial, "start": self.start}
        own = {name: tensor for name, tensor in kept.items() if tensor is not None}
        return joined(own=own, **{self.role(name, "rule"): rule.state_dict() for name, rule in self.rules.items()})

    def load_state_dict(self, tensors: Tensors) -> None:
        own = {name: tensor.to(self.learner.device) for name, tensor in select(tensors, "own").items()}
        if self.initial is not None:
            self.initial.copy_(own["initial"])
        self.trained, self.start = own.get("trained"), own.get("start")
        for name, rule in self.rules.items():
            rule.load_state_dict(select(tensors, self.role(name, "rule")))


def groups_of(name: str) -> tuple[str, ...]:
    """The groups of settings that the rule `name` reads."""
    return tuple(dict.fromkeys((*RULES[name].groups, *(("fisher",) if RULES[name].needs_fisher else ()))))


def method_of(name: str) -> type[PostHoc]:
    """The method that applies the rule `name` of `RULES`; its class attributes follow from the rule's."""
    facts = {"rule_name": name, "groups": groups_of(name)}
    return type(f"PostHoc{RULES[name].__name__}", (PostHoc,), facts)


class Merge(Phase):
    """The merging phase; it has steps only if a rule needs a pass over the images. during: see `PostHoc.begin`."""

    name = "merge"

    def __init__(self, method: PostHoc, task: Task, images: TaskImages, during: Tensors):
        self.method, self.task, self.during = method, task, during
        learner, adapted = method.learner, method.adapted
        rules = method.rules.values()
        needs_fisher, needs_moments = (
            any(getattr(r, f"needs_{what}") for r in rules) for what in ("fisher", "moments")
        )
        self.fisher = FisherPass(learner, task, images, adapted=adapted) if needs_fisher else None
        names = {block.name for block in adapted.blocks} if isinstance(adapted, Projections) else None
        self.moments = MomentsPass(learner, task, images, names) if needs_moments else None
        self.passes = [each for each in (self.fisher, self.moments) if each]
        self.steps = sum(each.steps for each in self.passes)
        self.batches = self.passes[0].batches if self.passes else None

    def step(self, i: int) -> dict[str, Tensor]:
        first = self.passes[0].steps
        return self.passes[0].step(i) if i < first else self.passes[1].step(i - first)

    def about(self) -> tuple[Tensor | None, Any]:
        """What the rules need of the data: the Fisher `[m]`, and the moments by the number of the tensor."""
        fisher = self.fisher.result() if self.fisher else None
        if not self.moments or not self.method.rules:
            return fisher, None
        found, axes = self.moments.result(), self.moments.axes
        names = enumerate(next(iter(self.method.rules.values())).base.names)
        return fisher, {k: (axes[name], found[name]) for k, name in names if name in found}

    @torch.no_grad()
    def finish(self) -> None:
        method, weights = self.method, self.method.weights()
        fisher, moments = self.about()
        for name, rule in method.rules.items():
            if (previous := self.during.get(method.role(name, "previous"))) is not None:
                rule.restart(previous)
            rule.update(weights, fisher if rule.needs_fisher else moments if rule.needs_moments else None)
        if method.init == LAST != method.deploy:
            method.trained = weights.clone()
        if method.init in method.rules and method.init != method.deploy and method.protocol != "full":
            method.start = weights.clone()
            self.write(method.init, method.start)
        if method.deploy in method.rules:
            self.write(method.deploy, weights)
            if isinstance(method.adapted, Projections):
                method.place(weights)
        if method.protocol != "full":
            for rule in method.rules.values():
                rule.forget()

    def write(self, name: str, out: Tensor) -> None:
        """Write the merge of the rule `name` over theta_t in `out`. strict: theta_1 stays as it is, unless the rule begins at
        theta_init."""
        rule = self.method.rules[name]
        if self.method.protocol != "strict" or self.task.index or rule.begins_at_base:
            rule.merged(out=out)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for each in self.passes for name, tensor in each.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for each in self.passes:
            each.load(tensors)
