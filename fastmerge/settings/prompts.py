"""Settings of the methods that learn prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmerge.declaration import setting


@dataclass
class ConstantRate:
    lr: float = setting(
        0.03,
        "Rate of Adam for the prompts, constant, for a batch of 256 images; it is scaled with --batch-size.",
        at_least=0,
        source="the papers, HiDe-Prompt's released code",
    )


@dataclass
class Chosen(ConstantRate):
    """Of prompts that a query chooses."""

    choice: Literal["image", "batch"] = setting(
        "image",
        "Each image gets the prompts that its own query chooses, or all images of a batch those that most of them choose, "
        "also at test time (released code): then predictions depend on the batch.",
    )


@dataclass
class Blocks:
    layers: tuple[int, ...] = setting(
        (0, 1, 2, 3, 4),
        "Blocks with prompts, counted from 0.",
        tiny=(0, 1, 2, 3),
        at_least=0,
        source="CODA-Prompt's paper, HiDe-Prompt's released code",
    )


@dataclass
class L2PSettings(Chosen):
    pool: int = setting(
        10,
        "Prompts in the pool (paper).",
        at_least=1,
    )
    length: int = setting(
        5,
        "Length of a prompt (paper).",
        unit="tokens",
        at_least=1,
    )
    top: int = setting(
        5,
        "Prompts that an image gets.",
        tiny=1,
        at_least=1,
        source="paper",
    )
    pull: float = setting(
        0.1,
        "Weight of the summed cosines of a query and its chosen keys (PILOT).",
        at_least=0,
    )
    start: Literal["uniform", "mean"] = setting(
        "uniform",
        "Prompts start uniform in (-1, 1), or near the mean token of the first batch, which hardly disturbs the model.",
        tiny="mean",
        source="PILOT",
    )


@dataclass
class DualPromptSettings(Chosen):
    general_length: int = setting(
        5,
        "Prefix keys, and as many values, of the prompt that all tasks share (paper).",
        unit="tokens",
        at_least=1,
    )
    general_layers: tuple[int, ...] = setting(
        (0, 1),
        "Blocks with it, counted from 0 (paper).",
        at_least=0,
    )
    expert_length: int = setting(
        20,
        "Prefix keys, and as many values, of a task's own prompt (paper; 5 in PILOT).",
        unit="tokens",
        at_least=1,
    )
    expert_layers: tuple[int, ...] = setting(
        (2, 3, 4),
        "Blocks with it, counted from 0.",
        tiny=(2, 3),
        at_least=0,
        source="paper",
    )
    pull: float = setting(
        0.1,
        "Weight of the cosine of a query and the task's key (PILOT; 1 in CODA-Prompt's copy).",
        at_least=0,
    )


@dataclass
class CodaSettings(Blocks):
    components: int = setting(
        10,
        "New components of every task; the paper has 100 for 10 tasks.",
        at_least=1,
    )
    length: int = setting(
        8,
        "Length of a component, half of it keys and half values (paper).",
        unit="tokens",
        at_least=2,
    )
    ortho: float = setting(
        0.1,
        "Weight of the orthogonality of components, keys and attention vectors (paper; 0 in the released scripts).",
        at_least=0,
    )
    lr: float = setting(
        1e-3,
        "Peak rate of Adam, cosine to zero, at any batch size.",
        tiny=3e-2,
        at_least=0,
        source="paper",
    )


@dataclass
class HiDeSettings(Blocks, ConstantRate):
    length: int = setting(
        5,
        "Prefix keys, and as many values, of a task's prompt (released code: 5 on CIFAR-100, 20 on ImageNet-R).",
        unit="tokens",
        at_least=1,
    )
    momentum: float = setting(
        0.01,
        "Share of the mean of all earlier prompts in a task's prompt (released code).",
        at_least=0,
        at_most=1,
    )
    contrast: float = setting(
        0.1,
        "Weight of the contrast to the stored class means (released code: 0.1 on CIFAR-100, 0.5 on ImageNet-R).",
        at_least=0,
    )
    temperature: float = setting(
        0.8,
        "Temperature of the contrast (released code).",
        above=0,
    )
    identity_lr: float = setting(
        5e-4,
        "Rate of Adam for the head that tells the task, constant (released code).",
        at_least=0,
    )
    align_epochs: int = setting(
        30,
        "Epochs in which both heads are trained on drawn features after every task but the first (released code); 0 leaves "
        "it out.",
        at_least=0,
    )
    align_lr: float = setting(
        5e-3,
        "Rate of SGD there, annealed to zero by a cosine (released code).",
        at_least=0,
    )
    samples: int = setting(
        120,
        "Features drawn for every class in such an epoch, and the batch size there (released code: 5 times its batch of 24).",
        at_least=1,
    )
