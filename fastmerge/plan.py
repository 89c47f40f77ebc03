"""Turn a command into runs: one per method, protocol and seed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmerge.config import FREE, Config
from fastmerge.data.scenario import Scenario
from fastmerge.errors import UserError, nearest
from fastmerge.flags import changed
from fastmerge.methods import METHODS
from fastmerge.methods.posthoc import AXES, ZERO_SHOT
from fastmerge.report import BASELINE
from fastmerge.results import folder_name
from fastmerge.training import PHASES

if TYPE_CHECKING:
    from fastmerge.continuing import Earlier


@dataclass(frozen=True)
class Run:
    """One method with one seed. epochs: epochs of each phase, to estimate the time left.

    config: the command's config, changed by `--method NAME:SETTING=VALUE`. trajectory: the un-merged training that the
    run can share, 'sequential' or 'independent' and `variant`, or None if training depends on a merge. variant: the settings
    of training that it has in place of the command's, in words. beside: test images of other accuracies than those on the
    tasks seen, in every task.
    """

    label: str  # names the run in tables
    method: str  # name in METHODS
    protocol: str | None
    seed: int
    config: Config
    scenario: Scenario
    epochs: dict[str, int]
    trajectory: str | None
    variant: str = ""
    beside: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return folder_name(self.label, self.seed)


def read_method(spec: str, config: Config) -> tuple[str, Config]:
    """Parse NAME or NAME:SETTING=VALUE,... into the method's name and `config` with these settings: the method's own, or
    those of training. Where both have one (`trm:lr`), the name is the method's, and `trm:training.lr` is the other.

    Raises:
        UserError: the method or setting is unknown (the message suggests names), or the value is not allowed.
    """
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}.{nearest(name, METHODS)} There are: {', '.join(METHODS)}.")
    mine = row_settings(name, named_rules(name, rest, config))
    changes: dict[str, dict[str, str]] = {}
    for pair in _pairs(rest):
        setting, equals, value = pair.partition("=")
        setting = setting.replace("-", "_")
        if setting in mine and not equals:
            raise UserError(f"--method {spec}: {setting} needs a value, as in {name}:{setting}=VALUE")
        if setting not in mine:
            short = [known for known in mine if "." not in known]
            hint = f" Its settings are: {', '.join(short)}." if mine else f" {name} has no settings."
            raise UserError(
                f"--method {spec}: expected {name}:SETTING=VALUE, got {pair!r}.{nearest(setting, mine)}{hint}"
            )
        group, known = mine[setting]
        if known in changes.setdefault(group, {}):
            raise UserError(f"--method {spec}: {setting} is given twice; expected each setting once")
        changes[group][known] = value
    its = changed(config, changes, f"--method {spec}") if changes else config
    for axis, names in AXES.items():
        if (given := getattr(its.training, axis)) is not None and given not in names:
            flag = f"--{axis.replace('_', '-')}"
            raise UserError(f"{flag} {given}: expected one of {', '.join(names)}.{nearest(given, names)}")
    if its.training.lora_rank and not METHODS[name].lora:
        raise UserError(f"--lora-rank: {name} does not read it; omit --lora-rank, or remove {name} from --method")
    if its.training.prompt_length and not METHODS[name].lora:
        raise UserError(f"--prompt-length: {name} does not train prefixes; omit it, or remove {name} from --method")
    if its.training.prompt_length and its.training.lora_rank:
        raise UserError("--prompt-length and --lora-rank: each says what is trained; give one of them")
    return name, its


def _pairs(rest: str) -> list[str]:
    """The parts SETTING=VALUE of a method's settings, without spaces around the words."""
    pairs = (pair.strip() for pair in rest.split(","))
    return ["=".join(word.strip() for word in pair.split("=", 1)) for pair in pairs if pair]


def label_of(spec: str, protocol: str | None) -> str:
    """What names a run in tables: NAME-PROTOCOL(SETTING=VALUE,...)."""
    name, _, rest = spec.partition(":")
    pairs = _pairs(rest)
    return "-".join(filter(None, (name, protocol))) + (f"({','.join(pairs)})" if pairs else "")


def named_rules(name: str, rest: str, config: Config) -> Config:
    """`config` with the rules that a row names, whose settings it may set then."""
    words = [pair.partition("=") for pair in _pairs(rest)]
    given = {setting.replace("-", "_"): value for setting, _, value in words}
    rules: dict[str, Any] = {axis: given[axis] for axis, known in AXES.items() if given.get(axis) in known}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **rules))


def row_settings(name: str, config: Config) -> dict[str, tuple[str, str]]:
    """What NAME:... may set -> (group, setting); also under the name group.setting. The method's own come first, then those
    of other rules that `config` names; what the method does not read is not among them."""
    method, found = METHODS[name], dict[str, tuple[str, str]]()
    read = method.groups_read(config)
    groups = dict.fromkeys([*(group for group in method.groups if group in read), *read])
    places = [(group, setting) for group in groups for setting in vars(getattr(config, group))]
    if method.trains:
        other = dataclasses.replace(config.training, merge_epochs=config.training.merge_epochs + 1, init_rule=ZERO_SHOT)
        changed_config = dataclasses.replace(config, training=other)
        unread = {"precision", "preset"}  # one for the command
        if method.merge_epochs(changed_config) == method.merge_epochs(config):
            unread.add("merge_epochs")
        if method.trajectory(changed_config, "full") != "independent":
            unread |= AXES.keys()
        if not method.lora:
            unread |= {"lora_rank", "prompt_length"}
        places += [("training", s) for s in vars(config.training) if f"training.{s}" not in FREE and s not in unread]
    ignored = method.unread(config)
    for group, setting in places:
        if f"{group}.{setting}" in ignored:
            continue
        found.setdefault(setting, (group, setting))
        found[f"{group}.{setting}"] = (group, setting)
    return found


def training_changes(config: Config, command: Config) -> dict[str, Any]:
    """The settings of training that a run has in place of the command's."""
    theirs = vars(command.training)
    changes = {name: value for name, value in vars(config.training).items() if value != theirs[name]}
    return {name: value for name, value in changes.items() if f"training.{name}" not in FREE}


def _variant(config: Config, command: Config) -> str:
    """Names the un-merged training of a run beside that with the command's settings; runs with the same name train alike."""
    changes = training_changes(config, command).items()
    words = [f"{name}={value}" for name, value in changes if name not in ("merge_epochs", *AXES)]
    return f"({','.join(words)})" if words else ""


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
                shared, variant = method.trajectory(its, protocol), _variant(its, config)
                shared = shared and shared + variant
                train = method.train_epochs(its) if method.trains and shared not in trained else 0
                epochs = {"train": train, "merge": method.merge_epochs(its)}
                if shared:
                    trained.add(shared)
                label = label_of(spec, protocol)
                if any(run.label == label for run in runs if run.seed == seed):
                    raise UserError(f"--method {spec}: expected each method with the same settings once")
                own = scenario.joined() if method.joint else scenario
                runs.append(Run(label, name, protocol, seed, its, own, epochs, shared, variant))
    nearest = f"{BASELINE}-seed{config.training.seeds[0]}"
    if earlier is not None and not (earlier.path / nearest).exists():
        return runs  # it has no means of the earlier classes
    if config.training.nearest_mean and all(run.method != BASELINE for run in runs):
        nothing = {"train": 0, "merge": 0}
        runs.append(Run(BASELINE, BASELINE, None, config.training.seeds[0], config, scenario, nothing, None))
    return runs


def images_per_task(run: Run) -> list[dict[str, int]]:
    """The images to process in each task of a run, by kind of work; test images are those of the tasks seen and
    `beside`."""
    tests, rows = [len(task.test) for task in run.scenario.tasks], []
    for task in run.scenario.tasks:
        seen = sum(tests) if run.scenario.kind == "dil" else sum(tests[: task.index + 1])
        seen += run.beside[task.index] if run.beside else 0
        rows.append({kind: run.epochs[kind] * len(task.train) for kind in PHASES} | {"evaluate": seen})
    return rows


def shared_trainings(runs: list[Run], keep: bool) -> set[str]:
    """The un-merged trainings to save: those that several runs of a seed share, or all with `keep`."""
    counts = Counter((run.trajectory, run.seed) for run in runs if run.trajectory)
    return {name for (name, _), n in counts.items() if n > 1 or keep}
