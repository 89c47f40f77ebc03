"""Class prompts with a learned context, encoded by a frozen text tower (Zhou et al. 2022, CoOp, arXiv 2109.01134).

A prompt is START, the context, the class name, END; the context stands in the place of tokens, as embeddings. The tower runs
as it is: a hook on its token embedding puts the context there, so positions, masks and pooling are its own. The classes are
encoded in chunks; with several, a backward pass encodes each chunk again, so memory does not grow with the classes. A deep
context (MaPLe) stands in the same places of the inputs of later blocks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmerge.errors import UserError
from fastmerge.models.precision import computing, flags
from fastmerge.models.prompts import replaced

if TYPE_CHECKING:
    from fastmerge.models.openclip import TextEncoder

CHUNK = 64  # prompts that are encoded at once
NAMELESS = -1  # in place of a class: the prompt without a name
PLACES = ("token_embedding", "text.token_embedding")  # in open_clip's CLIP and CustomTextCLIP


class ClassPrompts:
    """The class names as rows of tokens, and the tower that encodes them. width: of a token embedding.

    precision: of the products inside the tower, as in a backbone.

    Raises:
        UserError: the text tower is not of open_clip's form, or its tokens do not begin and end as CLIP's do.
    """

    def __init__(self, encoder: TextEncoder, class_names: Sequence[str], device: torch.device, precision: str = "fp32"):
        self.clip, self.precision = encoder.clip.to(device).requires_grad_(False), precision
        for place in PLACES:
            with contextlib.suppress(AttributeError):
                self.embedding, self.place = self.clip.get_submodule(place), place
        if not isinstance(getattr(self, "embedding", None), nn.Embedding):
            raise UserError(
                "the model's text tower has no token embedding of open_clip's form, which a learned context needs: choose "
                "another CLIP model"
            )
        self.width = self.embedding.embedding_dim
        self.tokenize, self.names = encoder.tokenize, (*class_names, "")
        self.tokens = self.tokenize([f"{name}." for name in self.names]).to(device)
        self.length = self.tokens.shape[1]
        ends = self.tokens.amax(1)
        if bool((self.tokens[:, 0] != self.tokens[0, 0]).any() or (ends != ends[0]).any()) or len(class_names) < 1:
            raise UserError(
                "the model's tokens do not begin with one START token and end with the largest id, as CLIP's do, so a "
                "learned context has no place: choose another CLIP model"
            )
        self.end = int(ends[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the tower's weights."""
        return sum(p.nbytes for p in self.clip.parameters())

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of texts, `[n, d]` fp32, L2-normalised."""
        with flags(self.precision, self.tokens.device), computing(self.precision):
            parts = self.tokenize(list(texts)).to(self.tokens.device).split(CHUNK)
            return F.normalize(torch.cat([self.clip.encode_text(part).float() for part in parts]), dim=1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of the tower.

        Raises:
            UserError: it has none of open_clip's form.
        """
        try:
            found = self.clip.get_submodule(self.place.replace("token_embedding", "transformer.resblocks"))
        except AttributeError:
            raise UserError(
                "the model's text tower has no transformer blocks of open_clip's form, which a deep context needs: choose "
                "another CLIP model"
            ) from None
        return list(found.children())

    @torch.no_grad()
    def starting(self, words: str, count: int) -> tuple[ClassPrompts, Tensor] | None:
        """Prompts "WORDS NAME." whose first `count` tokens are the context, and the embeddings of these tokens, `[count,
        width]`; None if the words have fewer."""
        own = self.tokenize([words])[0].to(self.tokens.device)
        if count >= int((own == self.end).int().argmax()):
            return None
        prompts = copy.copy(self)
        rows = self.tokenize([f"{words} {name}." for name in self.names]).to(self.tokens.device)
        prompts.tokens = torch.cat([rows[:, :1], rows[:, 1 + count :]], 1)
        return prompts, self.embedding(own[1 : 1 + count]).float()

    @property
    def room(self) -> int:
        """How many context vectors the tower's longest text has room for, beside START, one token of the name, and END."""
        return self.length - 3

    def with_room(self, classes: Tensor, count: int) -> Tensor:
        """The token rows of these classes with `count` places after START. A name that is too long is cut before END.

        Raises:
            UserError: the tower's longest text has no room for so many.
        """
        if count > self.room:
            raise UserError(f"{count} context vectors before a class name: the text tower has room for {self.room}")
        rows = self.tokens[classes]
        rows = torch.cat([rows[:, :1], rows[:, :1].expand(-1, count), rows[:, 1:]], 1)[:, : self.length]
        cut = ~(rows == self.end).any(1)
        rows[:, -1] = torch.where(cut, self.end, rows[:, -1])
        return rows

    def rows(self, context: Tensor, classes: Tensor, of: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        """`[k, d]` fp32, L2-normalised; differentiable with respect to `context`: `[m, width]`, `[k, m, width]`, or with
        `of` `[n, m, width]`, where row i has the context `of[i]`.

        classes, of: `[k]` int64. A class may be NAMELESS. deep: contexts `[m, width]` of block 1, 2, ... for all rows.
        """
        tokens = self.with_room(classes, context.shape[-2]).split(CHUNK)
        if of is None:
            contexts = context.expand(len(classes), *context.shape[-2:]).split(CHUNK)
            parts: list[tuple[Tensor, ...]] = list(zip(tokens, contexts, strict=True))
        else:
            parts = [(t, context, o) for t, o in zip(tokens, of.split(CHUNK), strict=True)]
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._encode(deep, *part) for part in parts])
        return torch.cat([checkpoint(partial(self._encode, deep), *part, use_reentrant=False) for part in parts])

    def _encode(self, deep: Sequence[Tensor], tokens: Tensor, context: Tensor, of: Tensor | None = None) -> Tensor:
        context = context if of is None else context[of]
        with flags(self.precision, tokens.device), computing(self.precision), self._in_place(context, deep):
            features = self.clip.encode_text(tokens)
        return F.normalize(features.float(), dim=1)

    @contextlib.contextmanager
    def _in_place(self, context: Tensor, deep: Sequence[Tensor] = ()) -> Iterator[None]:
        """In this context the token embedding gives `context` `[b, m, width]` after the first token, and later blocks get
        `deep` there."""

        def put(module: nn.Module, args: tuple[Tensor, ...], found: Tensor) -> Tensor:
            return torch.cat([found[:, :1], context.to(found.dtype), found[:, 1 + context.shape[1] :]], 1)

        count, later = context.shape[1], self.blocks[1 : 1 + len(deep)] if len(deep) else []
        hooks = [self.embedding.register_forward_hook(put)]
        hooks += [replaced(block, own[None], 1, count) for block, own in zip(later, deep, strict=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
