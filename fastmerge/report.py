"""Text printed before and after the runs: header, tables, summary."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from fastmerge import presets
from fastmerge.data.prompts import CONTINUAL_CLIP
from fastmerge.flags import DEFAULT_TASKS
from fastmerge.results import METRICS
from fastmerge.wording import counted

BASELINE = "nearest-mean"  # beside every table


def header(setup: Any, manifest: dict[str, Any], folder: Path) -> list[str]:
    """A few lines that describe the command before it starts."""
    scenario, backbone = setup.scenario, setup.backbone
    dataset = scenario.dataset
    sizes = [len(task.classes) for task in scenario.tasks]
    shown = ", ".join(f"{len(list(same))} x {size}" for size, same in itertools.groupby(sizes))
    fewer = f" ({DEFAULT_TASKS} by default, fewer for so few classes)" if setup.fewer_tasks else ""
    tasks = counted(len(sizes), "task")
    kinds = {"cil": "class-incremental", "dil": "domain-incremental", "datasets": "a data set per task"}
    before = setup.earlier
    earlier = f", after {counted(len(before.scenario.tasks), 'task')} of {before.path}" if before else ""
    return [
        f"{dataset.name}: {counted(len(dataset.class_names), 'class', 'classes')}, {len(dataset.train)} train and "
        f"{counted(len(dataset.test), 'test image')}",
        *origin_lines(dataset),
        f"{kinds[scenario.kind]}, {tasks}{fewer} with {shown} classes, order {manifest['order_sha256']}{earlier}",
        f"{backbone.name}: {sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M parameters, {backbone.weights}, "
        f"{setup.head.kind} head, {backbone.image_size} px, {setup.device}",
        f"training on random crops of {setup.config.data.crop_scale:.0%} to 100% of an image, flips "
        + ("on (--no-flip switches them off)" if setup.flip else "off (--flip switches them on)"),
        f"images are normalised with {backbone.normalisation}",
        *presets.about(setup.config),
        f"results go to {folder}",
    ]


def origin_lines(dataset: Any) -> list[str]:
    """Which copy of a published data set was found, and whose results it can be compared with."""
    origin = dataset.origin
    if origin is None:
        return []
    return [f"layout: {origin.layout}", f"split: {origin.split}", f"comparable with: {origin.comparable}"]


def warmup_warning(tasks: Sequence[Any], training: Any) -> str | None:
    """A warning if the shortest task is shorter than the warm-up, with the learning rate it reaches; else None."""
    steps = training.epochs * -(-min(len(task.train) for task in tasks) // training.batch_size)
    if steps >= training.warmup_steps:
        return None
    highest = training.lr * steps / training.warmup_steps
    return (
        f"--warmup-steps {training.warmup_steps}: the shortest task has {counted(steps, 'step')}, so its learning rate "
        f"only rises, to {highest:.2g} instead of {training.lr:.2g}"
    )


def single_class_warning(tasks: Sequence[Any]) -> str | None:
    """A warning about tasks of a single class, which learn nothing because the loss is over the task's own classes."""
    single = {task.name: None for task in tasks if len(task.classes) == 1}
    if not single:
        return None
    names = ", ".join(list(single)[:5]) + (f" and {len(single) - 5} more" if len(single) > 5 else "")
    return (
        f"{names}: a single class. The loss is over the classes of the task alone, so it is 0 and nothing is learned. "
        "Choose fewer tasks with --tasks"
    )


def clock(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m:02d}:{s:02d}"


def results_rows(methods: dict[str, dict[str, Any]], zero_shot: dict[str, Any] | None) -> list[list[str]]:
    """Rows of the comparison table, header first: mean ± sample standard deviation over the seeds (if two or more).

    If tasks are data sets, the mean over tasks has a column too: it is what the papers on merging report.
    FWT and retention (transfer.py) are columns where they are known; retention is a change of the accuracy that the row of
    the starting model has there. That model used zero-shot under Continual-CLIP's prompt is that method (arXiv 2210.03114),
    and named so.
    """
    columns = {"final acc": "final_accuracy", "AAA": "aaa", "forgetting": "forgetting", "plasticity": "plasticity"}
    found = [result for seeds in methods.values() for result in seeds.values()]
    if any(result.get("forward_transfer") is not None for result in found):
        columns["FWT"] = "forward_transfer"
    if any(result.get("retention") is not None for result in found) or (zero_shot or {}).get("retained") is not None:
        columns["retention"] = "retention"
    if any("own classes" in result.get("also", {}) for seeds in methods.values() for result in seeds.values()):
        columns = {"final acc": "final_accuracy", "mean of tasks": "final_accuracy_macro"} | columns
    rows = [["method", "seeds", *columns, "train", "merge", "peak memory", "kept", "grows"]]
    if zero_shot:
        shown = {"final_accuracy", "final_accuracy_macro", "aaa"}
        continual_clip = tuple(zero_shot.get("templates") or ()) in CONTINUAL_CLIP
        own = "zero-shot (Continual-CLIP)" if continual_clip else "zero-shot"
        for name, result in {own: zero_shot, **zero_shot.get("also", {})}.items():
            values = [number([result[key] if key in shown else None]) for key in columns.values()]
            if "retention" in columns and result is zero_shot:
                values[-1] = number([result.get("retained")])
            rows.append([name if result is zero_shot else f"zero-shot, {name}", "", *values, *[""] * 5])
    for method, seeds in methods.items():
        results = list(seeds.values())
        accuracy, *others = (number([r.get(k) for r in results], sign=k == "retention") for k in columns.values())
        rows.append(
            [
                method,
                str(len(results)),
                accuracy + ", chosen on these images" * any(r.get("chosen_on_test", False) for r in results),
                *others,
                *(clock(statistics.mean(r["seconds"][k] for r in results)) for k in ("train", "merge")),
                f"{max(r['peak_memory_bytes'] for r in results) / 2**20:.0f} MiB",
                f"{max(r['kept_bytes'][-1] for r in results) / 2**20:.1f} MiB"
                + " with images" * any(r.get("keeps_images", False) for r in results),
                growth(results[0]["kept_bytes"]),
            ]
        )
        for name in results[0].get("also", {}):  # the same weights evaluated with other features
            values = [number([r["also"][name].get(key) for r in results]) for key in columns.values()]
            rows.append([f"{method}, {name}", str(len(results)), *values, *[""] * 5])
    if any(result.get("bad_images") for seeds in methods.values() for result in seeds.values()):
        for row in rows:  # images that --skip-bad-images left out
            counts = [result.get("bad_images", 0) for result in methods.get(row[0], {}).values()]
            row.append("skipped images" if row is rows[0] else str(max(counts)) if counts else "")
    return rows


# columns to leave out of a narrow terminal, in this order; results.md has them all
LEAST = ("FWT", "grows", "kept", "peak memory", "merge", "train", "plasticity", "seeds", "AAA", "forgetting")


def results_table(rows: list[list[str]], width: int | None = None) -> tuple[Table, list[str]]:
    """For the terminal: the table, and the columns that were left out to fit `width` characters (None: no limit).

    A name or a number is never cut: a table that is too wide without these columns stays too wide.
    """
    left_out: list[str] = []
    for title in LEAST:
        if width is None or _width(rows, left_out) <= width:
            break
        left_out.append(title)
    shown = [k for k, title in enumerate(rows[0]) if title not in left_out]
    table = Table(width=_width(rows, left_out))
    for k in shown:
        table.add_column(rows[0][k], justify="left" if rows[0][k] in ("run", "method") else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*(escape(row[k]) for k in shown))
    return table, [title for title in rows[0] if title in left_out]


def _width(rows: list[list[str]], without: list[str]) -> int:
    """Width of the table with its frame: a line before every column, two spaces in each, and the last line."""
    columns = [column for column in zip(*rows, strict=True) if column[0] not in without]
    return sum(max(map(cell_len, column)) + 3 for column in columns) + 1


def results_markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] + ["--:"] * (len(rows[0]) - 1), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def growth(kept_bytes: Sequence[int]) -> str:
    """Θ(T) if a task adds, on average, at least 1 % of the bytes kept after task 1 (head rows add less); else Θ(1)."""
    if len(kept_bytes) < 2:
        return "–"
    slope = (kept_bytes[-1] - kept_bytes[0]) / (len(kept_bytes) - 1)
    return "Θ(T)" if slope >= 0.01 * kept_bytes[0] else "Θ(1)"


def number(values: Sequence[float | None], sign: bool = False) -> str:
    """The mean of the known values, with their sample deviation if there are several. sign: also where it is positive."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{'+' if sign else ''}.1f}{spread}"


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation of each metric over the seeds, per method; with one seed the deviation is None."""
    table: dict[str, Any] = {}
    for method, seeds in results.items():
        table[method] = {}
        for name in METRICS:
            values = [r[name] for r in seeds.values() if r[name] is not None]
            spread = statistics.stdev(values) if len(values) > 1 else None
            table[method][name] = {"mean": statistics.mean(values) if values else None, "std": spread, "n": len(values)}
    return table


def finals(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The mean final accuracy of every method, in percent."""
    return {method: statistics.mean(r["final_accuracy"] for r in seeds.values()) for method, seeds in results.items()}


def comparison(results: dict[str, dict[str, Any]], starting: dict[str, Any] | None) -> str:
    """One sentence: how far each method ends above the starting model, plain fine-tuning and nearest-mean."""
    final = finals(results)
    base = {"zero-shot": starting["final_accuracy"]} if starting else {}
    base |= {name: final[m] for m, name in (("finetune", "plain fine-tuning"), (BASELINE, BASELINE)) if m in final}
    told = [m for m in final if m != BASELINE] or list(final)
    several = len(told) > 4
    best = max((m for m in told if m not in ("joint", "finetune")), key=lambda m: final[m], default=None)
    lines = []
    for method in [best] if several and best else told:  # with many methods only the best one
        against = [
            f"{final[method] - b:+.1f} against {name}"
            for name, b in base.items()
            if (method, name) not in (("finetune", "plain fine-tuning"), (BASELINE, BASELINE))
        ]
        lines.append(
            f"{'best: ' * several}{method} ends at {final[method]:.1f} %"
            + (f" ({', '.join(against)})" if against else "")
        )
    return "; ".join(lines)


def below(results: dict[str, dict[str, Any]], starting: dict[str, Any] | None) -> list[str]:
    """A line for every method that ends below the starting model, used zero-shot or by its class means."""
    final = finals(results)
    base = {"zero-shot": starting["final_accuracy"]} if starting else {}
    base |= {BASELINE: final[BASELINE]} if BASELINE in final else {}
    lines = []
    for method, accuracy in final.items():
        above = [f"{name} ({b:.1f} %)" for name, b in base.items() if accuracy < b]
        if above and method != BASELINE:
            lines.append(
                f"{method} ends at {accuracy:.1f} %, below {' and '.join(above)}: "
                "the starting model does better without this training"
            )
    return lines
