"""One setting against one metric over finished runs: mean, least and largest over the seeds (TRM, Figure 7; P&M, Figure 3).

    python -m fastmerge --method trm trm:replace_ratio=0.2 trm:replace_ratio=1 --seeds 0 1 2 --run-dir runs/ratio
    python -m fastmerge analyse sweep runs/ratio --x trm.replace_ratio

The value of the setting is read from the model of every run, so rows of one command, several run folders, and defaults go
together. Runs that differ in nothing else are one line.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastmerge.analysis.figure import Output, line_style, save
from fastmerge.config import PLAIN_GROUPS, declarations
from fastmerge.errors import UserError, nearest
from fastmerge.results import METRICS, finished

COLUMNS = ("line", "x", "mean", "least", "largest", "seeds")


def sweep(folders: Sequence[Path], x: str, metric: str, out: Output) -> list[Path]:
    """Write `sweep.csv` (COLUMNS, in the order of x) and its plot. x: a setting, as its flag.

    Raises:
        UserError: the setting or the metric is unknown, a folder has no finished run with its model, or all runs have the
            same value.
    """
    group, name = setting(x)
    if metric not in METRICS:
        raise UserError(f"--metric {metric}: expected one of {', '.join(METRICS)}.{nearest(metric, METRICS)}")
    points: dict[str, dict[Any, list[float]]] = {}
    for folder in folders:
        for label, seeds in finished(folder).items():
            for seed, result in seeds.items():
                settings = settings_of(folder / f"{label}-seed{seed}")
                if result[metric] is not None and group in settings and uses(group, label):
                    line = points.setdefault(without(label, name), {})
                    line.setdefault(settings[group][name], []).append(result[metric])
    values = {value for line in points.values() for value in line}
    if len(values) < 2:
        only = f"all have {values.pop()!r}" if values else "no finished run has it"
        raise UserError(f"--x {x}: {only}; expected runs with different values, such as --method NAME:{name}=VALUE ...")
    rows = [
        (line, value, statistics.mean(found), min(found), max(found), len(found))
        for line, its in points.items()
        for value, found in sorted(its.items(), key=lambda item: place(item[0]))
    ]
    return save(out, "sweep", COLUMNS, rows, lambda figure: draw(figure, rows, f"{group}.{name}", metric), (8, 4))


def setting(x: str) -> tuple[str, str]:
    """(group, name) of a setting given as its flag. Raises UserError for an unknown one."""
    given, known = x.lstrip("-").replace("-", "_"), declarations()
    places = {n if g in PLAIN_GROUPS else f"{g}.{n}": (g, n) for g, names in known.items() for n in names}
    if given not in places:
        raise UserError(
            f"--x {x}: no such setting.{nearest(given, places)} Expected one such as trm.replace_ratio or lr"
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


def uses(group: str, label: str) -> bool:
    """Whether the method of a run reads the settings of `group`."""
    from fastmerge.methods import METHODS

    method = re.split(r"[(:]", label)[0]
    known = next((m for m in sorted(METHODS, key=len, reverse=True) if method == m or method.startswith(f"{m}-")), None)
    rules = [name for name in re.findall(r"(?:init|deploy)[-_]rule=([^,)]+)", label) if name in METHODS]
    return group in PLAIN_GROUPS or known is None or any(group in METHODS[name].groups for name in (known, *rules))


def without(label: str, name: str) -> str:
    """The label of a run without its value of this setting: trm(lr=0.1,beta=0) -> trm(beta=0)."""

    def rest(match: re.Match) -> str:
        kept = [pair for pair in match[1].split(",") if pair.partition("=")[0].rpartition(".")[2] != name]
        return f"({','.join(kept)})" if kept else ""

    return re.sub(r"\(([^)]*)\)", rest, label)


def place(value: Any) -> tuple[int, Any]:
    """Numbers in their order, then words."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value) if number else (1, str(value))


def draw(figure, rows: list[tuple], x: str, metric: str) -> None:
    axes = figure.subplots()
    values = sorted({row[1] for row in rows}, key=place)
    numbers = all(place(value)[0] == 0 for value in values)
    places = {value: value if numbers else k for k, value in enumerate(values)}
    for k, line in enumerate(dict.fromkeys(row[0] for row in rows)):
        mine = [row for row in rows if row[0] == line]
        at = [places[row[1]] for row in mine]
        axes.plot(at, [row[2] for row in mine], **line_style(k), label=line)
        axes.fill_between(at, [row[3] for row in mine], [row[4] for row in mine], color=f"C{k % 10}", alpha=0.15)
    if not numbers:
        axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set(xlabel=x, ylabel=f"{metric.replace('_', ' ')} (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
