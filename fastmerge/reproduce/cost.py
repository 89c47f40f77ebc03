"""What a target would cost, without its data: runs, images, hours on this machine, disk."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch

from fastmerge.config import Config
from fastmerge.machine import choose_device
from fastmerge.methods import METHODS
from fastmerge.models import load_backbone
from fastmerge.plan import label_of, read_method, training_changes
from fastmerge.reproduce.target import TRAINING, Column, Target
from fastmerge.wording import counted

TIMED = 2  # steps


class Cost(NamedTuple):
    """runs: that no earlier column has. images: trained or searched. hours: for these. bytes: of the models."""

    name: str
    runs: int
    images: int
    hours: float
    bytes: int

    def line(self) -> str:
        return (
            f"{self.name}: {counted(self.runs, 'run')}, {self.images / 1e6:.2f} million images, {self.hours:.1f} hours, "
            f"{self.bytes / 1e9:.1f} GB"
        )


def costs(columns: Iterable[tuple[Target, Column, Config]]) -> list[Cost]:
    """The cost of every column; a run or a training that an earlier one has counts there."""
    seen, found = set[str](), []
    for target, column, config in columns:
        train = TRAINING[column.inside or column.dataset]
        runs = images = 0
        for seed in config.training.seeds:
            for spec in config.training.method:
                name, its = read_method(spec, config)
                method = METHODS[name]
                for protocol in method.protocols(its):
                    run = f"{column.folder}/{label_of(spec, protocol)}-seed{seed}"
                    if run in seen:
                        continue
                    shared = method.trajectory(its, protocol)
                    training = f"{column.folder}/{shared} {training_changes(its, config)} {seed}" if shared else run
                    epochs = method.train_epochs(its) if method.trains and training not in seen else 0
                    seen |= {run, training}
                    runs += 1
                    images += train * (epochs + method.merge_epochs(its))
        speed, size = measured(config.model.model, config.run.device)
        found.append(Cost(f"{target.name} · {column.name}", runs, images, images / speed / 3600, runs * size))
    return found


@cache
def measured(model: str, device: str) -> tuple[float, int]:
    """Images per second of forward and backward on this machine, fp32, and the bytes of the model; random weights."""
    place = choose_device(device)
    backbone = load_backbone(model, "none")[0].to(place)
    count = 2 if place.type == "cpu" else 64
    images = torch.rand(count, 3, backbone.image_size, backbone.image_size, device=place)
    seconds = []
    for _ in range(1 + TIMED):  # the first one warms up
        begun = time.perf_counter()
        backbone(images).square().mean().backward()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds.append(time.perf_counter() - begun)
    return count / min(seconds[1:]), 4 * sum(p.numel() for p in backbone.parameters())
