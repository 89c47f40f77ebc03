"""Which runs a command stands for: one per method, protocol and seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastmerge.config import Config
from fastmerge.data.scenario import Scenario
from fastmerge.errors import UserError, nearest
from fastmerge.flags import changed
from fastmerge.methods import METHODS
from fastmerge.report import BASELINE


@dataclass(frozen=True)
class Run:
    """One method with one seed. epochs: how often its phases see a task's images, for the time left.

    config: the command's, with the settings that `--method NAME:SETTING=VALUE` gives this method. trajectory: the un-merged
    training it can share, 'sequential' or 'independent', None where training depends on a merge.
    """

    label: str  # name in tables and of its folder
    method: str  # name in METHODS
    protocol: str | None
    seed: int
    config: Config
    scenario: Scenario
    epochs: dict[str, int]
    trajectory: str | None


def read_method(spec: str, config: Config) -> tuple[str, Config]:
    """NAME or NAME:SETTING=VALUE,... -> the method's name, and `config` with these settings of its own.

    Raises:
        UserError: an unknown method or setting, with the nearest names; a value that the setting does not take.
    """
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}.{nearest(name, METHODS)} There are: {', '.join(METHODS)}.")
    method = METHODS[name]
    if config.training.lora_rank and not method.lora:
        raise UserError(f"--lora-rank: {name} works on all weights; leave it out, or leave {name} out of --method")
    changes: dict[str, dict[str, str]] = {}
    for pair in filter(None, rest.split(",")):
        setting, equals, value = pair.partition("=")
        setting = setting.strip().replace("-", "_")
        mine = {s: g for g in method.groups[::-1] for s in vars(getattr(config, g))}
        if setting in mine and not equals:
            raise UserError(f"--method {spec}: {setting} needs a value, as in {name}:{setting}=VALUE")
        if setting not in mine:
            hint = f" Its settings are: {', '.join(mine)}." if mine else f" {name} has no settings of its own."
            raise UserError(
                f"--method {spec}: expected {name}:SETTING=VALUE, got {pair!r}.{nearest(setting, mine)}{hint}"
            )
        changes.setdefault(mine[setting], {})[setting] = value.strip()
    return name, changed(config, changes, f"--method {spec}") if changes else config


def plan(config: Config, scenario: Scenario) -> list[Run]:
    """The runs that a command stands for, in the order in which they run; the last is the baseline of every table."""
    runs: list[Run] = []
    for seed in config.training.seeds:
        trained: set[str] = set()  # un-merged trainings that a run before makes and shares
        for spec in config.training.method:
            name, its = read_method(spec, config)
            method = METHODS[name]
            for protocol in method.protocols(its):
                shared = method.trajectory(its, protocol)
                train = its.training.epochs if method.trains and shared not in trained else 0
                epochs = {"train": train, "merge": method.merge_epochs(its)}
                if shared:
                    trained.add(shared)
                label = "-".join(filter(None, (name, protocol))) + (
                    f"({spec.partition(':')[2]})" if ":" in spec else ""
                )
                own = scenario.joined() if method.joint else scenario
                runs.append(Run(label, name, protocol, seed, its, own, epochs, shared))
    if config.training.nearest_mean and all(run.method != BASELINE for run in runs):
        nothing = {"train": 0, "merge": 0}
        runs.append(Run(BASELINE, BASELINE, None, config.training.seeds[0], config, scenario, nothing, None))
    return runs


def shared_trainings(runs: list[Run], keep: bool) -> set[str]:
    """Which un-merged trainings to write down: those that several runs of a seed share, all of them if they are kept."""
    counts = Counter((run.trajectory, run.seed) for run in runs if run.trajectory)
    return {name for (name, _), n in counts.items() if n > 1 or keep}
