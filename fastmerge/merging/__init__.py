"""Merge rules on flat vectors, one file each. `RULES` is the only registry."""

from __future__ import annotations

from fastmerge.config import Config
from fastmerge.merging.average import Average
from fastmerge.merging.dare import Dare, DareTies
from fastmerge.merging.fisher import CoMA, Fisher
from fastmerge.merging.magmax import MagMax
from fastmerge.merging.random_mix import RandomMix
from fastmerge.merging.rule import Base, Rule
from fastmerge.merging.slerp import Slerp
from fastmerge.merging.stock import ModelStock
from fastmerge.merging.task_arithmetic import TaskArithmetic
from fastmerge.merging.ties import Ties
from fastmerge.merging.wise_ft import WiseFT

# name -> class, and the groups of settings it reads
RULES: dict[str, tuple[type[Rule], tuple[str, ...]]] = {
    "average": (Average, ()),
    "task-arithmetic": (TaskArithmetic, ("task_arithmetic",)),
    "ties": (Ties, ("ties",)),
    "dare": (Dare, ("dare",)),
    "dare-ties": (DareTies, ("dare", "ties")),
    "magmax": (MagMax, ("magmax",)),
    "randmix": (RandomMix, ()),
    "stock": (ModelStock, ()),
    "slerp": (Slerp, ()),
    "fisher": (Fisher, ("fisher",)),
    "cofima": (Fisher, ("cofima",)),
    "coma": (CoMA, ("coma",)),
    "wise-ft": (WiseFT, ("wise_ft",)),
}


def build_rule(name: str, base: Base, config: Config) -> Rule:
    """A fresh rule with its settings from `config`."""
    kind, groups = RULES[name]
    settings = tuple(getattr(config, group) for group in groups)
    return kind(base, settings if len(settings) > 1 else settings[0] if settings else None)
