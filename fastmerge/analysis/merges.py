"""Every merge of two models that were trained one after the other (TRM, Section 3.2: theta_0, theta_1 and theta_{0,1}^f).

theta_0 is trained on the scenario's first task from theta_init, and theta_1 on its second task from theta_0. A merge is
the model that `--method NAME --protocol strict` has after the second task. All start from the same theta_0 and theta_1, so
TRM does not merge its first task (`--trm.merge-first` has no effect).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmerge.analysis.stages import Stages, work
from fastmerge.config import Config
from fastmerge.errors import UserError, nearest
from fastmerge.merging import RULES
from fastmerge.methods import METHODS
from fastmerge.methods.posthoc import PostHoc
from fastmerge.methods.trm import TRM
from fastmerge.plan import read_method, training_changes
from fastmerge.setup import Setup

NAMES = ("trm", *RULES)
CHUNK = 1 << 22  # elements that are converted to float64 at a time


class Merges:
    """theta_init, theta_0 and theta_1, `[n]` each: `initial`, `first`, `second`.

    specs: of the merges, NAME or NAME:SETTING=VALUE,... with a name of NAMES. count: how many tasks the caller looks at, at
    least 2. stages: its learner has the weights theta_1 at first. images: the training images of both tasks.

    Raises:
        UserError: no such merge, a setting that it does not take, or a backbone that it cannot serve.
    """

    def __init__(self, setup: Setup, specs: Sequence[str], count: int = 2):
        self.chosen = [(spec, *chosen(spec, setup.config)) for spec in specs]
        if len(set(specs)) < len(specs):
            raise UserError(f"--method {' '.join(specs)}: expected each merge once")
        for _, name, config in self.chosen:
            METHODS[name].check(config, setup.backbone)
        self.stages = Stages(setup, TRM, count)  # its training phase is plain fine-tuning
        theta = self.stages.learner.theta
        self.initial = theta.clone()
        images = self.stages.train(0)
        self.first = theta.clone()
        self.images = (images, self.stages.train(1))
        self.second = theta.clone()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The merges with their specs; each is a new tensor `[n]`. The learner has its weights then."""
        for spec, name, config in self.chosen:
            yield spec, self.merge(name, config)

    def merge(self, name: str, config: Config) -> Tensor:
        stages, learner = self.stages, self.stages.learner
        command, learner.config = learner.config, config
        learner.theta.copy_(self.initial)
        method = TRM(learner) if name == "trm" else PostHoc(learner, None, name, "strict")
        learner.theta.copy_(self.first)
        if name != "trm":
            work(method.merge(stages.tasks[0], self.images[0], {}))  # changes no weights
        during = method.begin(stages.tasks[1])
        learner.theta.copy_(self.second)
        work(method.merge(stages.tasks[1], self.images[1], during))
        learner.config = command
        return learner.theta.clone()


def chosen(spec: str, config: Config) -> tuple[str, Config]:
    """The name of a merge and the config that it reads. Raises UserError as `Merges`."""
    name = spec.partition(":")[0]
    if name not in NAMES:
        raise UserError(f"--method {spec}: expected one of {', '.join(NAMES)}.{nearest(name, NAMES)}")
    name, its = read_method(spec, config)
    if shared := [setting for setting in training_changes(its, config) if setting != "merge_epochs"]:
        flag = shared[0].replace("_", "-")
        raise UserError(f"--method {spec}: all merges are of the same two models; give --{flag} to the command instead")
    return name, its


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b> in float64."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return float(torch.stack([torch.dot(x.double(), y.double()) for x, y in parts]).sum())
