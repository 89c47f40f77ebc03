"""Write what merging needs of a model's data: its diagonal Fisher, or the second moments of its layers' inputs.

  fastmerge statistics fisher runs/NAME/finetune-seed0 --out fisher.safetensors
  fastmerge statistics moments runs/NAME/finetune-seed0/models/task-1.safetensors --out moments.safetensors
  fastmerge merge fisher --models A B --statistics FISHER-A FISHER-B --out merged

The model is one of a run; the images are the training images of its last task, or of --task. `fisher` is for the rules
fisher and cofima, `moments` for regmean. See docs/MERGE.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmerge.checkpoint import replace, select
from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.flags import as_flags, read_flags, resolve
from fastmerge.loop import Images
from fastmerge.models.saved import beside_weights, read
from fastmerge.moments_pass import MomentsPass
from fastmerge.setup import Setup
from fastmerge.wording import counted


def main(argv: Sequence[str]) -> int:
    """Run `fastmerge statistics`; returns the exit code.

    Raises:
        UserError: no such model, data or task, or an output that exists or cannot be written.
    """
    parser = argparse.ArgumentParser("fastmerge statistics", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=("fisher", "moments"), help="what to compute")
    parser.add_argument("model", help="folder of a finished run (runs/NAME/METHOD-seed0), or its model file")
    parser.add_argument("--task", type=int, help="number of the task whose images are used (default: the model's last)")
    parser.add_argument(
        "--labels", choices=("model", "data"), help="of the Fisher: drawn from the prediction, or true ones"
    )
    parser.add_argument("--images", type=int, help="use so many of the images for the Fisher (default: the run's)")
    parser.add_argument("--data-root", nargs="+", help="folder of the data set (default: the run's)")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    given = parser.parse_args(argv)
    out = given.out.expanduser()
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a name that ends in .safetensors")
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another name, or delete it")
    tensors, about, images, task = computed(given)
    metadata = {"format": "pt", "statistics": json.dumps(about)}
    if axes := about.pop("axes", None):
        metadata |= {"axes": json.dumps(axes), "statistics": json.dumps(about)}
    out.parent.mkdir(parents=True, exist_ok=True)
    replace(out, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    print(f"{out}: {given.kind} of {counted(len(tensors), 'tensor')} on {counted(images, 'image')} of {task}")
    return 0


def computed(given: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any], int, str]:
    """(tensors by their names in the model file, what they are, number of images, name of the task)."""
    tensors, recipe = read(given.model)
    if "learner.theta" in tensors:
        raise UserError(f"{given.model}: a file of --keep-trajectory; statistics need the model of a run")
    if (added := beside_weights(tensors, recipe)) not in ("", "prefix"):
        raise UserError(
            f"{given.model}: {recipe['method']} computes {added!r} besides the weights; statistics are of a model whose "
            "weights are all that it trains"
        )
    setup = Setup(settings(given, recipe["config"]))
    count, last = len(setup.scenario.tasks), len(recipe["tasks"])
    number = last if given.task is None else given.task
    if not 1 <= number <= count:
        raise UserError(f"--task {number}: expected 1 to {count}, the tasks of the run")
    learner = setup.learner(recipe["seed"], None if recipe["head"] == setup.head.kind else recipe["head"])
    learner.backbone.load_state_dict(select(tensors, "backbone"))
    learner.head.load_state_dict(select(tensors, "head"))
    task = setup.scenario.tasks[number - 1]
    images = Images(setup.scenario, setup.cache).train(task)
    about: dict[str, Any] = {"kind": given.kind, "model": str(given.model), "task": task.name}
    if given.kind == "moments":
        moments = MomentsPass(learner, task, images)
        _run(moments)
        about["axes"] = {f"backbone.{name}": axis for name, axis in moments.axes.items()}
        return _named(moments.result()), about, len(images), task.name
    fisher = FisherPass(learner, task, images)
    _run(fisher)
    about["labels"] = fisher.labels
    result = dict(zip(learner.flat.names, learner.flat.views(fisher.result()), strict=True))
    return _named(result), about, fisher.total, task.name


def settings(given: argparse.Namespace, config: dict[str, Any]) -> Any:
    """The settings of the run with those of the command."""
    values = {group: dict(those) for group, those in config.items()}
    values["training"]["method"] = ["finetune"]  # no method is run, so none must be possible
    values["run"]["device"] = given.device
    if given.labels is not None:
        values["fisher"]["labels"] = given.labels
    if given.images is not None:
        values["fisher"]["images"] = given.images
    if given.data_root is not None:
        values["data"]["data_root"] = given.data_root
    return resolve(read_flags(as_flags(values, "the model's settings")))


@torch.no_grad()
def _run(phase: FisherPass | MomentsPass) -> None:
    for i in range(phase.steps):
        phase.step(i)


def _named(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": x.detach().to("cpu", copy=True).contiguous() for name, x in found.items()}
