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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from fastmerge import presets
from fastmerge.config import EMBEDDED, LATER_CLASSES, Config, check, declarations, flag_of, no_flag_of, to_dict
from fastmerge.errors import UserError, nearest
from fastmerge.help import help_all, help_first

Given = dict[str, dict[str, Any]]  # group -> setting -> value, only what was given


class Parser(argparse.ArgumentParser):
    """Turns a wrong flag into a `UserError` of one line."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1 ", message).replace("expected one argument", "needs a value")
        raise UserError(f"{message} (fastmerge --help-all lists what each setting takes)")


def reader(hint: Any) -> Callable[[str], Any]:
    """A function from text to a value of this type; the text None gives None."""
    kinds = get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)

    def read(text: str) -> Any:
        expected = []
        for kind in kinds:
            if kind is type(None) and text == "None":
                return None
            if kind is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if get_origin(kind) is Literal:
                if text in get_args(kind):
                    return text
                expected.append(f"expected {' | '.join(get_args(kind))}{nearest(text, get_args(kind))}")
            elif kind in (int, float):
                try:
                    return kind(text)
                except ValueError:
                    expected.append("expected a whole number" if kind is int else "expected a number")
            elif kind is bool:
                expected.append("expected True or False")
            elif kind is str:
                return text
        raise argparse.ArgumentTypeError(f"{text}: {expected[0]}")

    return read


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say, beside its name, which images of a data set a saved model classifies, and how
    many at a time."""
    parser.add_argument(
        "--data-root", nargs="+", help="folder of the data set (default: the run's, for the run's data set)"
    )
    parser.add_argument("--split-file", help="as for training (default: the run's, for the run's data set)")
    parser.add_argument("--test-part", help="as for training (default: the run's, for the run's data set)")
    parser.add_argument("--class-names", help="as for training (default: the run's, for the run's data set)")
    parser.add_argument("--download", action="store_true", help="allow the download of the data set")
    parser.add_argument("--skip-bad-images", action="store_true", help="skip unreadable images and count them")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: the run's)")


@functools.cache
def parser() -> Parser:
    """The parser of all settings; it returns only what was given, as 'group.name'."""
    made = Parser(prog="fastmerge", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for group, kind in get_type_hints(Config).items():
        for name, hint in get_type_hints(kind).items():
            add = functools.partial(made.add_argument, dest=f"{group}.{name}")
            flag = f"--{flag_of(group, name)}"
            if bool in (hint, *get_args(hint)):
                add(f"--{no_flag_of(group, name)}", action="store_false")
            if hint is bool:
                add(flag, action="store_true")
            elif bool in get_args(hint):  # None leaves the choice to the data set
                add(flag, nargs="?", const=True, type=reader(hint))
            elif several := [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple]:
                one, *more = get_args(several[0])
                add(flag, nargs="*" if ... in more else 1 + len(more), type=reader(one))
            else:
                add(flag, type=reader(hint | None if declarations()[group][name][0].late else hint))
    return made


def known_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the flags in the arguments of a command line give, and the arguments that belong to none.

    Raises:
        UserError: a value that the setting does not take.
    """
    joined: list[str] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            joined.append(flag.replace("_", "-") + equals + value)
        elif re.match(r"-(\.?\d|inf|nan)", word) and joined and re.match("--[^=]+$", joined[-1]):
            joined[-1] += f"={word}"  # argparse would take -1e-3 for a flag
        else:
            joined.append(word)
    return parser().parse_known_args(joined)


def read_flags(words: Sequence[str]) -> Given:
    """The settings that the arguments of a command line give.

    Raises:
        UserError: an unknown flag, with the nearest names; a value that the setting does not take.
    """
    found, rest = known_flags(words)
    if rest:
        flags = [f"--{flag_of(group, name)}" for group, settings in declarations().items() for name in settings]
        flag = rest[0].partition("=")[0]
        if flag.startswith("-"):
            raise UserError(f"unknown flag {flag}.{nearest(flag, flags)} fastmerge --help-all lists all")
        raise UserError(f"{rest[0]!r} is not expected here; a setting is given as --NAME VALUE")
    given: Given = {}
    for place, value in vars(found).items():
        group, _, name = place.partition(".")
        given.setdefault(group, {})[name] = tuple(value) if isinstance(value, list) else value
    return given


def resolve(given: Given) -> Config:
    """Fill the defaults, also those that depend on other settings, and check the values.

    Raises:
        UserError: naming the flag, what was given, and what was expected.
    """
    values: dict[str, dict[str, Any]] = {
        group: {name: None if one.late else default for name, (one, default) in settings.items()} | given.get(group, {})
        for group, settings in declarations().items()
    }
    data, scenario, model, run = (values[g] for g in ("data", "scenario", "model", "run"))
    if scenario["scenario"] is None:
        scenario["scenario"] = presets.scenario_of(values["training"]["preset"], data["dataset"])
    presets.apply(values, given)
    embedded = len(data["dataset"]) == 1 and data["dataset"][0] in EMBEDDED
    if model["model"] is None:
        model["model"] = "tiny" if embedded else "ViT-B-16-quickgelu"
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
    sized = scenario["first_classes"] or scenario["task_sizes"]
    if scenario["tasks"] is None and not sized and scenario["scenario"] == "cil" and run["continue_from"]:
        scenario["tasks"] = 1
    if scenario["tasks"] is None and not sized and scenario["scenario"] == "cil" and embedded:
        scenario["tasks"] = 5  # of other data sets, `settled` decides when their classes are known
    if scenario["class_order"] is None:  # the permutation of 1993 is a convention for classes, not for domains
        scenario["class_order"] = "1993" if scenario["scenario"] == "cil" else "natural"
    if values["training"]["method"] is None:  # on the embedded data the lower bound costs seconds
        values["training"]["method"] = ("trm", "finetune") if embedded else ("trm",)
    if run["run_dir"] is None:
        if run["continue_from"]:
            name = f"{Path(run['continue_from']).expanduser().resolve().name}-then-{'-'.join(data['dataset'])}"
        else:
            name = f"{'-'.join(data['dataset'])}-{scenario['scenario']}{_sequence(scenario)}-{model['model']}"
        run["run_dir"] = str(Path("runs") / re.sub("[/:]", "_", name))
    config = Config(**{group: kind(**values[group]) for group, kind in get_type_hints(Config).items()})
    check(config)
    return config


def _sequence(scenario: dict[str, Any]) -> str:
    """How the classes are split, for the name of a folder: 5, 50-10, 50+5-top200."""
    sizes, first, tasks, top = (scenario[name] for name in ("task_sizes", "first_classes", "tasks", "top_classes"))
    text = "-".join(map(str, sizes)) if sizes else str(tasks or "")
    if first:
        text = f"{first}+{tasks - 1}" if tasks else f"{first}-{LATER_CLASSES}"
    return text + (f"-top{top}" if top else "")


DEFAULT_TASKS = 10


def settled(config: Config, classes: int) -> Config:
    """`config` with the default that depends on the data: the number of tasks of a class-incremental run. A task of a single
    class has nothing to learn (its loss is over its own classes), so a task has two classes or more by default."""
    s = config.scenario
    if s.tasks is not None or s.scenario != "cil" or s.first_classes is not None or s.task_sizes is not None:
        return config
    tasks = min(DEFAULT_TASKS, max(1, classes // 2))
    return dataclasses.replace(config, scenario=dataclasses.replace(config.scenario, tasks=tasks))


# settings of a run that the tasks after it share, besides all of the model, of training and of the methods
CONTINUED = {
    "data": ("dataset", "crop_scale", "skip_bad_images"),
    "scenario": ("scenario", "validation", "eval_classes"),
}


def continued(given: Given) -> Given:
    """`given` over the settings of the run that it continues, except for those that describe its data.

    Raises:
        UserError: the run has no readable config.json, or nothing says which data the new tasks have.
    """
    path = Path(given["run"]["continue_from"]).expanduser() / "config.json"
    source = f"--continue-from {given['run']['continue_from']}"
    if not {"dataset", "data_root"} & given.get("data", {}).keys():
        raise UserError(f"{source}: say where the new tasks are, with --dataset or --data-root")
    values = read_config(path, source)
    values.pop("run", None)
    for group, names in CONTINUED.items():
        if isinstance(values.get(group), dict):
            values[group] = {name: value for name, value in values[group].items() if name in names}
    earlier = read_flags(as_flags(values, source))
    if (methods := earlier.get("training", {}).get("method")) and "joint" in methods:  # it has no next task
        earlier["training"]["method"] = tuple(method for method in methods if method != "joint")
    return {group: earlier.get(group, {}) | given.get(group, {}) for group in earlier.keys() | given.keys()}


def read_config(path: Path, source: str) -> dict[str, Any]:
    """The settings in a `config.json`, unchecked.

    Raises:
        UserError: it cannot be read, or is no object.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error}); expected the config.json of a run") from None
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected an object of groups, as in the config.json of a run")
    return values


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
            if isinstance(value, list) and len(value) == 1:
                flags.append(f"--{flag_of(group, name)}={value[0]}")  # it may begin with a dash
            elif isinstance(value, list):
                flags += [f"--{flag_of(group, name)}", *map(str, value)]
            elif isinstance(value, bool):
                flags.append(f"--{flag_of(group, name) if value else no_flag_of(group, name)}")
            elif value is not None:  # None leaves the default that depends on other settings
                flags.append(f"--{flag_of(group, name)}={value}")
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
        given = read_flags(as_flags(values, source))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return resolve(given)


def parse(argv: Sequence[str] | None = None) -> Config:
    """Flags over `--config FILE` over defaults; resolved and checked. `--help` and `--help-all` print and exit.

    Raises:
        UserError: naming the flag, what was given, and what was expected.
    """
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--config")
    own.add_argument("-h", "--help", action="store_true")
    own.add_argument("--help-all", action="store_true")
    known, rest = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    if known.help_all:
        print(help_all())
        raise SystemExit(0)
    if known.config is not None:
        source = f"--config {known.config}"
        rest = [*as_flags(read_config(Path(known.config), source), source), *rest]
    try:
        given = read_flags(rest)
        if all(given.get("training", {}).get(name) for name in ("compile", "checkpoint_gradients")):
            raise UserError(
                "--compile --checkpoint-gradients: a compiled backbone keeps its activations; leave one out"
            )
        config = resolve(continued(given) if given.get("run", {}).get("continue_from") else given)
    except UserError:
        if not known.help:
            raise
        config = resolve({})
    if known.help:
        print(help_first(config))
        raise SystemExit(0)
    return config
