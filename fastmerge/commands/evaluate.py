"""Evaluate a saved model on the test images of a data set.

    fastmerge evaluate runs/glyphs-cil5-tiny/trm-seed0                       # on the data set of the run
    fastmerge evaluate MODEL --dataset folder --data-root DIR --json

Prints the accuracy, also per task and per class, and writes `predictions.csv`, `confusion.csv` and, for up to 100
classes, `confusion.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmerge.checkpoint import save_csv, write_atomically
from fastmerge.config import Config
from fastmerge.continuing import Earlier
from fastmerge.data.dataset import Dataset
from fastmerge.data.joined import load_datasets, union
from fastmerge.errors import UserError, nearest
from fastmerge.flags import add_data_flags, as_flags, read_flags, resolve
from fastmerge.machine import choose_device
from fastmerge.models.saved import Model, load, model_file
from fastmerge.results import safe
from fastmerge.setup import data_of
from fastmerge.wording import counted

MOST_CLASSES = 100  # a larger confusion matrix cannot be read as a picture


def main(argv: Sequence[str]) -> int:
    """Run `fastmerge evaluate`; returns the exit code.

    Raises:
        UserError: no such model or data set, or classes that the model does not know.
    """
    parser = argparse.ArgumentParser("fastmerge evaluate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="folder of a finished run (runs/NAME/METHOD-seed0), or its model.safetensors")
    parser.add_argument("--dataset", nargs="+", help="as for training (default: the data set of the run)")
    add_data_flags(parser)
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="folder of the files (default: evaluate-DATASET beside the model)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    given = parser.parse_args(argv)
    if given.batch_size is not None and given.batch_size < 1:
        raise UserError(f"--batch-size {given.batch_size}: expected at least 1")
    model = load(given.model).to(choose_device(given.device))
    dataset = data_set(given, model.recipe["config"])
    found = evaluate(model, dataset, given.batch_size or model.recipe["config"]["training"]["batch_size"])
    out = given.out or model_file(given.model).parent / f"evaluate-{safe(dataset.name)}"
    files = write(out, found, model.class_names)
    summary = found["summary"] | {"model": str(given.model), "dataset": dataset.name, "files": files}
    print(json.dumps(summary, indent=2) if given.json else text(summary))
    return 0


def data_set(given: argparse.Namespace, config: dict[str, Any], held_out: bool = False) -> Dataset:
    """The data set that the flags name; what they leave open is taken from the run if it is the run's data set. Without
    --dataset and --data-root, a run that continues another has the images of all tasks; held_out: see
    `of_sequence`.

    Raises:
        UserError: no such data; flags of one data set for a model of several.
    """
    run, top = config["data"], config["scenario"].get("top_classes")
    if given.dataset is None and given.data_root is None and config["run"].get("continue_from"):
        for flag in ("split_file", "test_part", "class_names"):
            if getattr(given, flag) is not None:
                raise UserError(
                    f"--{flag.replace('_', '-')}: the model's run continues another, so it has several data sets; name "
                    "the one that is meant with --dataset and --data-root"
                )
        return of_sequence(resolve(read_flags(as_flags(config, "the model's settings"))), given, held_out)
    its = [run["dataset"]] if isinstance(run["dataset"], str) else run["dataset"]  # a name in models of older versions
    roots = [run["data_root"]] if isinstance(run["data_root"], str) else run["data_root"]
    same = given.dataset in (None, its)
    dataset = load_datasets(
        given.dataset or its,
        given.data_root or (roots if same else None),
        one_domain=same and config["scenario"]["scenario"] == "datasets",
        download=given.download,
        skip_bad_images=given.skip_bad_images,
        split_file=given.split_file or (run["split_file"] if same and not given.data_root else None),
        test_part=given.test_part or (run.get("test_part") if same and not given.data_root else None),
        class_names=given.class_names or (run.get("class_names") if same else None),
    )
    return dataset.most_populous(top) if same and top else dataset


def of_sequence(config: Config, given: argparse.Namespace, held_out: bool) -> Dataset:
    """The data of a run and of those that it continues. held_out: of those with --validation, what this held out is in place
    of the test images."""
    flags = {name: getattr(given, name) for name in ("download", "skip_bad_images")}
    own = data_of(dataclasses.replace(config, data=dataclasses.replace(config.data, **flags)))
    if held_out and config.scenario.validation:
        own = own.held_out(config.scenario.validation)
    if config.run.continue_from is None:
        return own
    return union([of_sequence(Earlier(config.run.continue_from).config, given, held_out), own])[0]


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, batch_size: int) -> dict[str, Any]:
    """Classify all test images of `dataset` among the classes of the model.

    Returns `summary` (accuracies in percent), `predictions` (one row per image: id, domain, class, predicted class,
    its probability) and `confusion`, int64 [classes, classes] with the true class as row.

    Raises:
        UserError: a class of the data set that the model does not know.
    """
    split, column = dataset.test, columns(model, dataset)
    device = next(model.parameters()).device
    confusion = np.zeros((len(model.class_names),) * 2, np.int64)
    predictions, correct, true, domains = [], [], [], []
    for indices in np.array_split(np.arange(len(split)), max(1, -(-len(split) // batch_size))):
        pixels, good = split.read(indices, model.backbone.image_size, device)
        rows = indices[good.numpy()]
        if not len(rows):
            continue
        probability, predicted = model(pixels[good.to(device)]).float().softmax(1).cpu().max(1)
        labels = column[split.labels[rows]]
        np.add.at(confusion, (labels, predicted.numpy()), 1)
        for row, label, guess, p in zip(rows, labels, predicted.tolist(), probability.tolist(), strict=True):
            domain = dataset.domain_names[split.domains[row]]
            predictions.append((split.ids[row], domain, model.class_names[label], model.class_names[guess], f"{p:.6f}"))
            correct.append(guess == label)
            true.append(label)
            domains.append(domain)
    if not correct:
        raise UserError(f"data set {dataset.name}: none of {counted(len(split), 'test image')} can be read")
    hit, label = np.array(correct), np.array(true)
    per_class = {model.class_names[c]: percent(hit[label == c]) for c in sorted(set(true))}
    summary = {
        "accuracy": percent(hit),
        "accuracy_per_class_mean": float(np.mean(list(per_class.values()))),
        "images": len(hit),
        "bad_images": len(split) - len(hit),
        "per_task": dict(per_task(model, hit, label, np.array(domains))),
        "per_class": per_class,
    }
    return {"summary": summary, "predictions": predictions, "confusion": confusion}


def percent(hit: np.ndarray) -> float:
    return 100.0 * int(hit.sum()) / len(hit)


def columns(model: Model, dataset: Dataset) -> np.ndarray:
    """The model's column of every class of the data set, int64 [classes]; classes are matched by name."""
    if list(dataset.class_names) == model.class_names:
        return np.arange(len(model.class_names))
    known = {name: c for c, name in enumerate(model.class_names)}
    if unknown := [name for name in dataset.class_names if name not in known]:
        raise UserError(
            f"data set {dataset.name} has {counted(len(unknown), 'class', 'classes')} that the model does not know, "
            f"such as {unknown[0]!r}."
            f"{nearest(unknown[0], known)} Evaluate on a data set with the model's classes: "
            f"{', '.join(model.class_names[:5])}{', ...' if len(known) > 5 else ''}"
        )
    return np.array([known[name] for name in dataset.class_names])


def per_task(model: Model, hit: np.ndarray, label: np.ndarray, domain: np.ndarray) -> Iterator[tuple[str, float]]:
    """Accuracy on the images of every task of the run: its classes, or its domain if tasks share classes."""
    for task in model.recipe["tasks"]:
        chosen = np.isin(label, task["classes"]) if model.recipe["scenario"] == "cil" else domain == task["name"]
        if chosen.any():
            yield task["name"], percent(hit[chosen])


def write(out: Path, found: dict[str, Any], names: list[str]) -> list[str]:
    """Write the files of one evaluation; returns their paths."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error}); choose another folder") from None
    confusion = found["confusion"]
    tables = {
        "predictions.csv": [("image", "domain", "class", "predicted", "probability"), *found["predictions"]],
        "confusion.csv": [("class", *names), *((name, *row) for name, row in zip(names, confusion, strict=True))],
    }
    for file, rows in tables.items():
        save_csv(out / file, rows[0], rows[1:])
    if len(names) <= MOST_CLASSES:
        write_atomically(out / "confusion.png", lambda path: draw(path, confusion, names))
        return [str(out / file) for file in (*tables, "confusion.png")]
    return [str(out / file) for file in tables]


def draw(path: Path, confusion: np.ndarray, names: list[str]) -> None:
    """The matrix with rows scaled to 1."""
    from matplotlib.figure import Figure

    side = 2.5 + 0.16 * len(names)
    figure = Figure((side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="class", xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=90, fontsize=7)
    axes.set_yticklabels(names, fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class's images")
    figure.savefig(path, dpi=120, format="png")


def text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    bad = f", {counted(summary['bad_images'], 'unreadable one')} skipped" if summary["bad_images"] else ""
    lines = [
        f"{summary['model']} on {summary['dataset']}: {counted(summary['images'], 'test image')}{bad}",
        f"accuracy {summary['accuracy']:.2f} %, mean over classes {summary['accuracy_per_class_mean']:.2f} %",
    ]
    for what in ("task", "class"):
        rows = summary[f"per_{what}"]
        width = max(map(len, rows), default=0)
        lines += ["", f"per {what}", *(f"  {name:<{width}}  {value:6.2f}" for name, value in rows.items())]
    return "\n".join([*lines, "", *summary["files"]])
