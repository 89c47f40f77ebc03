"""MaPLe, multi-modal prompt learning (Khattak et al., CVPR 2023, arXiv 2210.03117), trained on the tasks in sequence.

    python -m fastmerge --method maple --maple.depth 9 --maple.tokens 2

Both towers of CLIP are frozen. The inputs of the first J blocks of the text tower have m learned vectors before the class
name (eq. 1 to 3): block 1 gets them as token embeddings, and in later blocks they replace what the block before made of
them. A linear map per block turns them into m tokens of the image tower's block, which stand there likewise (eq. 4 to 6).
All classes and tasks share them. Loss: cross-entropy over the task's own classes with cosine logits.

As in the released code: the vectors of block 1 start as the embeddings of the first m tokens of "a photo of a", and the
other words stay before the class name ("of a" for m = 2); with more than these words have, they are drawn from N(0, 0.02)
and the name alone follows. Vectors of later blocks are drawn from N(0, 0.02). The maps have nn.Linear's start, the same for
all later blocks. The tokens of the image tower's first block pass its norm before the blocks (`ln_pre`), others do not. SGD
and schedule as CoOp (coop.py). Different: a tower with fewer than `--maple.depth` blocks gets vectors in all of them, and the
other tower in as many; the schedule changes every step; fp32 unless `--precision` says more. After every task the class rows
of all names are encoded into the text head, so the saved model has them and the image tower's tokens, and no text tower.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `maple:clip=0` switches it off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmerge.config import Config
from fastmerge.flat import FlatModel
from fastmerge.methods.coop import Context, CoOp
from fastmerge.models.backbone import Backbone
from fastmerge.models.features import Features, with_deep_tokens
from fastmerge.models.prompts import check_prompts, with_tokens
from fastmerge.models.trainable import Trainable

WORDS = "a photo of a"


class Coupled(Context):
    """vectors: of the text tower's first blocks, `[J, m, width]`. weight `[J, image width, width]`, bias `[J, image width]`:
    the maps to tokens of the image tower. first: `[m, width]`, how those of the first block start, or None: drawn."""

    def __init__(self, generator: torch.Generator, shape: tuple[int, int, int], image_width: int, first: Tensor | None):
        super().__init__(generator, *shape)
        depth, _, width = shape
        if first is not None:
            self.vectors.data[0] = first

        def drawn(*shape: int) -> nn.Parameter:  # as nn.Linear: one for the first block, and one for all others
            two = torch.empty(2, *shape).uniform_(-1, 1, generator=generator) / width**0.5
            return nn.Parameter(torch.stack([two[int(i > 0)] for i in range(depth)]))

        self.weight, self.bias = drawn(image_width, width), drawn(image_width)

    def image_tokens(self) -> Tensor:
        """`[J, m, image width]`."""
        return self.vectors @ self.weight.mT + self.bias[:, None]


class BothTowers(Trainable):
    """The image tower with the tokens of `coupled`."""

    def __init__(self, backbone: Backbone, coupled: Coupled):
        self.backbone, self.coupled = backbone, coupled
        self.theta = FlatModel(coupled).theta

    def tokens(self) -> Tensor:
        """What stands in the inputs of the image tower's blocks, `[J, m, image width]`."""
        tokens = self.coupled.image_tokens()
        norm = getattr(self.backbone.tower, "ln_pre", None)
        return tokens if norm is None else torch.cat([norm(tokens[:1]), tokens[1:]])

    def features(self, images: Tensor) -> Tensor:
        return with_tokens(self.backbone, images, self.tokens())


class MaPLe(CoOp):
    """It keeps the vectors and the maps."""

    groups = ("maple",)
    context: Coupled
    trained: BothTowers

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        depth = config.maple.depth
        check_prompts(backbone, range(min(depth, backbone.layers or depth)), "--maple.depth", tokens=True)

    def made(self, generator: torch.Generator) -> Coupled:
        settings, backbone = self.settings, self.learner.backbone
        depth = min(settings.depth, len(self.text.blocks), backbone.layers)
        self.text, first = self.text.starting(WORDS, settings.tokens) or (self.text, None)
        first = None if first is None else first.cpu()
        return Coupled(generator, (depth, settings.tokens, self.text.width), backbone.width, first)

    def trainable(self) -> BothTowers:
        return BothTowers(self.learner.backbone, self.context)

    def rows(self, classes: Tensor) -> Tensor:
        first, *later = self.context.vectors
        return self.text.rows(first, classes, deep=later)

    def features(self) -> Features:
        return with_deep_tokens(self.learner.backbone, self.trained.tokens().detach())
