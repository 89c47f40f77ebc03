"""LoRA (Hu et al. 2022) on chosen projections of the attention layers: W becomes W + B A, in P&M W + (1 + c) B A.

The model is not rebuilt: each forward uses the sums in place of the weights (`functional_call`). This works for
separate matrices and for the fused qkv matrices of timm and open_clip; folding the adapter is one addition. peft cannot
adapt a row block of a fused matrix; on separate projections the results agree (tests/test_method_pam.py).
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.models.per_image import Part
from fastmerge.models.trainable import Trainable

ORDER = ("query", "key", "value")  # row blocks of a fused matrix, in timm and in torch's MultiheadAttention
FUSED = re.compile(r"attn\.(qkv\.weight|in_proj_weight)$")
SEPARATE = {name: re.compile(rf"\b({name[0]}|{name[0]}_proj|{name})(_weight|\.weight)$") for name in ORDER}


@dataclass(frozen=True)
class Block:
    """Rows `first` to `first + rows` of a weight matrix with `columns` columns; place: offset in the flat vector."""

    name: str
    first: int
    rows: int
    columns: int
    place: int


def find_blocks(
    names: Sequence[str], shapes: Sequence[Sequence[int]], offsets: Sequence[int], targets: Sequence[str]
) -> list[Block]:
    """Find the weights of `targets` (names in `ORDER`) in all attention layers, given the layout of a flat vector.

    Raises:
        UserError: the model has none.
    """
    found = []
    for name, shape, offset in zip(names, shapes, offsets, strict=False):
        if len(shape) != 2:
            continue
        if FUSED.search(name):
            rows = shape[0] // 3
            for target in sorted(targets, key=ORDER.index):
                first = ORDER.index(target) * rows
                found.append(Block(name, first, rows, shape[1], offset + first * shape[1]))
        elif any(SEPARATE[target].search(name) for target in targets):
            found.append(Block(name, 0, shape[0], shape[1], offset))
    if not found:
        raise UserError(
            f"the model has no {' or '.join(targets)} projection that LoRA could adapt: choose a ViT, or train all parameters"
        )
    return found


def check_rank(flag: str, rank: int, module: nn.Module, targets: Sequence[str]) -> None:
    """Raise UserError if LoRA cannot adapt `module`, or if `rank` is above the rank that its projections can have.

    flag: of the setting, for the message.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    blocks = find_blocks(names, [p.shape for p in parameters], [0] * len(names), targets)
    small = min(blocks, key=lambda b: min(b.rows, b.columns))
    if rank > min(small.rows, small.columns):
        raise UserError(
            f"{flag} {rank}: {small.name} is {small.rows} x {small.columns} per projection; expected a rank of at most "
            f"{min(small.rows, small.columns)}, or 0 to train all weights"
        )


class Projections:
    """The weights of `targets` in all attention layers as one vector `[m]` of consecutive blocks. It stores no copy."""

    def __init__(self, flat: FlatModel, targets: Sequence[str]):
        self.flat, self.blocks = flat, find_blocks(flat.names, flat.shapes, flat.offsets, targets)
        self.sizes = [b.rows * b.columns for b in self.blocks]

    def gather(self, theta: Tensor) -> Tensor:
        """Copy these weights from `theta` `[n]` into a new `[m]`."""
        return torch.cat([theta[b.place : b.place + size] for b, size in zip(self.blocks, self.sizes, strict=True)])

    def scatter(self, weights: Tensor, theta: Tensor) -> None:
        """Write `weights` `[m]` back into `theta` `[n]`."""
        for block, part in zip(self.blocks, weights.split(self.sizes), strict=True):
            theta[block.place : block.place + len(part)] = part

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """All parameters for `functional_call`, with the adapted ones replaced by `weights` `[m]`; differentiable."""
        named = self.flat.as_dict(self.flat.theta.detach())
        for block, part in zip(self.blocks, weights.split(self.sizes), strict=True):
            whole = named[block.name]
            rows = (whole[: block.first], part.view(block.rows, block.columns), whole[block.first + block.rows :])
            named[block.name] = torch.cat(rows)
        return named

    def parts(self, vector: Tensor) -> dict[str, list[Part]]:
        """Views of `vector` `[m]`: for every weight the rows that are adapted, and where they are in the vector."""
        found: dict[str, list[Part]] = {block.name: [] for block in self.blocks}
        for block, part in zip(self.blocks, vector.split(self.sizes), strict=True):
            rows = slice(block.first, block.first + block.rows)
            found[block.name].append((rows, part.view(block.rows, block.columns)))
        return found

    def at(self, weights: Tensor, images: Tensor) -> Tensor:
        """The features with the adapted weights replaced by `weights` `[m]`."""
        return functional_call(self.flat.module, self.named(weights), (images,))


class Adapter(Projections, Trainable):
    """What is added to these projections. base: `[m]`, the adapted weights without it."""

    def __init__(self, flat: FlatModel, targets: Sequence[str]):
        super().__init__(flat, targets)
        self.base = self.gather(flat.theta.detach())

    @abstractmethod
    def shift(self) -> Tensor:
        """What is added, `[m]`; differentiable with respect to `theta`."""

    def train(self, pieces: Sequence[Tensor]) -> None:
        """Make the pieces, one after the other, the one parameter `theta`, with a gradient."""
        self.theta = nn.Parameter(torch.cat([x.flatten() for x in pieces]).to(self.base))
        self.theta.grad = torch.zeros_like(self.theta)

    def features(self, images: Tensor) -> Tensor:
        return self.at(self.base + self.shift(), images)

    def fold(self) -> None:
        self.scatter(self.base + self.shift().detach(), self.flat.theta.detach())

    def tensors(self) -> dict[str, Tensor]:
        return {"adapter": self.theta.detach()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.theta.data.copy_(tensors["adapter"])


class LowRank(Adapter):
    """An adapter of rank r on these projections.

    theta: `[p]` fp32, the one parameter to train: A `[r, columns]` (Kaiming uniform, a = sqrt 5) and B `[rows, r]`
    (zero) of every block. base: `[m]`, the adapted weights at the start.
    """

    def __init__(self, flat: FlatModel, rank: int, targets: Sequence[str], generator: torch.Generator):
        super().__init__(flat, targets)
        self.rank = rank
        self.train([x for b in self.blocks for x in (new_down(rank, b, generator), torch.zeros(b.rows * rank))])

    def shift(self) -> Tensor:
        """B A of every block."""
        sizes = [size for b in self.blocks for size in (self.rank * b.columns, b.rows * self.rank)]
        pieces = self.theta.split(sizes)
        products = [
            b_part.view(b.rows, self.rank) @ a_part.view(self.rank, b.columns)
            for b, a_part, b_part in zip(self.blocks, pieces[::2], pieces[1::2], strict=True)
        ]
        return torch.cat([p.flatten() for p in products])


def new_down(rank: int, block: Block, generator: torch.Generator) -> Tensor:
    """A of a new adapter, `[r, columns]`: Kaiming uniform with a = sqrt 5."""
    return torch.empty(rank, block.columns).uniform_(-1, 1, generator=generator) / math.sqrt(block.columns)


class OnlyUp(Adapter):
    """An adapter of rank r whose A is given and fixed. theta: B `[rows, r]` (zero) of every block. downs: A `[r, columns]`
    of every block, zero until it is set."""

    def __init__(self, flat: FlatModel, rank: int, targets: Sequence[str]):
        super().__init__(flat, targets)
        self.rank = rank
        self.train([torch.zeros(b.rows, rank) for b in self.blocks])
        self.downs = [self.base.new_zeros(rank, b.columns) for b in self.blocks]

    def shift(self) -> Tensor:
        """B A of every block."""
        ups = self.theta.split([b.rows * self.rank for b in self.blocks])
        products = [up.view(-1, self.rank) @ down for up, down in zip(ups, self.downs, strict=True)]
        return torch.cat([p.flatten() for p in products])
