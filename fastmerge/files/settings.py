"""Settings of a rule and of single tensors, from words: `density=0.2`, `visual\\.proj:density=1,weights=1/0.5`,
`head\\..*:take=base`, `.*:weights=1..0/0..1` (from the first layer to the last, layers.py).

A pattern is a regular expression for the whole name of a tensor. Of several that match, the last one counts for each setting.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from fastmerge.config import Config, declarations
from fastmerge.errors import UserError, nearest
from fastmerge.files.inputs import shown
from fastmerge.files.layers import BETWEEN, Gradient
from fastmerge.files.rules import FILE_RULES, FileRule
from fastmerge.flags import reader
from fastmerge.wording import counted


def known_rule(name: str) -> FileRule:
    """Raises UserError: no rule has this name, with the nearest ones."""
    if name not in FILE_RULES:
        raise UserError(f"no rule {name!r}.{nearest(name, FILE_RULES)} There are: {', '.join(FILE_RULES)}")
    return FILE_RULES[name]


def places(rule: str) -> dict[str, str]:
    """Setting -> group of the rule that has it; the last group where two have one."""
    known = known_rule(rule)
    return {name: group for group in known.groups for name in declarations()[group] if name not in known.ignored}


def defaults(rule: str) -> dict[str, Any]:
    """The values of the papers."""
    config = Config()
    return {name: getattr(getattr(config, group), name) for name, group in places(rule).items()}


def read_values(rule: str, words: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a rule as values of their types; texts are read, the rest is checked alone.

    Raises:
        UserError: the rule has no such setting, or it takes no such value.
    """
    groups, values, hints = places(rule), {}, get_type_hints(Config)
    for name, word in words.items():
        if name not in groups:
            known = f"its settings: {', '.join(groups)}" if groups else "it has no settings"
            raise UserError(f"{where}: {rule} has no setting {name!r}.{nearest(name, groups)} ({known})")
        group = groups[name]
        try:
            value = reader(get_type_hints(hints[group])[name])(str(word))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where} {name}={error}") from None
        declarations()[group][name][0].check(f"{where} {name}", value)
        values[name] = value
    return values


@dataclass
class Override:
    """What one pattern sets. where: the flag that gave it. values: of settings. take: None, or whose tensor is copied:
    'base', or the number of a model from 1. weights: one per model. A value may be a Gradient."""

    pattern: str
    where: str
    values: dict[str, Any]
    take: str | None = None
    weights: tuple[float | Gradient, ...] | None = None

    def knots(self) -> set[float]:
        """The places between which everything is linear."""
        every = [x for x in (*self.values.values(), *(self.weights or ())) if isinstance(x, Gradient)]
        return {0.0, 1.0, *(k / (len(x.values) - 1) for x in every for k in range(1, len(x.values)))}

    def at(self, rule: str, place: float) -> tuple[dict[str, Any], tuple[float, ...] | None]:
        """Settings and weights at a place in the model, see layers.py.

        Raises:
            UserError: the rule cannot use the weights there.
        """
        values = {name: x.at(place) if isinstance(x, Gradient) else x for name, x in self.values.items()}
        if self.weights is None:
            return values, None
        weights = tuple(x.at(place) if isinstance(x, Gradient) else x for x in self.weights)
        return values, read_weights(rule, weights, len(weights), self.where)


def read_override(rule: str, text: str, models: int, where: str | None = None) -> Override:
    """One word of --tensors, or of another flag, `where`.

    Raises:
        UserError: it is not PATTERN:NAME=VALUE,..., or a part of it is wrong.
    """
    where = where or f"--tensors {text!r}"
    match = re.fullmatch(r"(.+):([\w.-]+=[^,=]*(?:,[\w.-]+=[^,=]*)*)", text, re.DOTALL)
    if not match:
        raise UserError(f"{where}: expected PATTERN:NAME=VALUE, such as 'head\\..*:take=base'")
    try:
        re.compile(match[1])
    except re.error as error:
        raise UserError(f"{where}: {match[1]!r} is no regular expression ({error})") from None
    words = dict(word.split("=", 1) for word in match[2].split(","))
    take, weights = words.pop("take", None), words.pop("weights", None)
    if take is not None and take != "base" and not (take.isdecimal() and 1 <= int(take) <= models):
        raise UserError(f"{where}: take={take}: expected base, or the number of a model, 1 to {models}")
    if take is not None and (words or weights):
        raise UserError(f"{where}: take= copies a tensor, so nothing else can be set for it")
    along = {name: word.split(BETWEEN) for name, word in words.items() if BETWEEN in word}
    values = read_values(rule, {name: word for name, word in words.items() if name not in along}, where)
    for name, texts in along.items():
        read = [read_values(rule, {name: one}, where)[name] for one in texts]
        if not all(isinstance(value, float) for value in read):
            raise UserError(f"{where}: {name} is no number, so it cannot change along the layers")
        values[name] = Gradient(tuple(read))
    if weights is None:
        return Override(match[1], where, values, take)
    shares = [word.split(BETWEEN) for word in weights.split("/")]
    longest = max(map(len, shares))
    if longest == 1:
        return Override(match[1], where, values, None, read_weights(rule, weights.split("/"), models, where))
    try:
        read = [tuple(map(float, texts)) for texts in shares]
    except ValueError as error:
        raise UserError(f"{where}: {error}; expected numbers from the first layer to the last, such as 1..0") from None
    if len(read) != models:
        raise UserError(f"{where}: {counted(len(read), 'weight')} for {counted(models, 'model')}; give one per model")
    known_weighted(rule, where)
    return Override(match[1], where, values, None, tuple(map(Gradient, read)))


def known_weighted(rule: str, where: str) -> None:
    """Raises UserError: the rule takes no weights."""
    if not known_rule(rule).weighted:
        raise UserError(f"{where}: {rule} does not weigh its models; leave the weights out")


def read_weights(rule: str, words: Sequence[Any], models: int, where: str) -> tuple[float, ...]:
    """T weights of a rule.

    Raises:
        UserError: the rule takes none, another number of them, or one that it cannot use.
    """
    known_weighted(rule, where)
    try:
        given = tuple(float(word) for word in words)
    except ValueError as error:
        raise UserError(f"{where}: {error}; expected one number per model") from None
    if len(given) != models:
        raise UserError(f"{where}: {counted(len(given), 'weight')} for {counted(models, 'model')}; give one per model")
    if not all(abs(w) < float("inf") for w in given):
        raise UserError(f"{where}: weights {list(given)}: expected finite numbers")
    if rule in ("fisher", "cofima") and not all(w > 0 for w in given):
        raise UserError(
            f"{where}: weights {list(given)}: {rule} needs positive ones; leave a model out instead of weight 0"
        )
    if rule in ("ties", "dare-ties", "slerp", "nuslerp") and not all(w >= 0 for w in given):
        raise UserError(f"{where}: weights {list(given)}: {rule} needs weights of at least 0")
    if (
        rule in ("average", "dare", "slerp", "nuslerp")
        and abs(sum(given)) < 1e-3 * max(map(abs, given), default=0) + 1e-30
    ):
        raise UserError(f"{where}: weights {list(given)} add up to {sum(given):g}, and {rule} divides by their sum")
    return given


def check_patterns(overrides: Sequence[Override], names: Sequence[str]) -> None:
    """Raises UserError: a pattern matches no tensor."""
    for given in overrides:
        if not any(re.fullmatch(given.pattern, name) for name in names):
            close = nearest(given.pattern.replace("\\", ""), names)
            raise UserError(
                f"--tensors {given.pattern!r} matches no tensor.{close} A pattern must match a whole name; there are "
                f"{shown(list(names))}"
            )
