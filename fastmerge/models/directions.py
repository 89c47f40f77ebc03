"""Weights as a start, plus directions with magnitudes: W0 + sum_k alpha_k D_k + alpha B A (SD-LoRA, eq. 4).

A direction D_k = B_k A_k is the low-rank update of an earlier task, divided by its Frobenius norm and fixed. All
magnitudes and the new A and B are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmerge.flat import FlatModel
from fastmerge.models.lora import Adapter, new_down


@dataclass
class Directions:
    """The directions of one block. down: `[R, columns]`, up: `[rows, R]`: their factors side by side, R the sum of
    `ranks`. magnitudes: `[len(ranks)]`. All fp32."""

    down: Tensor
    up: Tensor
    magnitudes: Tensor
    ranks: list[int] = field(default_factory=list)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """(B_k, A_k) of every direction, float64."""
        return list(zip(self.up.double().split(self.ranks, 1), self.down.double().split(self.ranks, 0), strict=True))

    def add(self, up: Tensor, down: Tensor, magnitude: float, residual: float | None) -> None:
        """Add `magnitude * up @ down` as a new direction. With `residual`, first fit the direction by the old ones: where the
        squared distance is at most `residual`, the fit goes into their magnitudes. A zero update adds nothing."""
        up, down = up.double(), down.double()
        norm = product(up, down, up, down).sqrt()
        if not float(norm):
            return
        up = up / norm
        if residual is not None and self.ranks:
            old = self.factors()
            gram = torch.stack([torch.stack([product(*a, *b) for b in old]) for a in old])
            onto = torch.stack([product(*a, up, down) for a in old])
            found = torch.linalg.lstsq(gram.cpu(), onto.cpu()[:, None], driver="gelsd").solution[:, 0].to(onto)
            if float(1 - 2 * found @ onto + found @ gram @ found) <= residual:
                self.magnitudes += (magnitude * norm * found).float()
                return
        self.up, self.down = torch.cat([self.up, up.float()], 1), torch.cat([self.down, down.float()])
        self.magnitudes = torch.cat([self.magnitudes, (magnitude * norm).float().reshape(1)])
        self.ranks = [*self.ranks, up.shape[1]]


def product(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> Tensor:
    """<up @ down, other_up @ other_down>, without the products."""
    return ((up.mT @ other_up) * (down @ other_down.mT)).sum()


class OnDirections(Adapter):
    """theta: of every block the new A `[r, columns]` and B `[rows, r]` (as in LoRA), the magnitudes of the old directions,
    and that of the new one. base: W0 of these projections, `[m]`. kept: the old directions of every block."""

    def __init__(
        self,
        flat: FlatModel,
        rank: int,
        targets: tuple[str, ...],
        generator: torch.Generator,
        base: Tensor,
        kept: list[Directions],
        magnitude: float,
    ):
        super().__init__(flat, targets)
        self.rank, self.base, self.kept = rank, base, kept
        pieces: list[Tensor] = []
        for block, old in zip(self.blocks, kept, strict=True):
            down, new = new_down(rank, block, generator), torch.full((1,), magnitude)
            pieces += [down.to(base), base.new_zeros(block.rows, rank), old.magnitudes, new.to(base)]
        self.sizes_of_pieces = [piece.numel() for piece in pieces]
        self.train(pieces)
        # [K, R]: which magnitude scales which column of `up`
        self.spread = [
            torch.block_diag(base.new_zeros(0, 0), *(base.new_ones(1, r) for r in old.ranks)) for old in kept
        ]

    def pieces(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of every block A, B, the magnitudes of the old directions, that of the new one; views of theta."""
        found = self.theta.split(self.sizes_of_pieces)
        return [
            (found[4 * k].view(self.rank, -1), found[4 * k + 1].view(-1, self.rank), found[4 * k + 2], found[4 * k + 3])
            for k in range(len(self.blocks))
        ]

    def shift(self) -> Tensor:
        """sum_k alpha_k D_k + alpha B A of every block."""
        sums = []
        for (down, up, old, new), kept, spread in zip(self.pieces(), self.kept, self.spread, strict=True):
            moved = new * (up @ down)
            sums.append(moved + (kept.up * (old @ spread)) @ kept.down if kept.ranks else moved)
        return torch.cat([x.flatten() for x in sums])
