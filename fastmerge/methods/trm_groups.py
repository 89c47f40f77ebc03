"""Which entries of theta share a pair (alpha, beta) in TRM's search: all, or those of a transformer block (`--trm.per`).

    theta = theta_{t-1} + sum_k (alpha_k d_k + beta_k P_k),   dL_tra/dalpha_k = <G_k, d_k>,   dL_tra/dbeta_k = <G_k, P_k>

x_k: the entries of group k, one for each block and one for all others (patches, positions, projection). P is the unit vector
of the whole model, so one pair for all groups is eq. 4. The paper has one pair; AdaMerging (Yang et al. 2024) found
coefficients for every layer better than one for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmerge.flat import FlatModel
from fastmerge.models.backbone import Backbone
from fastmerge.models.recompute import blocks_of


@dataclass
class Groups:
    """names: of the groups, empty if there is one. pieces: (start, end, group), which cover `[0, n)` in order."""

    names: list[str]
    pieces: list[tuple[int, int, int]]

    @classmethod
    def of(cls, flat: FlatModel, backbone: Backbone, per: str) -> Groups:
        """The groups of `--trm.per`.

        Raises:
            UserError: the backbone has no transformer blocks.
        """
        if per == "model":
            return cls([], [(0, flat.numel, 0)])
        blocks = blocks_of(backbone, "--trm.per block")
        owner = {id(p): k for k, block in enumerate(blocks) for p in block.parameters()}
        pieces: list[tuple[int, int, int]] = []
        starts = [*flat.offsets[:-1], flat.numel]  # the last one takes the padding
        for parameter, start, end in zip(flat.parameters, starts, starts[1:], strict=False):
            group = owner.get(id(parameter), len(blocks))
            if pieces and pieces[-1][2] == group:
                pieces[-1] = (pieces[-1][0], end, group)
            else:
                pieces.append((start, end, group))
        rest = any(group == len(blocks) for _, _, group in pieces)
        return cls([f"block_{k + 1}" for k in range(len(blocks))] + ["rest"] * rest, pieces)
