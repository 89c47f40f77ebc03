"""What `--help` and `--help-all` print: the settings that people use first, and all of them by group."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastmerge.commands import COMMANDS
from fastmerge.config import Config, declarations, flag_of, no_flag_of

FIRST = {  # what the flag takes, and one line about it
    "data.dataset": ("NAME ...", "glyphs, glyphs-hard, folder, imagenet1k, ... (--help-all)"),
    "data.data_root": ("DIR ...", "folder of the data set; it is never written to"),
    "data.download": ("", "allow downloads; without it nothing is fetched"),
    "data.flip": ("", "mirror training images (on for most published photos; off: --no-flip)"),
    "scenario.scenario": ("NAME", "cil: new classes in every task; dil: a new domain; datasets"),
    "scenario.tasks": ("N", "number of tasks; dil: one per domain, else 10 where the data allow it"),
    "scenario.class_order": ("WORD", "natural, 1993 (PyCIL's permutation), name-sorted, ..., or a file"),
    "scenario.validation": ("X", "evaluate on this fraction of the training images, to choose settings"),
    "model.model": ("NAME", "tiny (embedded), any open_clip model, any timm ViT"),
    "model.pretrained": ("TAG", "a tag of that model, a checkpoint file, or none (random weights)"),
    "model.head": ("NAME", "text (used where the model has a text tower), linear, prototype"),
    "training.method": ("NAME ...", "trm, cmm, pam, ties, joint, ... (all: --help-all)"),
    "training.protocol": ("NAME ...", "what a merge rule may keep: full, running, strict"),
    "training.seeds": ("N ...", "one run per method and seed"),
    "training.epochs": ("N", "training epochs per task"),
    "training.merge_epochs": ("N", "epochs of a method's merge phase"),
    "training.batch_size": ("N", "images per step"),
    "training.lr": ("X", "peak learning rate of AdamW"),
    "run.run_dir": ("DIR", "results; continues a stopped run"),
    "run.device": ("NAME", "cpu, cuda, auto"),
}

ABOUT = "Continual learning by model merging: train task after task, end with one model."
OPTIONS = (
    ("--config FILE", "settings from a file such as a run's config.json; flags override it"),
    ("--help, -h", "the first settings, with the defaults that the other flags leave"),
    ("--help-all", "all settings by group: bounds, defaults, and their sources"),
)


def help_first(config: Config) -> str:
    """The settings that people use first. config: the command's; its values are shown as the defaults."""
    rows = []
    for place, (takes, about) in FIRST.items():
        group, name = place.split(".")
        value = getattr(getattr(config, group), name)
        words = " ".join(map(str, value)) if isinstance(value, tuple) else value
        rows.append(
            (f"--{flag_of(group, name)} {takes}", f"{about} ({words})" if words not in (None, False) else about)
        )
    title = "first settings, and in brackets what is used without them:"
    return "\n".join(
        [
            "usage: fastmerge [train] [--NAME VALUE ...]",
            "",
            ABOUT,
            *_section(title, rows, 23),
            *_section("more:", OPTIONS, 23),
            *_section(
                "other commands (fastmerge COMMAND --help):",
                [(name, about) for name, (_, about) in COMMANDS.items()],
                23,
            ),
            "",
            "Without flags: the embedded data set and model, no download, two minutes on two CPU cores.",
        ]
    )


def help_all() -> str:
    """All settings by group."""
    lines = ["usage: fastmerge [--NAME VALUE ...]", "", ABOUT, *_section("options:", OPTIONS)]
    for group, settings in declarations().items():
        rows = []
        for name, (declaration, default) in settings.items():
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            known = (
                "" if shown in (None, "") and not declaration.late else f" (default: {declaration.default_text(shown)})"
            )
            rows.append((_usage(group, name), declaration.help_text() + known))
        lines += _section(f"{group.replace('_', '-')}:", rows)
    return "\n".join(lines)


def _usage(group: str, name: str) -> str:
    """The flag and its kind of value."""
    hint = get_type_hints(get_type_hints(Config)[group])[name]
    flag, kinds = f"--{flag_of(group, name)}", {hint, *get_args(hint)}
    if bool in kinds:
        return f"{flag}, --{no_flag_of(group, name)}"
    many = ""
    for kind in kinds:
        if get_origin(kind) is tuple:
            kinds, many = {*get_args(kind)}, " ..."
            break
    return f"{flag} {_takes(kinds)}{many}"


def _takes(kinds: set[Any]) -> str:
    for kind in kinds:
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
    if all(isinstance(kind, str) for kind in kinds - {None}):
        return "|".join(kinds)
    return "N" if int in kinds else "X" if float in kinds else "TEXT"


def _section(title: str, rows: Iterable[tuple[str, str]], room: int = 26) -> list[str]:
    """A title and its rows: flags in a column of `room` characters, then the texts, wrapped at the terminal's width."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    lines = ["", title]
    for flag, text in rows:
        start = f"  {flag}".ljust(room)
        own = [] if len(start) == room and start.endswith(" ") else [start]
        indent = " " * room
        wrapped = textwrap.wrap(
            text, width, initial_indent=indent if own else start, subsequent_indent=indent,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
        lines += own + wrapped
    return lines
