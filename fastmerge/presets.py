"""`--preset trm|cmm|pam`: the settings of the papers, one row for every number. Flags override them.

A row holds for the data sets that it names, or for all that the paper uses. What a paper leaves open is not here: it
keeps fastmerge's default. Sources: TRM, "Trajectory Regularized" (the version with eq. 1-15 and Tables 1-3); CMM,
"Toward a Holistic Approach to Continual Model Merging" (section 5.1 has the set-up); P&M, "Train with Perturbation,
Infer after Merging", NeurIPS 2025 (section 4.1).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from fastmerge.config import Config, flag_of


class Row(NamedTuple):
    """value: what `setting` (group.name) is in the paper. where: the place in the paper. datasets: the row is for these
    (empty: for all). scenario: the row is for this one (None: for all)."""

    setting: str
    value: Any
    where: str
    datasets: tuple[str, ...] = ()
    scenario: str | None = None


CLIP = "ViT-B-16-quickgelu"  # OpenAI's weights were trained with this activation

TRM = (
    Row("training.method", ("trm",), "Methods"),
    Row("model.model", CLIP, "Implementation Details"),
    Row("model.pretrained", "openai", "Implementation Details"),
    Row("model.head", "text", "Implementation Details"),
    Row("training.batch_size", 128, "Implementation Details"),
    Row("training.lr", 1e-5, "Implementation Details"),
    Row("training.weight_decay", 0.1, "Implementation Details"),
    Row("training.epochs", 15, "Implementation Details"),
    Row("training.merge_epochs", 5, "Implementation Details"),
    Row("trm.lambda1", 0.1, "Implementation Details"),
    Row("trm.lambda2", 0.01, "Implementation Details"),
    Row("trm.replace_ratio", 0.6, "The Ratio of Replaced Parameters"),
    Row("scenario.eval_classes", "seen", "Metrics"),
    Row("scenario.tasks", 10, "Table 1, of 5, 10 and 20", ("cifar100", "imagenet-r", "cars"), "cil"),
    Row("scenario.tasks", 6, "Table 2", ("domainnet",), "cil"),
    Row("scenario.tasks", 100, "Large Scale Dataset", ("imagenet1k",), "cil"),
)

CMM = (
    Row("training.method", ("cmm",), "Section 4"),
    Row("model.model", CLIP, "Implementation details"),
    Row("model.pretrained", "openai", "Implementation details"),
    Row("model.head", "text", "Implementation details"),
    Row("training.batch_size", 128, "Implementation details"),
    Row("training.lr", 1e-5, "Implementation details"),
    Row("training.weight_decay", 0.1, "Implementation details"),
    Row(
        "training.epochs",
        10,
        "Implementation details",
        ("cifar100", "imagenet-r", "office-home", "office31", "domainnet"),
    ),
    Row("training.epochs", 30, "Implementation details", ("cars", "cub200")),
    Row("scenario.scenario", "dil", "A.2", ("office-home", "office31", "domainnet")),
    Row("scenario.tasks", 10, "Datasets, of 10, 20 and 50", ("cifar100",), "cil"),
    Row("scenario.tasks", 10, "Datasets, of 5, 10 and 20", ("imagenet-r", "cub200", "cars"), "cil"),
)

PAM = (
    Row("training.method", ("pam",), "Algorithm 1"),
    Row("model.model", "vit_base_patch16_224", "Implementation Details"),
    Row("model.pretrained", "augreg_in21k_ft_in1k", "Implementation Details, which name no file"),
    Row("model.head", "linear", "Implementation Details"),
    Row("training.batch_size", 256, "Implementation Details"),
    Row("training.epochs", 10, "Implementation Details"),
    Row("training.epochs", 5, "Implementation Details", ("domainnet",)),
    Row("training.head_lr", 1e-2, "Implementation Details"),
    Row("pam.lr", 1e-3, "Implementation Details"),
    Row("pam.rank", 10, "Implementation Details"),
    Row("pam.epsilon", 0.5, "Implementation Details"),
    Row("pam.p0", 1 / 3, "Implementation Details"),
    Row("scenario.tasks", 10, "Evaluation Benchmarks, of 5, 10 and 20", ("imagenet-r",), "cil"),
    Row("scenario.tasks", 10, "Evaluation Benchmarks", ("imagenet-a", "cifar100", "cub200"), "cil"),
    Row("scenario.tasks", 5, "Evaluation Benchmarks", ("domainnet",), "cil"),
)

PRESETS: dict[str, tuple[Row, ...]] = {"trm": TRM, "cmm": CMM, "pam": PAM}

USED = {  # the data sets of each paper
    "trm": ("cifar100", "imagenet-r", "cars", "domainnet", "imagenet1k"),
    "cmm": ("cifar100", "imagenet-r", "cub200", "cars", "office31", "office-home", "domainnet"),
    "pam": ("imagenet-r", "imagenet-a", "domainnet", "cifar100", "cub200"),
}


def rows(name: str, datasets: tuple[str, ...], scenario: str) -> dict[str, Row]:
    """setting -> its row, for a run on these data sets; a row for named data sets goes before one for all."""
    found: dict[str, Row] = {}
    for row in PRESETS[name]:
        if (not row.datasets or set(datasets) <= set(row.datasets)) and row.scenario in (None, scenario):
            found[row.setting] = row
    return found


def scenario_of(name: str | None, datasets: tuple[str, ...]) -> str:
    """The scenario where none is given."""
    if len(datasets) > 1:
        return "datasets"
    row = rows(name, datasets, "").get("scenario.scenario") if name else None
    return row.value if row else "cil"


def apply(values: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]]) -> None:
    """Put the preset that `values` names into `values[group][name]`, except what the user has given.

    With a model of the user's own, weights and head are not the paper's; with task sizes, neither is the number of tasks.
    """
    name, scenario = values["training"]["preset"], values["scenario"]
    if name is None:
        return
    kept = {f"{group}.{own}" for group, settings in given.items() for own in settings}
    if "model.model" in kept:
        kept |= {"model.pretrained", "model.head"}
    if scenario["first_classes"] is not None or scenario["task_sizes"] is not None:
        kept.add("scenario.tasks")
    for setting, row in rows(name, values["data"]["dataset"], scenario["scenario"]).items():
        if setting not in kept | {"scenario.scenario"}:
            group, _, own = setting.partition(".")
            values[group][own] = row.value


def about(config: Config) -> list[str]:
    """Lines for the header: which settings come from which place of the paper, and which were given instead."""
    name = config.training.preset
    if name is None:
        return []
    datasets = config.data.dataset
    places: dict[str, list[str]] = {}
    instead = []
    for setting, row in rows(name, datasets, config.scenario.scenario).items():
        group, _, own = setting.partition(".")
        used, paper = getattr(getattr(config, group), own), shown(row.value)
        if used is None and own == "tasks":
            continue  # the sizes are given
        if used is None:
            instead.append(f"{flag_of(group, own)} as the model has it instead of {paper}")
            continue
        if used == row.value:
            places.setdefault(row.where, []).append(f"{flag_of(group, own)} {paper}")
        else:
            instead.append(f"{flag_of(group, own)} {shown(used)} instead of {paper}")
    lines = [f"preset {name}, from the paper: " + "; ".join(f"{', '.join(s)} ({w})" for w, s in places.items())]
    if instead:
        lines.append(f"preset {name}, overridden: " + ", ".join(instead))
    if other := [d for d in datasets if d not in USED[name]]:
        lines.append(
            f"preset {name}: the paper does not use {', '.join(other)}; what it chooses per data set has fastmerge's default"
        )
    return lines


def explained(message: str, config: Config) -> str:
    """An error's `message`, and which of the flags that it names have the value of a preset, since nobody may have typed
    them."""
    name = config.training.preset
    if name is None:
        return message
    flags = []
    for setting, row in rows(name, config.data.dataset, config.scenario.scenario).items():
        flag = f"--{flag_of(*setting.split('.'))}"
        group, _, own = setting.partition(".")
        if getattr(getattr(config, group), own) == row.value and re.search(
            rf"{flag} {re.escape(shown(row.value))}(?![\w.-])", message
        ):
            flags.append((flag, f"{flag} {shown(row.value)} is --preset {name}'s ({row.where})"))
    if not flags:
        return message
    told = "; ".join(text for _, text in flags)
    return f"{message} {told}: give {' and '.join(flag for flag, _ in flags)} another value."


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
