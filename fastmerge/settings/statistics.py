"""Settings of the methods that keep statistics of features."""

from __future__ import annotations

from dataclasses import dataclass

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
