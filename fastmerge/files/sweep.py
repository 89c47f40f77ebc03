"""Merge again for every value of a setting, score every merge, and keep the settings of the best.

  fastmerge merge task-arithmetic --models a b --base c --sweep scale=0.1:1:0.1 --evaluate --out merged

The inputs are opened once and merged in memory. Two settings make a grid, in which the second changes faster. Of equal scores
the first wins.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmerge.errors import UserError, nearest
from fastmerge.files.inputs import open_input
from fastmerge.files.plan import Options, make_plan
from fastmerge.files.settings import known_rule, places, read_values, read_weights
from fastmerge.files.stream import Memory, Stream

MOST = 1000  # merges
Point = dict[str, str]  # what is swept -> its value, as text


def read_grid(words: Sequence[str], options: Options) -> list[Point]:
    """All combinations of the values of one or two words: NAME=FROM:TO:STEP (TO included) or NAME=A,B,C. NAME is a setting
    of the rule, or weights.K for the weight of model K.

    Raises:
        UserError: an unknown name, or a value that the rule does not take.
    """
    if len(words) > 2:
        raise UserError(f"--sweep: {len(words)} settings; sweep one, or two as a grid, and fix the others with --set")
    swept: dict[str, list[str]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--sweep {word!r}: expected NAME=FROM:TO:STEP or NAME=A,B,C, such as scale=0.1:1:0.1")
        if name in swept:
            raise UserError(f"--sweep: {name} is named twice")
        _check_name(name, options)
        swept[name] = _values(word, text)
    count = math.prod(len(values) for values in swept.values())
    if count > MOST:
        raise UserError(f"--sweep: {count} merges; at most {MOST}, so take larger steps")
    points = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    for point in points:
        _applied(point, options)
    return points


def _check_name(name: str, options: Options) -> None:
    rule, count = known_rule(options.rule), len(options.models)
    names = [*places(options.rule), *(f"weights.{k + 1}" for k in range(count) if rule.weighted)]
    if name not in names:
        known = f"can be swept: {', '.join(names)}" if names else "it has nothing to sweep"
        raise UserError(f"--sweep {name}: {options.rule} has no such setting.{nearest(name, names)} ({known})")


def _values(word: str, text: str) -> list[str]:
    """The values of one word, as texts."""
    if ":" not in text:
        values = text.split(",")
        if len(set(values)) < len(values):
            raise UserError(f"--sweep {word}: a value is named twice")
        return values
    try:
        start, stop, step = map(Decimal, text.split(":"))  # decimal: 0.1 + 0.2 is 0.3
        if not (start.is_finite() and stop.is_finite() and step.is_finite()):
            raise ValueError
    except (InvalidOperation, ValueError):
        raise UserError(f"--sweep {word}: expected three numbers FROM:TO:STEP, such as 0:1:0.1") from None
    if step <= 0 or stop < start:
        raise UserError(f"--sweep {word}: expected FROM not above TO, and a STEP above 0")
    count = int((stop - start) / step) + 1
    if count > MOST:
        raise UserError(f"--sweep {word}: {count} merges; at most {MOST}, so take larger steps")
    return [f"{(start + k * step).normalize():f}" for k in range(count)]


def _applied(point: Point, options: Options) -> Options:
    """`options` with the values of `point`.

    Raises:
        UserError: the rule does not take one of them.
    """
    settings, weights = dict(options.settings), options.weights and list(options.weights)
    for name, text in point.items():
        where = f"--sweep {name}={text}"
        if match := re.fullmatch(r"weights\.(\d+)", name):
            weights = weights or [1.0] * len(options.models)
            try:
                weights[int(match[1]) - 1] = float(text)
            except (ValueError, IndexError):
                raise UserError(f"{where}: expected a number") from None
        else:
            settings |= read_values(options.rule, {name: text}, "--sweep")
    if weights is not None:
        read_weights(options.rule, weights, len(options.models), f"--sweep {text_of(point)}")
    return dataclasses.replace(options, settings=settings, weights=weights)


def text_of(point: Point) -> str:
    return " ".join(f"{name}={value}" for name, value in point.items())


@dataclasses.dataclass
class Swept:
    """scores: percent, one per point. options: those of the best point."""

    points: list[Point]
    scores: list[float]
    options: Options

    @property
    def best(self) -> int:
        """Of equal scores the first."""
        return self.scores.index(max(self.scores))


def sweep(
    options: Options,
    points: list[Point],
    score: Callable[[dict[str, Tensor]], float],
    say: Callable[[str], None],
    **stream: Any,
) -> Swept:
    """Merge and score every point. score: merged tensors -> percent. stream: arguments of `Stream`.

    Raises:
        UserError: what a merge or the score refuses.
    """
    opened = dataclasses.replace(
        options,
        models=[open_input(model) for model in options.models],
        base=None if options.base is None else open_input(options.base),
    )
    widths = {name: max(len(name), *(len(point[name]) for point in points)) for name in points[0]}
    say("  ".join([*(name.ljust(width) for name, width in widths.items()), "accuracy"]))
    scores = []
    for point in points:
        memory = Memory()
        Stream(make_plan(_applied(point, opened)), **stream).run(memory)
        scores.append(score(memory.tensors))
        say("  ".join([*(point[name].ljust(width) for name, width in widths.items()), f"{scores[-1]:8.2f}"]))
    found = Swept(points, scores, options)
    return dataclasses.replace(found, options=_applied(points[found.best], options))


def save_table(out: Path, found: Swept, command: str) -> list[Path]:
    """Write `OUT-sweep.csv` (the swept settings, accuracy) and its plot beside the output; returns their paths.

    command: what the user typed.

    Raises:
        UserError: they cannot be written.
    """
    from fastmerge.analysis.figure import Output, save

    names = list(found.points[0])
    rows = [(*point.values(), score) for point, score in zip(found.points, found.scores, strict=True)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None
    name = f"{out.stem if out.suffix == '.safetensors' else out.name}-sweep"
    place = Output(out.parent, command)
    return save(place, name, (*names, "accuracy"), rows, lambda figure: _draw(figure, names, found), (6, 4))


def _draw(figure: Any, names: list[str], found: Swept) -> None:
    """Accuracy against the first setting, with a line for every value of the second."""
    from fastmerge.analysis.figure import line_style

    axes = figure.subplots()
    words = list(dict.fromkeys(point[names[0]] for point in found.points))
    try:
        places = {word: float(word) for word in words}
    except ValueError:
        places = {word: float(k) for k, word in enumerate(words)}
        axes.set_xticks(range(len(words)), words)
    lines: dict[str, list[tuple[float, float]]] = {}
    for point, score in zip(found.points, found.scores, strict=True):
        lines.setdefault(point[names[-1]] if len(names) > 1 else "", []).append((places[point[names[0]]], score))
    for k, (label, line) in enumerate(lines.items()):
        axes.plot(*zip(*line, strict=True), **line_style(k), label=f"{names[-1]}={label}")
    best = found.points[found.best]
    axes.plot(places[best[names[0]]], found.scores[found.best], "o", mfc="none", ms=12, color="black", label="best")
    axes.set(xlabel=names[0], ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
