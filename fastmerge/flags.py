"""From a command line to a checked `Config`: flags, config files, and defaults that depend on other settings.

python -m fastmerge --help
python -m fastmerge --config runs/glyphs-cil5-tiny/config.json --seeds 0 1 2     # flags override the file
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from fastmerge.config import PLAIN_GROUPS, Config, check, declarations, flag_of, to_dict
from fastmerge.errors import UserError, nearest


@functools.cache
def given_type() -> Any:
    """`Config` as a command line gives it: a setting whose default depends on others is None until `resolve` fills it."""
    groups = []
    for group, kind in get_type_hints(Config).items():
        fields = []
        for name, hint in get_type_hints(kind).items():
            declaration, default = declarations()[group][name]
            shown = declaration.default_text(default)
            about = tyro.conf.arg(
                help=declaration.help_text(), help_behavior_hint=f"(default: {shown})" if declaration.late else None
            )
            if declaration.late:
                hint, default = hint | None, None
            fields.append((name, Annotated[hint, about], dataclasses.field(default=default)))
        made = dataclasses.make_dataclass(f"{kind.__name__}", fields)
        # the flags are --dataset, not --data.dataset; the groups remain in --help
        group_type: Any = Annotated[(made, tyro.conf.OmitArgPrefixes)] if group in PLAIN_GROUPS else made
        groups.append((group, group_type, dataclasses.field(default_factory=made)))
    return dataclasses.make_dataclass("Given", groups)


def resolve(given: Any) -> Config:
    """Fill the defaults that depend on other settings, and check the values. given: an instance of `given_type()`.

    Raises:
        UserError: naming the flag, what was given, and what was expected.
    """
    values = {group: vars(getattr(given, group)).copy() for group in declarations()}
    data, scenario, model, run = (values[g] for g in ("data", "scenario", "model", "run"))
    if model["model"] is None:
        model["model"] = "tiny" if data["dataset"] == "glyphs" else "ViT-B-16-quickgelu"
    if model["pretrained"] is None:
        known = {"tiny": "glyphs", "ViT-B-16-quickgelu": "openai"}
        if model["model"] not in known:
            raise UserError(
                f"--pretrained is not given for --model {model['model']}: give a tag, a checkpoint file, "
                "or none for random weights"
            )
        model["pretrained"] = known[model["model"]]
    for group, settings in declarations().items():
        for name, (declaration, default) in settings.items():
            if declaration.tiny is not None and values[group][name] is None:
                values[group][name] = declaration.tiny if model["model"] == "tiny" else default
    if scenario["tasks"] is None and scenario["scenario"] == "cil" and data["dataset"] == "glyphs":
        scenario["tasks"] = 5  # of other data sets, `settled` decides when their classes are known
    if scenario["class_order"] is None:  # the permutation of 1993 is a convention for classes, not for domains
        scenario["class_order"] = "natural" if scenario["scenario"] == "dil" else "1993"
    if run["run_dir"] is None:
        name = f"{data['dataset']}-{scenario['scenario']}{scenario['tasks'] or ''}-{model['model']}"
        run["run_dir"] = str(Path("runs") / name.replace("/", "_"))
    config = Config(**{group: kind(**values[group]) for group, kind in get_type_hints(Config).items()})
    check(config)
    return config


DEFAULT_TASKS = 10


def settled(config: Config, classes: int) -> Config:
    """`config` with the default that depends on the data: the number of tasks of a class-incremental run. A task of a single
    class has nothing to learn (its loss is over its own classes), so a task has two classes or more by default."""
    if config.scenario.tasks is not None or config.scenario.scenario != "cil":
        return config
    tasks = min(DEFAULT_TASKS, max(1, classes // 2))
    return dataclasses.replace(config, scenario=dataclasses.replace(config.scenario, tasks=tasks))


def as_flags(values: dict[str, Any], source: str) -> list[str]:
    """The flags for the settings of a `config.json`, so that a file passes the same checks as the command line.

    Raises:
        UserError: an unknown group or setting, with the nearest names.
    """
    flags, groups = [], declarations()
    for group, settings in values.items():
        if group not in groups or not isinstance(settings, dict):
            raise UserError(
                f"{source}: unknown group {group!r}; expected {', '.join(groups)}, each an object.{nearest(group, groups)}"
            )
        known = groups[group]
        for name, value in settings.items():
            if name not in known:
                raise UserError(f"{source}: unknown setting {group}.{name}.{nearest(name, known)}")
            flag = flag_of(group, name)
            if isinstance(value, list):
                flags += [f"--{flag}", *map(str, value)]
            elif isinstance(value, bool) and name != "flip":  # flip has three values, so it is no on/off flag
                flags += [f"--{flag}" if value else "--" + re.sub(r"([^.]+)$", r"no-\1", flag)]
            elif value is not None:  # None leaves the default that depends on other settings
                flags += [f"--{flag}", str(value)]
    return flags


def changed(config: Config, changes: dict[str, dict[str, str]], source: str) -> Config:
    """`config` with the settings of `changes[group][name]`, given as text; checked as flags are.

    Raises:
        UserError: a value that the setting does not take.
    """
    values = json.loads(json.dumps(to_dict(config)))
    for group, settings in changes.items():
        for name, text in settings.items():
            field_type = type(values[group][name])
            if field_type is bool and text.lower() not in ("true", "false"):
                raise UserError(f"{source}: {group}.{name} is true or false, not {text!r}")
            values[group][name] = text.lower() == "true" if field_type is bool else text
    try:
        return resolve(tyro.cli(given_type(), args=as_flags(values, source), console_outputs=False))
    except SystemExit:
        raise UserError(
            f"{source}: a value does not fit; python -m fastmerge --help lists what each setting takes"
        ) from None


def parse(argv: Sequence[str] | None = None) -> Config:
    """Flags over `--config FILE` over defaults; resolved and checked. Bad flags exit with code 2 and say why."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    known, rest = pre.parse_known_args(argv)
    if known.config is not None:
        try:
            values = json.loads(Path(known.config).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"--config {known.config}: cannot be read ({error}); expected the config.json of a run"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"--config {known.config}: expected an object of groups, as in the config.json of a run")
        rest = [*as_flags(values, f"--config {known.config}"), *rest]
    given = tyro.cli(
        given_type(),
        args=rest,
        prog="fastmerge",
        description="Continual learning by model merging: train task after task, end with one model. "
        "--config FILE takes settings from a JSON file such as a run's config.json; flags override it.",
    )
    return resolve(given)
