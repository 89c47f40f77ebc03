"""Settings of the methods that keep statistics of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmerge.declaration import setting


@dataclass
class RanPACSettings:
    projection: int = setting(
        10000,
        "M, the number of random features. The Gram matrix has M x M numbers.",
        tiny=1000,
        at_least=1,
        largest=100_000,
        source="paper",
    )


@dataclass
class SLCASettings:
    lr: float = setting(
        1e-4,
        "Learning rate of the backbone; --head-lr is that of the head and of the alignment. SGD with momentum 0.9.",
        at_least=0,
        source="paper",
    )
    decay_at: float = setting(
        0.8,
        "Both rates are a tenth after this part of the epochs (epoch 40 of 50 on ImageNet-R, released code).",
        unit="fraction",
        at_least=0,
        at_most=1,
    )
    weight_decay: float = setting(
        5e-4,
        "Weight decay of SGD, of the backbone and in the alignment (released code).",
        at_least=0,
    )
    align_epochs: int = setting(
        5,
        "Epochs of classifier alignment after every task but the first (released code); 0 leaves it out.",
        at_least=0,
    )
    samples: int = setting(
        256,
        "Features drawn for every class in an epoch of the alignment (paper); it is the batch size there too.",
        at_least=1,
    )
    temperature: float = setting(
        0.1,
        "Temperature of the normalised logits in the alignment (paper).",
        above=0,
    )


@dataclass
class RAPFSettings:
    lr: float = setting(
        1e-3,
        "Learning rate of Adam; a tenth of it after 4/15 of the epochs, and a hundredth after 10/15 (released code).",
        tiny=1e-2,
        at_least=0,
        source="released code",
    )
    samples: int = setting(
        20,
        "Features drawn for every old class in a batch, and twice as many for every pair of near classes (released code: 20 "
        "on CIFAR-100, 10 on ImageNet-R and CUB).",
        at_least=1,
    )
    threshold: float = setting(
        0.55,
        "An old and a new class are near if the distance of their text embeddings, of length 1, is below this (released "
        "code: 0.55 on CIFAR-100, 0.65 on ImageNet-R).",
        at_least=0,
    )
    fusion_bias: float = setting(
        0.6,
        "Smallest share of the new adapter in the fusion (released code: 0.6 on CIFAR-100, 0.7 on ImageNet-R).",
        at_least=0,
        at_most=1,
    )
    shrink: bool = setting(
        False,
        "Shrink the covariances before features are drawn, as the released code does on ImageNet-R.",
    )


@dataclass
class CLGCBMSettings:
    concepts: str | None = setting(
        None,
        "A JSON file with texts for every class, which describe what its images show (docs/METHODS.md); it must be given.",
    )
    prompt: str = setting(
        "A bad photo of an object with {}",
        "What the text tower encodes, {} is the concept (released code, for CIFAR-100).",
    )
    per_class: int = setting(
        10,
        "Concepts that are chosen for a task, for each of its new classes (released code).",
        at_least=1,
    )
    gate_epochs: int = setting(
        31,
        "Epochs of the gate that chooses (released code).",
        at_least=1,
    )
    gate_lr: float = setting(
        1e-2,
        "Rate of Adam there, constant (released code).",
        at_least=0,
    )
    epochs: int = setting(
        60,
        "Epochs of the bottleneck (released code); all epochs are on features, and --epochs does not count.",
        at_least=1,
    )
    lr: float = setting(
        1e-3,
        "Rate of Adam there; a tenth of it after 1/2, 2/3 and 5/6 of the epochs (released code).",
        at_least=0,
    )
    align: float = setting(
        1.0,
        "Weight of the alignment of scores and texts (released code).",
        at_least=0,
    )
    sparsity: float = setting(
        1e-3,
        "Weight of the elastic net (released code).",
        at_least=0,
    )
    samples: int = setting(
        1,
        "Features drawn for each of two old classes in a batch (released code).",
        at_least=0,
    )
    select: Literal["last", "test"] = setting(
        "last",
        "The epoch of both parts that is kept: the last, or of every tenth the best on the images that are evaluated "
        "(released code), which the table marks.",
    )


@dataclass
class RehearsalSettings:
    """Of the methods that keep images."""

    exemplars: int = setting(
        2000,
        "K, the number of images that are kept in all.",
        unit="images",
        tiny=200,
        at_least=1,
        source="paper",
    )


@dataclass
class ICaRLSettings(RehearsalSettings):
    lam: float = setting(
        1.0,
        "Weight of the distillation loss (PILOT).",
        at_least=0,
    )
    temperature: float = setting(
        2.0,
        "Temperature of both predictions in the distillation (PILOT).",
        above=0,
    )


@dataclass
class ProofSettings(RehearsalSettings):
    context: int = setting(
        3,
        "Context prompts of every task (released code).",
        at_least=1,
    )
    fusion: Literal["image", "batch"] = setting(
        "image",
        "Class texts and prototypes after the attention are those of each image, or their means over a batch, also at test "
        "time (released code): then predictions depend on the batch.",
    )
    lr: float = setting(
        1e-3,
        "Peak learning rate of SGD.",
        tiny=1e-2,
        at_least=0,
        source="released code",
    )
    weight_decay: float = setting(
        0.05,
        "Weight decay of SGD (released code).",
        at_least=0,
    )
