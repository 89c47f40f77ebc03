"""Prompts in a transformer whose weights do not change: prefix keys and values, and inserted tokens.

prefix: of a block, `(keys, values)`, each `[b or 1, p, width]`. They are split into heads and put before the keys and values
of the block's attention, after its projections (Li & Liang 2021; DualPrompt, eq. 6 and released code).
tokens: of a block, `[b or 1, p, width]`. Those of block 0 are inserted after the class token, in front where there is none;
those of a later block replace them there (VPT-deep, MaPLe). They leave after the last block, so pooling sees none.

Attention is intercepted: `F.scaled_dot_product_attention` of timm's blocks, and `F.multi_head_attention_forward` of
open_clip's, which is then written out in its products. Blocks without a prefix run as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fastmerge.errors import UserError, first_line
from fastmerge.models.attention import self_attention
from fastmerge.models.recompute import blocks_of
from fastmerge.wording import counted


@dataclass(frozen=True)
class Prompt:
    """prefix: block (from 0) -> keys and values; tokens: block -> tokens, which need some of block 0. See above."""

    prefix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)


class Prefixed(TorchFunctionMode):
    """In this mode, the attention of block i attends to `prefix[i]` too. block: the number of attentions seen, minus one."""

    def __init__(self, prefix: dict[int, tuple[Tensor, Tensor]], block: int = -1):
        super().__init__()
        self.prefix, self.block = prefix, block

    def again(self) -> Prefixed:
        """This mode as it is now, for running the next block once more."""
        return Prefixed(self.prefix, self.block)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None and len(args) == 3:
            self.block += 1
            if self.block in self.prefix:
                return self.mix(*args, **kwargs)
        elif function is F.multi_head_attention_forward and (given := self_attention(args, kwargs)):
            self.block += 1
            if self.block in self.prefix:
                return given.instead(F.linear, self.mix)
        return function(*args, **kwargs)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        """Attention of q, k, v `[b, heads, t, width / heads]` with the prefix of this block."""
        before = [x.to(k.dtype).unflatten(-1, (k.shape[1], -1)).transpose(1, 2) for x in self.prefix[self.block]]
        keys, values = (x.expand(k.shape[0], -1, -1, -1) for x in before)
        return F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), **kwargs)


def with_tokens(backbone: Any, images: Tensor, tokens: Tensor) -> Tensor:
    """The features with tokens `[blocks, p, width]` in the inputs of the first blocks, the same for all images."""
    return backbone.prompted(images, Prompt(tokens={i: own[None] for i, own in enumerate(tokens)}))


def mean_tokens(backbone: Any, images: Tensor) -> Tensor:
    """The mean of every image's tokens at the input of block 0, without the class token, `[b, width]`."""
    block, at, seen = blocks_of(backbone)[0], int(backbone.has_class_token), list[Tensor]()

    def keep(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0] if batch_first(block) else args[0].transpose(0, 1)
        seen.append(x[:, at:].float().mean(1))

    hook = block.register_forward_pre_hook(keep)
    try:
        backbone.prompted(images, Prompt(tokens={0: images.new_zeros(1, 0, backbone.width)}))
    finally:
        hook.remove()
    return seen[0]


@contextlib.contextmanager
def prompting(backbone: Any, prompt: Prompt | None) -> Iterator[None]:
    """In this context, a forward pass of `backbone` is prompted."""
    with contextlib.ExitStack() as stack:
        if prompt is not None and prompt.tokens:
            stack.enter_context(inserted(backbone, prompt.tokens))
        if prompt is not None and (prefix := {i: kv for i, kv in prompt.prefix.items() if kv[0].shape[1]}):
            stack.enter_context(Prefixed(prefix))
        yield


@contextlib.contextmanager
def inserted(backbone: Any, tokens: dict[int, Tensor]) -> Iterator[None]:
    """In this context, a forward pass of `backbone` has these tokens."""
    blocks, at, count = blocks_of(backbone), int(backbone.has_class_token), tokens[0].shape[1]
    hooks = [replaced(blocks[i], own, at, count * (i > 0)) for i, own in tokens.items()]
    hooks.append(blocks[-1].register_forward_hook(partial(_remove, at, count)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def replaced(block: nn.Module, own: Tensor, at: int, count: int) -> RemovableHandle:
    """A hook that puts tokens `[b or 1, p, width]` into the block's input in place of the `count` at `at`."""
    return block.register_forward_pre_hook(partial(_insert, own, at, count))


def _insert(own: Tensor, at: int, count: int, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put tokens into the block's input `[b, t, width]` in place of the `count` at `at`."""
    first = args[0]
    x = first if batch_first(block) else first.transpose(0, 1)
    x = torch.cat([x[:, :at], own.to(x.dtype).expand(len(x), -1, -1), x[:, at + count :]], 1)
    return (x if batch_first(block) else x.transpose(0, 1), *args[1:])


def _remove(at: int, count: int, block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    x = out if batch_first(block) else out.transpose(0, 1)
    x = torch.cat([x[:, :at], x[:, at + count :]], 1)
    return x if batch_first(block) else x.transpose(0, 1)


def batch_first(block: nn.Module) -> bool:
    """Whether the block's input is `[b, t, width]`; nn.MultiheadAttention may take `[t, b, width]`."""
    attention = getattr(block, "attn", None)
    return attention.batch_first if isinstance(attention, nn.MultiheadAttention) else True


@torch.no_grad()
def check_prompts(backbone: Any, blocks: Collection[int], flag: str, tokens: bool = False) -> None:
    """Raise UserError unless the backbone has these blocks (from 0), and prompts reach them. flag: names the blocks in
    messages. tokens: whether prompts are inserted tokens."""
    try:
        found = len(blocks_of(backbone)) * bool(backbone.width)
    except UserError:
        found = 0
    if not found:
        why = "no transformer blocks with a class token, which prompts need"
        raise UserError(f"model {backbone.name} has {why}: choose a ViT")
    if wrong := [i for i in blocks if i >= found]:
        raise UserError(
            f"{flag} {wrong[0]}: model {backbone.name} has {counted(found, 'block')}; expected 0 to {found - 1}"
        )
    device = next(backbone.parameters()).device
    images = torch.zeros(1, 3, backbone.image_size, backbone.image_size, device=device)
    own = torch.ones(1, 1, backbone.width, device=device)
    mode, before = Prefixed({}), list[int]()
    hooks = [block.register_forward_pre_hook(lambda *_: before.append(mode.block)) for block in blocks_of(backbone)]
    why = ""
    try:
        with mode:
            plain = backbone(images)
        for i in blocks:
            prompt = Prompt(tokens={0: own} | {i: own}) if tokens else Prompt({i: (own, own)})
            if torch.equal(backbone.prompted(images, prompt), plain):
                why = f"block {i} does not change"
    except (AttributeError, RuntimeError, ValueError) as error:  # a block of another form
        why = first_line(error)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens and before[:found] != list(range(-1, found - 1)):
        why = "its blocks have no attention of the usual form"
    if why:
        raise UserError(f"model {backbone.name}: prompts do not reach its attention ({why}); choose a plain ViT")


def drawn_prefix(backbone: Any, length: int, generator: torch.Generator) -> list[Tensor]:
    """A prefix `[2, length, width]` for every block, normal with standard deviation 0.02."""
    device, shape = next(backbone.parameters()).device, (2, length, backbone.width)
    return [0.02 * torch.randn(shape, generator=generator).to(device) for _ in blocks_of(backbone)]
