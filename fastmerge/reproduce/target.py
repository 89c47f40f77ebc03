"""What a table or figure runs: columns (a data set each), rows (a method each), and what draws it."""

from __future__ import annotations

import csv
import shlex
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

TRAINING = {  # training images of the official copies (docs/DATA.md), to plan without the data
    "cars": 8144,
    "cifar100": 50000,
    "cub200": 5994,
    "domainnet": 409832,
    "imagenet-a": 5981,
    "imagenet-r": 24000,
    "imagenet1k": 1281167,
    "office-home": 12470,
    "office31": 3288,
    "glyphs": 3600,
    "glyphs-hard": 3600,
    "caltech101": 2959,  # reproduce/ours.py says which
    "emoji-styles": 1000,
}


@dataclass(frozen=True)
class Column:
    """One run folder: a data set and its tasks.

    name: as in `published.csv`; of a small column, what the embedded set stands for. flags: of the trainer. folder: under
    the folder of all runs; columns with the same folder have the same flags, so targets share runs. inside: the data set's
    folder under --data-root, if the trainer does not find it there by name.
    """

    name: str
    flags: str
    folder: str
    inside: str = ""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.flags)

    @property
    def dataset(self) -> str:
        return self.words[self.words.index("--dataset") + 1]


def of_paper(paper: str, protocol: str, name: str, dataset: str, more: str) -> Column:
    """A column with the preset of its paper. more: flags of the scenario, which name the folder too."""
    folder = f"{paper}-{dataset}-{'-'.join(word.strip('-') for word in more.split())}"
    flags = f"--preset {paper} --protocol {protocol} --no-nearest-mean --dataset {dataset} {more}"
    return Column(name, flags, folder)


@dataclass(frozen=True, eq=False)
class Target:
    """A table, or a figure where `draw` is given.

    where: section of the paper. rows: row -> `--method` of the trainer; 'zero-shot' is the untrained model. metrics: names
    in `results.METRICS`, or those of `compare.OTHERS`. draw: words of `fastmerge analyse`; {runs} stands for the run
    folder, {labels} for its rows of this target, {results} for their results, and {flags} for the column's flags.
    draw_small: the same for --small, if it differs. seeds: of the paper's figure, if it says. needs: row -> the flag of a
    file that the user must give. apart: row -> flags of the data that it alone has. small: columns on the embedded sets.
    rows_small: row -> what runs with --small instead. also: figures that are the same picture. against: the row to which
    others are compared where no paper has numbers. beside: item and column of the published numbers, if they are not those
    of this name.
    """

    name: str
    title: str
    where: str
    columns: tuple[Column, ...]
    small: tuple[Column, ...]
    rows: dict[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("final_accuracy",)
    draw: str = ""
    draw_small: str = ""
    seeds: int = 3
    needs: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    rows_small: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    against: str = ""
    beside: tuple[str, str] | None = None

    @property
    def ours(self) -> bool:
        """Whether it is a table of our own; it has the same columns with and without --small."""
        return self.name.startswith("ours:")

    @property
    def file(self) -> str:
        """The name of its files."""
        return self.name.replace(":", "-")


@cache
def published() -> dict[str, dict[tuple[str, str, str], tuple[float, float | None]]]:
    """item -> (row, column, metric) -> (value, deviation over runs or None), as the papers print them."""
    found: dict[str, dict[tuple[str, str, str], tuple[float, float | None]]] = {}
    text = resources.files("fastmerge.reproduce").joinpath("published.csv").read_text(encoding="utf-8")
    for line in csv.DictReader(text.splitlines()):
        value = float(line["value"]), float(line["deviation"]) if line["deviation"] else None
        found.setdefault(line["item"], {})[line["row"], line["column"], line["metric"]] = value
    return found
