"""Turn a command into runs: one per method, protocol and seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmerge.config import Config
from fastmerge.data.scenario import Scenario
from fastmerge.errors import UserError, nearest
from fastmerge.flags import changed
from fastmerge.methods import METHODS
from fastmerge.report import BASELINE

if TYPE_CHECKING:
    from fastmerge.continuing import Earlier


@dataclass(frozen=True)
class Run:
    """One method with one seed. epochs: epochs of each phase, to estimate the time left.

    config: the command's config, changed by `--method NAME:SETTING=VALUE`. trajectory: the un-merged training that the
    run can share, 'sequential' or 'independent', or None if training depends on a merge.
    """

    label: str  # names the run in tables, and its folder
    method: str  # name in METHODS
    protocol: str | None
    seed: int
    config: Config
    scenario: Scenario
    epochs: dict[str, int]
    trajectory: str | None


def read_method(spec: str, config: Config) -> tuple[str, Config]:
    """Parse NAME or NAME:SETTING=VALUE,... into the method's name and `config` with these settings.

    Raises:
        UserError: the method or setting is unknown (the message suggests names), or the value is not allowed.
    """
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}.{nearest(name, METHODS)} There are: {', '.join(METHODS)}.")
    method = METHODS[name]
    if config.training.lora_rank and not method.lora:
        raise UserError(f"--lora-rank: {name} works on all weights; omit --lora-rank, or remove {name} from --method")
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


def plan(config: Config, scenario: Scenario, earlier: Earlier | None = None) -> list[Run]:
    """The runs of a command, in execution order; the last one is the baseline of every table. earlier: what they continue.

    Raises:
        UserError: a method that has no next task continues.
    """
    runs: list[Run] = []
    for seed in config.training.seeds:
        trained: set[str] = set()  # un-merged trainings that an earlier run shares
        for spec in config.training.method:
            name, its = read_method(spec, config)
            method = METHODS[name]
            if earlier is not None and method.joint:
                raise UserError(f"--continue-from: {name} trains all tasks at once, so it has no next task; omit it")
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
    nearest = f"{BASELINE}-seed{config.training.seeds[0]}"
    if earlier is not None and not (earlier.path / nearest).exists():
        return runs  # it has no means of the earlier classes
    if config.training.nearest_mean and all(run.method != BASELINE for run in runs):
        nothing = {"train": 0, "merge": 0}
        runs.append(Run(BASELINE, BASELINE, None, config.training.seeds[0], config, scenario, nothing, None))
    return runs


def shared_trainings(runs: list[Run], keep: bool) -> set[str]:
    """The un-merged trainings to save: those that several runs of a seed share, or all with `keep`."""
    counts = Counter((run.trajectory, run.seed) for run in runs if run.trajectory)
    return {name for (name, _), n in counts.items() if n > 1 or keep}
