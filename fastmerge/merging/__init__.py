"""Merge rules on flat vectors, one file each. `RULES` is the only registry."""

from __future__ import annotations

from fastmerge.config import Config
from fastmerge.merging.average import Average
from fastmerge.merging.breadcrumbs import Breadcrumbs
from fastmerge.merging.dare import Dare, DareTies
from fastmerge.merging.della import Della, DellaLinear
from fastmerge.merging.ema import EMA
from fastmerge.merging.fisher import CoFiMA, CoMA, Fisher
from fastmerge.merging.iso_c import IsoC
from fastmerge.merging.karcher import Karcher
from fastmerge.merging.knots import Knots
from fastmerge.merging.magmax import MagMax
from fastmerge.merging.opcm import OPCM
from fastmerge.merging.random_mix import RandomMix
from fastmerge.merging.regmean import RegMean
from fastmerge.merging.rule import Base, Rule
from fastmerge.merging.sce import SCE
from fastmerge.merging.slerp import NuSlerp, Slerp
from fastmerge.merging.stock import ModelStock
from fastmerge.merging.task_arithmetic import TaskArithmetic
from fastmerge.merging.ties import Ties
from fastmerge.merging.tsv import TSV
from fastmerge.merging.wise_ft import WiseFT

RULES: dict[str, type[Rule]] = {
    "average": Average,
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "dare-ties": DareTies,
    "della": Della,
    "della-linear": DellaLinear,
    "magmax": MagMax,
    "randmix": RandomMix,
    "stock": ModelStock,
    "slerp": Slerp,
    "fisher": Fisher,
    "cofima": CoFiMA,
    "coma": CoMA,
    "ema": EMA,
    "wise-ft": WiseFT,
    "regmean": RegMean,
    "iso-c": IsoC,
    "tsv": TSV,
    "opcm": OPCM,
    "knots": Knots,
    "breadcrumbs": Breadcrumbs,
    "sce": SCE,
    "karcher": Karcher,
    "nuslerp": NuSlerp,
}


def build_rule(name: str, base: Base, config: Config) -> Rule:
    """A fresh rule with its settings from `config`."""
    rule = RULES[name]
    return rule(base, *(getattr(config, group) for group in rule.groups))
