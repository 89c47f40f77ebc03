"""What a command will take, before its first step: images, steps, decoding, memory and disk. `--dry-run` stops there.

Images and steps are counted; bytes on the disk follow from the number of weights. The memory of a step is what its images
need by parts.py, which measures the activations on the model, and the vectors of the model's length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache, partial

import torch

from fastmerge.flat import FlatModel
from fastmerge.methods import METHODS
from fastmerge.methods.coop import CoOp
from fastmerge.methods.maple import MaPLe
from fastmerge.methods.prompt_method import PromptMethod
from fastmerge.methods.trm import TRM
from fastmerge.models.backbone import Backbone
from fastmerge.models.recompute import checkpoint_blocks
from fastmerge.models.text_context import CHUNK, ClassPrompts
from fastmerge.parts import FACTOR, Parts, free_bytes, saved_bytes, saved_storages
from fastmerge.plan import Run, images_per_task, shared_trainings
from fastmerge.ranks import ranks
from fastmerge.training import PHASES
from fastmerge.wording import counted

VECTORS = {  # of the model's length
    "training": 5,  # weights, gradient, AdamW's two moments, the weights before the task
    "search": 7,  # weights, gradient, theta_{t-1}, theta_t, g, its graph's copy, g times a number
}
CHECKPOINT_VECTORS = 6  # weights, the weights before the task, AdamW's two moments, and two that a method may keep


def steps(run: Run, done: int = 0) -> dict[str, int]:
    """Steps of the two phases of a run, after the first `done` tasks."""
    size = run.config.training.batch_size
    return {
        kind: sum(run.epochs[kind] * math.ceil(len(t.train) / size) for t in run.scenario.tasks[done:])
        for kind in PHASES
    }


def decoding(runs: Sequence[Run], image_size: int, budget: int, done: int = 0) -> tuple[int, int]:
    """Images to decode for all runs, and the bytes of their pixels. budget: bytes of the image cache. done: tasks that
    are not trained again. A task whose pixels do not fit is decoded again in every epoch."""
    pixels, images = 3 * image_size**2, 0
    for run in runs:
        for task in run.scenario.tasks[done:]:
            fits = len(task.train) * pixels <= budget
            images += len(task.train) * (1 if fits else max(1, sum(run.epochs.values())))
    tasks = runs[0].scenario.tasks
    tests = [len(task.test) for task in tasks]
    fits = sum(tests) * pixels <= budget
    images += sum(tests) if fits else sum(sum(row["evaluate"] for row in images_per_task(run)[done:]) for run in runs)
    return images, images * pixels


def text_bytes(text: ClassPrompts, prompts: int) -> int:
    """Bytes of a step that learns so many prompts of the text tower: its weights, and the activations of a chunk."""

    def saved(n: int) -> int:
        context = torch.zeros(1, text.width, device=text.tokens.device, requires_grad=True)
        with saved_storages() as storages:
            rows = text.rows(context, torch.zeros(n, dtype=torch.int64, device=context.device))
        del rows
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    return text.nbytes + min(prompts, CHUNK) * (saved(2) - saved(1))


def memory(
    runs: Sequence[Run], backbone: Backbone, device: torch.device, text: ClassPrompts | None = None
) -> dict[str, tuple[int, int]]:
    """Bytes of a training and of a search step, and the images at once: the largest of all runs, by kind of step. text: the
    text tower, where a method learns prompts for it."""
    model = copy.deepcopy(backbone)
    flat, found = FlatModel(model).to(device), dict[str, tuple[int, int]]()
    if any(run.config.training.checkpoint_gradients for run in runs):
        checkpoint_blocks(model)
    free = partial(free_bytes, device) if device.type == "cuda" else None

    @cache
    def saved(kind: str, again: bool) -> int:
        model.recompute = again
        return saved_bytes(flat, backbone.image_size, kind)

    for run in runs:
        kinds, training = [], run.config.training
        method = METHODS[run.method]
        through = not method.frozen or issubclass(
            method, PromptMethod | MaPLe
        )  # whether gradients go through the backbone
        if method.trains and (through or issubclass(method, CoOp)):
            kinds.append(("training", "train"))
        if METHODS[run.method] is TRM and run.epochs["merge"]:
            exact = run.config.trm.lambda2 and run.config.trm.curvature == "exact"
            kinds.append(("search", "curvature" if exact else "search"))
        per_image = partial(saved, again=training.checkpoint_gradients)
        for name, kind in kinds:
            parts = Parts(training.batch_size, training.micro_batch, free, per_image, flat.theta.nbytes)
            parts.of(training.batch_size, kind)
            own = math.ceil(training.batch_size / ranks().size)
            count = min(parts.sizes.get(kind, own), own)
            vectors = 1 if method.frozen or training.prompt_length else VECTORS[name]  # the weights alone
            needed = int(FACTOR[kind if through else "evaluate"] * per_image(kind) * count)
            needed += vectors * flat.theta.nbytes
            if issubclass(method, CoOp) and text is not None:
                classes = max(len(task.classes) for task in run.scenario.tasks)
                needed += text_bytes(text, method.prompts(run.config, classes, training.batch_size))
            found[name] = max(found.get(name, (0, 0)), (needed, count))
    return found


def disk(runs: Sequence[Run], numel: int, done: int = 0) -> tuple[int, int]:
    """Bytes in the run folder at the end, and the most while it runs."""
    training = runs[0].config.training
    model, tasks, seeds = 4 * numel, len(runs[0].scenario.tasks) - done, len({run.seed for run in runs})
    kept = len(runs) * (1 + (tasks if training.keep_models else 0)) * model
    shared = len(shared_trainings(list(runs), training.keep_trajectory)) * tasks * seeds * model
    most = kept + shared + 2 * CHECKPOINT_VECTORS * model  # two generations of the checkpoint
    return kept + (shared if training.keep_trajectory else 0), most


def estimate(
    runs: Sequence[Run],
    backbone: Backbone,
    device: torch.device,
    budget: int,
    done: int = 0,
    text: ClassPrompts | None = None,
) -> list[str]:
    """The estimate in two lines. budget: bytes of the image cache. done: tasks of a run that this one continues. text: see
    `memory`."""
    work = {
        kind: sum(row[kind] for run in runs for row in images_per_task(run)[done:]) for kind in (*PHASES, "evaluate")
    }
    count = {kind: sum(steps(run, done)[kind] for run in runs) for kind in PHASES}
    images, pixels = decoding(runs, backbone.image_size, budget, done)
    numel = sum(p.numel() for p in backbone.parameters())
    end, most = disk(runs, numel, done)
    largest = memory(runs, backbone, device, text).items()
    needed = [f"{kind} step about {size(b)} ({counted(n, 'image')} at once)" for kind, (b, n) in largest]
    return [
        f"to do: {number(work['train'])} training images in {count['train']:,} steps, {number(work['merge'])} merging "
        f"images in {count['merge']:,} steps, {number(work['evaluate'])} test images; {number(images)} images to decode "
        f"({size(pixels)} of pixels)",
        f"memory: {', '.join(needed) or 'no training'}; disk: {size(end)} at the end, up to {size(most)} while it runs",
    ]


def number(n: int) -> str:
    """7 -> 7, 53000 -> 53.0 thousand, 19200000 -> 19.2 million."""
    for limit, word in ((10**6, " million"), (10**4, " thousand")):
        if n >= limit:
            return f"{n / (limit if limit == 10**6 else 1000):.1f}{word}"
    return str(n)


def size(n: int) -> str:
    """Bytes in words: 3.2 MB, 41 GB."""
    power = 10**9 if n >= 10**9 else 10**6
    return f"{n / power:.{0 if n >= 10 * power else 1}f} {'GB' if power == 10**9 else 'MB'}"
