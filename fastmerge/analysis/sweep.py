"""One setting against one metric over finished runs: mean, least and largest over the seeds.

    python -m fastmerge --method trm trm:replace_ratio=0.2 trm:replace_ratio=1 --seeds 0 1 2 --run-dir runs/ratio
    python -m fastmerge analyse sweep runs/ratio --x trm.replace_ratio                  # TRM, Figure 7; P&M, Figure 3
    python -m fastmerge --method trm:lambda1=0.1 trm:lambda1=1 trm:lambda1=1,lambda2=0 ... --run-dir runs/lambdas
    python -m fastmerge analyse sweep runs/lambdas --x trm.lambda1 --lines trm.lambda2  # TRM of 2026, Figure 6
    python -m fastmerge --method trm trm:merge_epochs=3 trm:merge_epochs=10 --run-dir runs/epochs
    python -m fastmerge analyse sweep runs/epochs --x merge_epochs                      # search epochs: its Figure 7

The values are read from the model of every run, so rows of one command, several run folders, and defaults go together.
Runs that differ in nothing else are one line; with a second setting, `--lines`, one line for each of its values. Runs with
a single value are left out where others have several.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastmerge.analysis.figure import Output, line_style, save, with_legend
from fastmerge.config import PLAIN_GROUPS, Config, declarations, flag_of
from fastmerge.errors import UserError, nearest
from fastmerge.results import METRICS, finished, folder_name

COLUMNS = ("line", "second", "x", "mean", "least", "largest", "seeds")
FEW = 8  # values, each of which gets a tick
WIDE = 50  # times the smallest value, as of rates and weights: then x is drawn in decades


def sweep(
    folders: Sequence[Path],
    x: str,
    metric: str,
    out: Output,
    lines: str | None = None,
    only: Sequence[str] | None = None,
) -> list[Path]:
    """Write `sweep.csv` (COLUMNS, in the order of x) and its plot. x, lines: settings, as their flags. only: labels of the
    rows that count; None for all.

    COLUMNS: line: the label of its runs without both settings; second: the value of `lines`, empty without it.

    Raises:
        UserError: a setting, the metric or a row is unknown, a folder has no finished run with its model, or all runs
            have the same value.
    """
    swept = {"--x": setting("--x", x)} | ({"--lines": setting("--lines", lines)} if lines else {})
    places = list(swept.values())
    if len(set(places)) < len(places):
        raise UserError(f"--lines {lines}: is --x already; expected another setting")
    if metric not in METRICS:
        raise UserError(f"--metric {metric}: expected one of {', '.join(METRICS)}.{nearest(metric, METRICS)}")
    # by folder and seed: a default and its value given in a row are the same run twice
    points: dict[tuple[str, Any], dict[Any, dict[tuple[Path, str], float]]] = {}
    runs = {folder: finished(folder) for folder in folders}
    known = sorted({label for labels in runs.values() for label in labels})
    for label in only or ():
        if label not in known:
            raise UserError(f"--rows {label}: no such row.{nearest(label, known)} Expected one of: {', '.join(known)}")
    for folder, labels in runs.items():
        for label, seeds in labels.items():
            if only is not None and label not in only:
                continue
            for seed, result in seeds.items():
                settings = settings_of(folder / folder_name(label, seed))
                if result[metric] is None or not all(uses(where, label, settings) for where in places):
                    continue
                values = [plain(settings[group][name]) for group, name in places]
                rest = functools.reduce(without, places, label)
                line = points.setdefault((rest, values[1] if lines else ""), {})
                line.setdefault(values[0], {})[folder, seed] = result[metric]
    for number, (flag, (_, name)) in enumerate(swept.items()):
        several = {value for its in points.values() for value in its} if number == 0 else {v for _, v in points}
        if len(several) < 2:
            said = f"all have {several.pop()!r}" if several else "no finished run has it"
            raise UserError(
                f"{flag} {lines if number else x}: {said}; expected runs with different values, such as "
                f"--method NAME:{name}=VALUE ..."
            )
    swept_labels = {label for (label, _), its in points.items() if len(its) > 1}
    if swept_labels:  # other runs of the folder have one value each, which says nothing about x
        points = {line: its for line, its in points.items() if line[0] in swept_labels}
    rows = [
        (*line, value, statistics.mean(found.values()), min(found.values()), max(found.values()), len(found))
        for line, its in sorted(points.items(), key=lambda item: (item[0][0], place(item[0][1])))
        for value, found in sorted(its.items(), key=lambda item: place(item[0]))
    ]
    titles = [flag_of(*place) for place in places]
    size = with_legend(len({row[:2] for row in rows}))
    return save(out, "sweep", COLUMNS, rows, lambda figure: draw(figure, rows, titles, metric), size)


def plain(value: Any) -> Any:
    """A value from JSON that can be compared and written: lists, such as task sizes, as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def setting(flag: str, x: str) -> tuple[str, str]:
    """(group, name) of the setting that `flag` names by its own flag. Raises UserError for an unknown one."""
    given, known = x.lstrip("-").replace("-", "_"), declarations()
    places = {n if g in PLAIN_GROUPS else f"{g}.{n}": (g, n) for g, names in known.items() for n in names}
    if given not in places:
        raise UserError(
            f"{flag} {x}: no such setting.{nearest(given, places)} Expected one such as trm.replace_ratio or lr"
        )
    return places[given]


def settings_of(folder: Path) -> dict[str, Any]:
    """The config of a finished run, from the metadata of its model.

    Raises:
        UserError: the model is missing or damaged.
    """
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["about"])["config"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: missing or damaged; the settings of a run are read from its model") from None


def read_by(label: str) -> dict[str, tuple[str, str]]:
    """The settings that the method of a run reads of its own and of training, by the names that a label may give them ->
    (group, name). Empty for a method of another version."""
    from fastmerge.methods import METHODS
    from fastmerge.plan import named_rules, row_settings

    method = re.split(r"[(:]", label)[0]
    names = (m for m in sorted(METHODS, key=len, reverse=True) if method == m or method.startswith(f"{m}-"))
    if (name := next(names, None)) is None:
        return {}
    pairs = re.search(r"\((.*)\)", label)
    return row_settings(name, named_rules(name, pairs[1] if pairs else "", Config()))


def uses(where: tuple[str, str], label: str, settings: dict[str, Any]) -> bool:
    """Whether a run has this setting and its method reads it. settings: its config."""
    (group, name), its = where, read_by(label)
    if name not in settings.get(group, {}):
        return False
    shared = group in PLAIN_GROUPS and (group != "training" or name == "precision")  # every method reads it
    return shared or not its or where in its.values()


def without(label: str, where: tuple[str, str]) -> str:
    """The label of a run without its value of this setting: trm(lr=0.1,training.lr=1e-4) -> trm(training.lr=1e-4)."""
    its = read_by(label)

    def rest(match: re.Match) -> str:
        names = {pair: pair.partition("=")[0].replace("-", "_") for pair in match[1].split(",")}
        kept = [pair for pair, name in names.items() if its.get(name, (where[0], name.rpartition(".")[2])) != where]
        return f"({','.join(kept)})" if kept else ""

    return re.sub(r"\(([^)]*)\)", rest, label)


def place(value: Any) -> tuple[int, Any]:
    """Numbers in their order, then words."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value) if number else (1, str(value))


def draw(figure, rows: list[tuple], titles: list[str], metric: str) -> None:
    """titles: of x, and of the second setting if there is one."""
    axes = figure.subplots()
    values = sorted({row[2] for row in rows}, key=place)
    numbers = all(place(value)[0] == 0 for value in values)
    places = {value: value if numbers else k for k, value in enumerate(values)}
    for k, line in enumerate(dict.fromkeys(row[:2] for row in rows)):
        mine = [row for row in rows if row[:2] == line]
        at = [places[row[2]] for row in mine]
        label = f"{line[0]}, {titles[1]} = {line[1]}" if len(titles) > 1 else line[0]
        axes.plot(at, [row[3] for row in mine], **line_style(k), label=label)
        axes.fill_between(at, [row[4] for row in mine], [row[5] for row in mine], color=f"C{k % 10}", alpha=0.15)
    if not numbers:
        axes.set_xticks(range(len(values)), [str(value) for value in values])
    else:
        if values[0] > 0 and values[-1] >= WIDE * values[0]:
            axes.set_xscale("log")
        if len(values) <= FEW:
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
    axes.set(xlabel=titles[0], ylabel=f"{metric.replace('_', ' ')} (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
