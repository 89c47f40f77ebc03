"""Settings of the methods that learn prompts of the text tower."""

from __future__ import annotations

from dataclasses import dataclass

from fastmerge.declaration import setting


@dataclass
class CoOpSettings:
    tokens: int = setting(
        16,
        "Context vectors before the class name, shared by all classes (paper).",
        at_least=1,
    )
    lr: float = setting(
        2e-3,
        "Peak learning rate of SGD (paper).",
        tiny=1e-1,
        at_least=0,
        source="paper",
    )


@dataclass
class VPTSettings:
    tokens: int = setting(
        4,
        "Context vectors before the class name, shared by all classes (released code).",
        at_least=1,
    )
    lr: float = setting(
        2e-3,
        "Peak learning rate of SGD (released code).",
        tiny=1e-1,
        at_least=0,
        source="released code",
    )
    samples: int = setting(
        10,
        "Draws of the residual per step (released code).",
        at_least=1,
    )
    kl: float = setting(
        0.001,
        "Weight of the divergence from the standard normal distribution, a mean over the dimensions (released code).",
        at_least=0,
    )


@dataclass
class MaPLeSettings:
    tokens: int = setting(
        2,
        "Context vectors before the class name (paper).",
        at_least=1,
    )
    depth: int = setting(
        9,
        "Blocks of both towers that get learned vectors (paper); all blocks where a tower has fewer.",
        at_least=1,
    )
    lr: float = setting(
        3.5e-3,
        "Peak learning rate of SGD (released code, for batches of 4).",
        at_least=0,
    )


@dataclass
class AttriCLIPSettings:
    bank: int = setting(
        10,
        "Attributes in the bank: a key and a prompt each (paper).",
        at_least=1,
    )
    tokens: int = setting(
        12,
        "Context vectors of an attribute (paper).",
        at_least=1,
    )
    top: int = setting(
        3,
        "Attributes that an image chooses (paper).",
        at_least=1,
    )
    lr: float = setting(
        1e-3,
        "Peak learning rate of SGD for a batch of 20; it grows with the batch (released code).",
        tiny=1e-1,
        at_least=0,
        source="released code",
    )
    match: float = setting(
        0.7,
        "Weight of the distance between an image and its keys (released code).",
        at_least=0,
    )
    orthogonal: float = setting(
        0.3,
        "Weight of the similarity between the attributes' texts (released code).",
        at_least=0,
    )
