"""Our numbers beside the published ones: difference, standard error, and whether two standard errors cover it. A table of our
own has a line for every row, and differences to one of them."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmerge.checkpoint import save_csv, save_text
from fastmerge.reproduce.target import Column, Target, published
from fastmerge.results import METRICS

RUNS = 3  # runs of which a published deviation is (P&M, section 4.1)
HEADINGS = {
    "final_accuracy": "final accuracy (%)",
    "final_accuracy_macro": "final accuracy, mean over tasks (%)",
    "aaa": "AAA (%)",
    "aaa_macro": "AAA (%)",
    "forgetting": "forgetting (%)",
    "plasticity": "plasticity (%)",
    "forward_transfer": "forward transfer (points)",
    "retention": "retention (points)",
    "peak_memory_gb": "peak memory (GB)",
    "hours": "hours",
    "train_seconds": "train (s)",
    "merge_seconds": "merge (s)",
    "peak_mib": "peak (MiB)",
    "kept_mib": "kept (MiB)",
}
OTHERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "peak_memory_gb": lambda result: result["peak_memory_bytes"] / 1e9,
    "hours": lambda result: (result["seconds"]["train"] + result["seconds"]["merge"]) / 3600,
    "train_seconds": lambda result: result["seconds"]["train"],
    "merge_seconds": lambda result: result["seconds"]["merge"],
    "peak_mib": lambda result: result["peak_memory_bytes"] / 2**20,
    "kept_mib": lambda result: result["kept_bytes"][-1] / 2**20,
}
WHOLE = ("train_seconds", "merge_seconds", "peak_mib")  # digits after the point would be noise


class Cell(NamedTuple):
    """One number. ours: of every seed, seeds: their names. paper, deviation: published, or None. why: what stands in the way
    of ours."""

    column: str
    metric: str
    row: str
    ours: tuple[float, ...]
    paper: float | None
    deviation: float | None
    why: str = ""
    seeds: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Of ours; the median for WHOLE, which a busy machine spoils."""
        middle = statistics.median if self.metric in WHOLE else statistics.fmean
        return middle(self.ours) if self.ours else None

    @property
    def spread(self) -> float | None:
        """Sample deviation of ours."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else None

    @property
    def difference(self) -> float | None:
        return None if self.mean is None or self.paper is None else self.mean - self.paper

    @property
    def error(self) -> float | None:
        """Standard error of the difference, or None with a single seed. A published number without a deviation counts as
        one run with the spread of ours, one with a deviation as the mean of RUNS runs."""
        if self.difference is None or self.spread is None:
            return None
        theirs = self.spread**2 if self.deviation is None else self.deviation**2 / RUNS
        return math.sqrt(self.spread**2 / len(self.ours) + theirs)

    @property
    def reproduced(self) -> bool | None:
        """Whether the difference is within two standard errors; None if that cannot be said."""
        return None if self.difference is None or self.error is None else abs(self.difference) <= 2 * self.error


def value(result: dict[str, Any], metric: str) -> float | None:
    return OTHERS[metric](result) if metric in OTHERS else result[metric]


def cells(
    target: Target,
    column: Column,
    found: Mapping[str, Mapping[str, dict[str, Any]]],
    why: dict[str, str],
    rows: Sequence[str],
) -> list[Cell]:
    """The cells of one column. found: row -> seed -> result. why: row -> why it has not all of them."""
    item, place = target.beside or (target.name, column.name)
    paper, made = published().get(item, {}), []
    for metric in target.metrics:
        for row in rows:
            every = {
                seed: value(result, metric)
                for seed, result in found.get(row, {}).items()
                if metric in METRICS or "seconds" in result
            }
            ours = {seed: x for seed, x in every.items() if x is not None}
            number, deviation = paper.get((row, place, metric), (None, None))
            about = number, deviation, why.get(row, ""), tuple(ours)
            made.append(Cell(column.name, metric, row, tuple(ours.values()), *about))
    return made


def rank_correlation(cells: Sequence[Cell]) -> float | None:
    """Spearman's rho between ours and the published numbers; None for fewer than three rows or a constant one."""
    # the last bits of a mean are no order
    pairs = [(round(c.mean, 6), c.paper) for c in cells if c.mean is not None and c.paper is not None]
    if len(pairs) < 3:
        return None
    ranks = [midranks([pair[k] for pair in pairs]) for k in (0, 1)]
    return None if any(len(set(r)) == 1 for r in ranks) else statistics.correlation(*ranks)


def midranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def compared(target: Target, metric: str) -> bool:
    """Whether differences of this metric are given: of accuracies, not of costs."""
    return bool(target.against) and metric in METRICS


def paired(target: Target, found: Sequence[Cell]) -> dict[Cell, tuple[float, float | None]]:
    """cell -> its difference to the row `against` over the seeds that both have, and its standard error (None for one)."""
    reference = {(c.column, c.metric): c for c in found if c.row == target.against and compared(target, c.metric)}
    made = dict[Cell, tuple[float, float | None]]()
    for cell in found:
        other = reference.get((cell.column, cell.metric))
        if other is None or other is cell:
            continue
        mine, its = (dict(zip(c.seeds, c.ours, strict=True)) for c in (cell, other))
        each = [mine[seed] - its[seed] for seed in mine if seed in its]
        if not each:
            continue
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
        made[cell] = statistics.fmean(each), error
    return made


def markdown(target: Target, found: Sequence[Cell], stand_in: dict[str, str], command: str) -> str:
    """The table. stand_in: column -> the embedded set that was run in its place. command: what made it."""
    lines = [f"# {target.name}: {target.title}", "", f"```bash\n{command}\n```", ""]
    if target.ours and not target.beside:
        return "\n".join(lines + wide(target, found))
    elsewhere = bool(stand_in) or target.ours
    if elsewhere:
        lines += [
            "On embedded data sets, so ours and the paper's numbers differ by what the data are; their order may agree.",
            "",
        ]
    for column in dict.fromkeys(cell.column for cell in found):
        lines += [f"## {column}" + (f" (here: {stand_in[column]})" if column in stand_in else ""), ""]
        for metric in target.metrics:
            its = [cell for cell in found if (cell.column, cell.metric) == (column, metric)]
            lines += [HEADINGS[metric] + ":", "", *block(its, elsewhere), ""]
            rho = rank_correlation(its)
            if rho is not None:
                lines += [f"Order of the rows: Spearman's rho between ours and the paper's is {rho:.2f}.", ""]
    return "\n".join(lines)


def wide(target: Target, found: Sequence[Cell]) -> list[str]:
    """A line for every row: the mean of its seeds and their sample deviation."""
    differences, lines = paired(target, found), list[str]()
    if any(metric in WHOLE for metric in target.metrics):
        lines += ["Seconds and peak memory are medians over the seeds.", ""]
    if target.against:
        lines += [f"Differences to `{target.against}` are of the same seed, with the standard error of their mean.", ""]
    for column in dict.fromkeys(cell.column for cell in found):
        its = [cell for cell in found if cell.column == column]
        titles = ["row", "seeds"]
        for metric in target.metrics:
            titles += [HEADINGS[metric], *([f"minus `{target.against}`"] if compared(target, metric) else [])]
        lines += [f"## {column}", "", f"| {' | '.join(titles)} |", f"|---|{'--:|' * (len(titles) - 1)}"]
        for row in dict.fromkeys(cell.row for cell in its):
            own = {cell.metric: cell for cell in its if cell.row == row}
            seeds = max(len(cell.ours) for cell in own.values())
            words = [f"`{row}`", str(seeds or "not run")]
            for metric in target.metrics:
                digits, spread = (0, None) if metric in WHOLE else (1, own[metric].spread)
                words.append(plus_minus(own[metric].mean, None if metric == "kept_mib" else spread, digits))
                if compared(target, metric):
                    apart, error = differences.get(own[metric], (None, None))
                    words.append(plus_minus(apart, error, 2, "+"))
            lines.append(f"| {' | '.join(words)} |")
        lines += [*reasons(its), ""]
    return lines


def block(its: Sequence[Cell], small: bool) -> list[str]:
    """The rows of one column and metric."""
    titles = ["row", "ours", "seeds", "paper"] + ([] if small else ["difference", "within 2 standard errors"])
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for cell in its:
        digits = 2 if cell.mean is not None and abs(cell.mean) < 1 and cell.metric in OTHERS else 1
        ours = "not run" if cell.mean is None else plus_minus(cell.mean, cell.spread, digits)
        words = [cell.row, ours, str(len(cell.ours) or ""), plus_minus(cell.paper, cell.deviation, digits)]
        if not small:
            said = {True: "yes", False: "**no**", None: "" if cell.difference is None else "one run"}[cell.reproduced]
            words += [plus_minus(cell.difference, cell.error, digits, "+"), said]
        lines.append(f"| {' | '.join(words)} |")
    return lines + reasons(its)


def reasons(its: Sequence[Cell]) -> list[str]:
    """Why rows have no number, or not of every seed."""
    said = dict.fromkeys((cell.why, bool(cell.ours)) for cell in its if cell.why)
    return [f"\n{'Not all seeds' if some else 'Not run'}: {why}" for why, some in said]


def plus_minus(mean: float | None, spread: float | None, digits: int, sign: str = "") -> str:
    if mean is None:
        return ""
    return f"{mean:{sign}.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def save(target: Target, found: Sequence[Cell], stand_in: dict[str, str], command: str, out: Path) -> list[Path]:
    """Write NAME.md and NAME.csv into `out`; returns their paths."""
    paths = [out / f"{target.file}.md", out / f"{target.file}.csv"]
    differences = paired(target, found)
    columns = ("column", "data", "metric", "row", "ours", "spread", "seeds", "paper", "paper_spread", "difference")
    rows = []
    for c in found:
        data = stand_in.get(c.column, "" if target.ours else "the paper's")
        apart = differences.get(c, (None, None) if target.ours else (c.difference, c.error))
        numbers = (c.mean, c.spread, len(c.ours), c.paper, c.deviation, *apart)
        judged = None if stand_in or target.ours else c.reproduced
        rows.append((c.column, data, c.metric, c.row, *numbers, judged, c.why))
    save_text(paths[0], markdown(target, found, stand_in, command))
    save_csv(paths[1], (*columns, "error", "reproduced", "why_not"), rows)
    return paths


def index(out: Path, targets: Sequence[Target]) -> str:
    """One line for every table and figure of `targets` that `out` has: how many numbers are reproduced, or how well the
    order of the rows agrees on embedded data, and its pictures."""
    papers, own = ([t for t in targets if t.ours == ours] for ours in (False, True))
    lines = ["# Tables and figures of the papers", "", *listed(out, papers)]
    more = listed(out, own)
    return "\n".join(lines + (["", "# Tables of our own", "", *more] if len(more) > 2 else [])) + "\n"


def listed(out: Path, targets: Sequence[Target]) -> list[str]:
    """The heading of the table of `index`, and a line for each of `targets` that is there."""
    lines = ["| item | what | outcome |", "|---|---|---|"]
    for target in targets:
        table, folder = out / f"{target.file}.csv", out / target.file
        pictures = sorted(folder.rglob("*.png")) if folder.is_dir() else []
        if not table.exists() and not pictures:
            continue
        name = f"[`{target.name}`]({target.file}.md)" if table.exists() else f"`{target.name}`"
        shown = [f"[{path.stem}]({path.relative_to(out).as_posix()})" for path in pictures]
        said = [outcome(table)] if table.exists() and not target.draw else []
        lines.append(f"| {name} | {target.title} | {'; '.join(filter(None, said + shown))} |")
    return lines


def outcome(table: Path) -> str:
    """What a table shows, in words."""
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    judged = [row["reproduced"] == "True" for row in rows if row["reproduced"]]
    if judged:
        return f"{sum(judged)} of {len(judged)} numbers within two standard errors"
    columns: dict[tuple[str, str], list[Cell]] = {}
    for row in rows:
        ours = (float(row["ours"]),) if row["ours"] else ()
        cell = Cell(row["column"], row["metric"], row["row"], ours, float(row["paper"]) if row["paper"] else None, None)
        columns.setdefault((row["column"], row["metric"]), []).append(cell)
    found = [f"{rho:.2f}" for rho in map(rank_correlation, columns.values()) if rho is not None]
    if found:
        return f"order of the rows: Spearman's rho {', '.join(found)}"
    leads = dict[str, tuple[float, str]]()
    for row in rows:
        if row["metric"] == "final_accuracy" and row["ours"] and row["row"] != "joint":  # joint is an upper bound
            leads[row["column"]] = max(leads.get(row["column"], (0.0, "")), (float(row["ours"]), row["row"]))
    said = ", ".join(f"{column}: `{name}` {best:.1f}" for column, (best, name) in leads.items())
    return f"highest final accuracy: {said}" if said else "nothing to compare"
