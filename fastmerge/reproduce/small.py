"""The embedded data sets in place of the papers': minutes in place of days, and every target shares these folders."""

from __future__ import annotations

from fastmerge.reproduce.target import Column

EPOCHS = "--epochs 2 --no-nearest-mean"


def easy(name: str, tasks: int = 5, protocol: str = "strict") -> Column:
    """Class-incremental characters with a text head. name: the column that it stands for."""
    return Column(name, f"--dataset glyphs --tasks {tasks} --protocol {protocol} {EPOCHS}", f"small-glyphs-{tasks}")


def hard(name: str, protocol: str = "strict") -> Column:
    """Class-incremental, the harder set, with a text head."""
    return Column(name, f"--dataset glyphs-hard --tasks 5 --protocol {protocol} {EPOCHS}", "small-glyphs-hard-5")


def domains(name: str, protocol: str = "strict") -> Column:
    """Domain-incremental: three families of typefaces."""
    return Column(name, f"--dataset glyphs --scenario dil --protocol {protocol} {EPOCHS}", "small-glyphs-dil")


def hard_domains(name: str, protocol: str = "strict") -> Column:
    """Domain-incremental: six styles."""
    return Column(name, f"--dataset glyphs-hard --scenario dil --protocol {protocol} {EPOCHS}", "small-glyphs-hard-dil")


def easy_linear(name: str) -> Column:
    """Class-incremental characters with a linear head."""
    return Column(name, f"--dataset glyphs --tasks 5 --head linear {EPOCHS}", "small-glyphs-5-linear")


def hard_linear(name: str, tasks: int = 5) -> Column:
    """Class-incremental, the harder set, with a linear head."""
    flags = f"--dataset glyphs-hard --tasks {tasks} --head linear {EPOCHS}"
    return Column(name, flags, f"small-glyphs-hard-{tasks}-linear")
