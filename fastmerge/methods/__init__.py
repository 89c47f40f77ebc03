"""Continual-learning methods, one file each. `METHODS` and `RULES` are the only registries: name -> class.

A method is built with the `Learner`, and has
    begin(task)                             a task begins: put the model where its training starts
    train(task, images) -> Phase | None     the training phase of a task, None where nothing is trained
    merge(task, images) -> Phase | None     the merging phase after it, None where there is none
    state_dict() / load_state_dict()        everything it keeps, the model included: the loop saves this and nothing else,
                                            so what a method stores between tasks can be measured, and cannot hide
`merge` is also where a rule without steps works: a Phase with steps = 0 that merges in `finish()`.

A merge rule of `fastmerge.merging` is one method per storage protocol (`posthoc.py`), called RULE-PROTOCOL.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastmerge.config import Config, changed
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Scenario, Task
from fastmerge.errors import UserError, nearest
from fastmerge.merging import RULES
from fastmerge.methods.cmm import CMM
from fastmerge.methods.ewc import EWC
from fastmerge.methods.finetune import Finetune, Joint
from fastmerge.methods.lwf import LwF
from fastmerge.methods.nearest_mean import NearestMean
from fastmerge.methods.pam import PAM
from fastmerge.methods.posthoc import PostHoc
from fastmerge.methods.trajectory import Trajectory
from fastmerge.methods.trm import TRM
from fastmerge.training import Learner, Phase


class Method(Protocol):
    def begin(self, task: Task) -> None: ...

    def train(self, task: Task, images: TaskImages) -> Phase | None: ...

    def merge(self, task: Task, images: TaskImages) -> Phase | None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None: ...


METHODS = {
    "trm": TRM,
    "cmm": CMM,
    "pam": PAM,
    "finetune": Finetune,
    "joint": Joint,
    "lwf": LwF,
    "ewc": EWC,
    "nearest-mean": NearestMean,
}


@dataclass(frozen=True)
class Run:
    """One method with one seed. epochs: how often its phases see a task's images, for the time left.

    config: the command's, with the settings that `--method NAME:SETTING=VALUE` gives this method. trajectory: the un-merged
    training it can share, 'sequential' or 'independent', None where training depends on a merge.
    """

    label: str  # name in tables and of its folder
    method: str  # name in METHODS, or of a merge rule
    protocol: str | None
    seed: int
    config: Config
    scenario: Scenario
    epochs: dict[str, int]
    trajectory: str | None


def groups(name: str) -> tuple[str, ...]:
    """The groups of settings that are a method's own."""
    fisher = ("fisher",) if name in ("ewc", "cofima") else ()
    own = RULES[name][1] if name in RULES else (name,)
    return tuple(g for g in (*own, *fisher) if hasattr(Config(), g))


def read_method(spec: str, config: Config) -> tuple[str, Config]:
    """NAME or NAME:SETTING=VALUE,... -> the method's name, and `config` with these settings of its own.

    Raises:
        UserError: an unknown method or setting, with the nearest names; a value that the setting does not take.
    """
    name, _, rest = spec.partition(":")
    known = [*METHODS, *RULES]
    if name not in known:
        raise UserError(f"unknown method {name!r}.{nearest(name, known)} There are: {', '.join(known)}.")
    if config.training.lora_rank and name in ("ewc", "cmm"):
        raise UserError(f"--lora-rank: {name} works on all weights; leave it out, or leave {name} out of --method")
    changes: dict[str, dict[str, str]] = {}
    for pair in filter(None, rest.split(",")):
        setting, equals, value = pair.partition("=")
        setting = setting.strip().replace("-", "_")
        mine = {s: g for g in groups(name)[::-1] for s in vars(getattr(config, g))}
        if not equals or setting not in mine:
            hint = f" Its settings are: {', '.join(mine)}." if mine else f" {name} has no settings of its own."
            raise UserError(
                f"--method {spec}: expected {name}:SETTING=VALUE, got {pair!r}.{nearest(setting, mine)}{hint}"
            )
        changes.setdefault(mine[setting], {})[setting] = value.strip()
    return name, changed(config, changes, f"--method {spec}") if changes else config


def plan(config: Config, scenario: Scenario) -> list[Run]:
    """The runs that a command stands for, in the order in which they run."""
    runs = []
    for seed in config.training.seeds:
        trained = set()  # by a run before, which shares it
        for spec in config.training.method:
            name, its = read_method(spec, config)
            for protocol in config.training.protocol if name in RULES else (None,):
                shared = "sequential" if name == "finetune" or protocol == "running" else None
                shared = config.training.init if protocol == "full" else shared
                train = 0 if name == "nearest-mean" or shared in trained else config.training.epochs
                fisher = name == "ewc" or (name in RULES and RULES[name][0].needs_fisher)
                searches = {"trm": config.training.merge_epochs, "cmm": its.cmm.align_epochs, "pam": int(its.pam.merge)}
                epochs = {"train": train, "merge": searches.get(name, int(fisher))}
                trained |= {shared} - {None}
                label = "-".join(filter(None, (name, protocol))) + (
                    f"({spec.partition(':')[2]})" if ":" in spec else ""
                )
                own = scenario.joined() if name == "joint" else scenario
                runs.append(Run(label, name, protocol, seed, its, own, epochs, shared))
    return runs


def shared_trainings(runs: list[Run], keep: bool) -> set[str]:
    """Which un-merged trainings to write down: those that several runs of a seed share, all of them if they are kept."""
    counts = Counter((run.trajectory, run.seed) for run in runs if run.trajectory)
    return {name for (name, _), n in counts.items() if n > 1 or keep}


def build_method(run: Run, learner: Learner, trajectory: Trajectory) -> Method:
    """The method of a run."""
    if run.protocol:
        return PostHoc(learner, trajectory, run.method, run.protocol)
    return Finetune(learner, trajectory) if run.method == "finetune" else METHODS[run.method](learner)
