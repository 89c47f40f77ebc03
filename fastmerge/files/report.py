"""The report of a merge: a CSV file with one row per tensor, and a picture of the same beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmerge.checkpoint import replace, save_csv
from fastmerge.files.plan import Plan
from fastmerge.wording import counted


def save_report(path: Path, plan: Plan, found: dict[str, dict[str, Any]]) -> None:
    """Write `path` (.csv) and the picture with the ending .png.

    Raises:
        UserError: they cannot be written.
    """
    cosines = [f"cosine_{k + 1}" for k in range(len(plan.models))]
    columns, rows = ("tensor", "shape", "action", "nonfinite", "norm", "conflicts", "changed", *cosines), []
    for item in plan.items:
        about = found[item.name]
        row = [item.name, "x".join(map(str, item.shape)), about["action"], about["nonfinite"]]
        if "norm" in about:
            row += [about[name] for name in ("norm", "conflicts", "changed")]
            row += [f"{c:.4f}" for c in about["cosines"]]
        rows.append(row + [None] * (len(columns) - len(row)))
    save_csv(path, columns, rows)
    measured = [(item.name, found[item.name]) for item in plan.items if "norm" in found[item.name]]
    if measured:
        replace(path.with_suffix(".png"), lambda temporary: _draw(temporary, plan, measured))


def _draw(path: Path, plan: Plan, measured: list[tuple[str, dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    norms, cosines, shares = figure.subplots(3, 1, sharex=True)
    places = range(len(measured))
    norms.semilogy(places, [max(about["norm"], 1e-12) for _, about in measured], ".")
    norms.set_ylabel("norm of the merged\ntask vector" if plan.rule.needs_base else "norm")
    for k, model in enumerate(plan.models):
        cosines.plot(places, [about["cosines"][k] for _, about in measured], ".", label=Path(model.label).name)
    cosines.set_ylabel("cosine to each input")
    cosines.legend(fontsize=7)
    shares.plot(places, [about["conflicts"] for _, about in measured], ".", label="sign conflicts")
    shares.plot(places, [about["changed"] for _, about in measured], ".", label="changed entries")
    shares.set_ylabel("share")
    shares.set_xlabel("tensor, sorted by name")
    shares.legend(fontsize=7)
    figure.suptitle(f"{plan.options.rule} of {counted(len(plan.models), 'model')}")
    figure.savefig(path, dpi=120, format="png")
