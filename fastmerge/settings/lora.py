"""Settings of the methods that train LoRA in a way of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmerge.declaration import setting


@dataclass
class InfLoRASettings:
    rank: int = setting(
        10,
        "Rank of LoRA on the key and value projections (paper).",
        at_least=1,
    )
    lr: float = setting(
        5e-4,
        "Peak learning rate of Adam.",
        tiny=2e-3,
        at_least=0,
        source="released code",
    )
    lamb: float = setting(
        0.95,
        "Threshold of the gradient memory at the first task: 0.95 in the released configuration for CIFAR-100, 0.98 for "
        "ImageNet-R. It is a share of fourth powers, see methods/dual_gpm.py.",
        unit="fraction",
        above=0,
        at_most=1,
    )
    lame: float = setting(
        1.0,
        "The threshold rises linearly from lamb towards this value, which it would have after `tasks` tasks (released code).",
        unit="fraction",
        above=0,
        at_most=1,
    )
    tasks: int = setting(
        10,
        "The number of tasks over which the threshold rises; the released code takes that of the run, 10 in most tables.",
        at_least=1,
    )


@dataclass
class SDLoRASettings:
    rank: int = setting(
        10,
        "Rank of LoRA on the query and value projections (paper).",
        at_least=1,
    )
    lr: float = setting(
        8e-3,
        "Rate of SGD with momentum 0.9, constant: 8e-3 for CIFAR-100, 1e-2 for ImageNet-R and -A, 2e-2 for DomainNet.",
        tiny=0.1,
        at_least=0,
        source="released code",
    )
    magnitude: float = setting(
        0.8,
        "Where the magnitude of a new direction starts (released code).",
    )
    variant: Literal["plain", "rr", "kd"] = setting(
        "plain",
        "rr: later adapters have a smaller rank. kd: a direction that the old ones can express is not kept.",
    )
    residual: float = setting(
        9e-4,
        "For kd: the largest squared distance of a direction of norm 1 from its fit (paper).",
        at_least=0,
    )
