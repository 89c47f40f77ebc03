"""Pools of prompts for a frozen transformer: which prompt an image gets follows from its query, the feature of the same
image under the backbone without prompts.

A pool holds the prompts of every task so far, so it grows with the tasks and their number need not be known. Its tensors
are its whole state: `trained` ones are parameters of the current task, the others belong to earlier tasks or are numbers.
d: length of a query; width: of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.models.precision import tf32
from fastmerge.models.prompts import Prompt

Tensors = dict[str, Tensor]


class Pool(nn.Module, ABC):
    """kind: name in `POOLS`. trained: names of the tensors that a task trains. weight: of the pool's term of the loss."""

    kind: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    weight: float

    def __init__(self, tensors: Tensors):
        super().__init__()
        for name, value in tensors.items():
            if name in self.trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @abstractmethod
    def forward(self, query: Tensor) -> Prompt:
        """The prompts of a batch at test time. query: `[b, d]`."""

    def in_training(self, query: Tensor) -> tuple[Prompt, Tensor]:
        """The prompts of a training batch, and the term of the loss that belongs to them (a mean over the images)."""
        return self(query), query.new_zeros(())

    def grown(self, generator: torch.Generator) -> Tensors:
        """The tensors with which the next task starts."""
        return dict(self.state_dict())


class L2PPool(Pool):
    """L2P (Wang et al. 2022, CVPR). prompts `[M, p, width]`, keys `[M, d]`; an image gets the prompts of the `top` nearest
    keys, one after the other, as tokens. by_batch: all images of a batch get those that most of them would choose."""

    kind, trained = "l2p", ("prompts", "keys")
    prompts: Tensor
    keys: Tensor

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.count, self.vote = int(tensors["top"]), bool(tensors["by_batch"])
        self.weight = float(tensors["pull"])

    @classmethod
    def start(
        cls, size: int, length: int, width: int, d: int, top: int, pull: float, vote: bool, generator: torch.Generator
    ) -> L2PPool:
        return cls(
            {
                "prompts": uniform(size, length, width, generator=generator),
                "keys": uniform(size, d, generator=generator),
                "top": torch.tensor(top),
                "by_batch": torch.tensor(vote),
                "pull": torch.tensor(pull),
            }
        )

    def forward(self, query: Tensor) -> Prompt:
        return self.at(nearest(cosines(query, self.keys), self.count, self.vote))

    def in_training(self, query: Tensor) -> tuple[Prompt, Tensor]:
        cosine = cosines(query, self.keys)
        chosen = nearest(cosine, self.count, self.vote)
        return self.at(chosen), -self.weight * cosine.gather(1, chosen).sum(1).mean()

    def at(self, chosen: Tensor) -> Prompt:
        """chosen: `[b, top]`."""
        tokens = F.embedding(chosen, self.prompts.flatten(1)).view(len(chosen), -1, self.prompts.shape[2])
        return Prompt(tokens={0: tokens})


class DualPool(Pool):
    """DualPrompt (Wang et al. 2022, ECCV). general `[blocks, 2, p, width]`: prefix keys and values that all images have,
    at blocks `general_at`. expert, key: those of the current task at blocks `expert_at`, and their key `[d]`; experts
    `[t, blocks, 2, p, width]`, keys `[t, d]`: those of earlier tasks."""

    kind, trained = "dualprompt", ("general", "expert", "key")
    general: Tensor
    expert: Tensor
    key: Tensor
    experts: Tensor
    keys: Tensor

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.blocks = [tensors[name].tolist() for name in ("general_at", "expert_at")]
        self.vote, self.weight = bool(tensors["by_batch"]), float(tensors["pull"])

    @classmethod
    def start(
        cls,
        blocks: tuple[tuple[int, ...], tuple[int, ...]],
        lengths: tuple[int, int],
        width: int,
        d: int,
        pull: float,
        vote: bool,
        generator: torch.Generator,
    ) -> DualPool:
        general, expert = (
            uniform(len(at), 2, length, width, generator=generator) for at, length in zip(blocks, lengths, strict=True)
        )
        return cls(
            {
                "general": general,
                "expert": expert,
                "key": uniform(d, generator=generator),
                "experts": torch.zeros(0, *expert.shape),
                "keys": torch.zeros(0, d),
                "general_at": torch.tensor(blocks[0], dtype=torch.int64),
                "expert_at": torch.tensor(blocks[1], dtype=torch.int64),
                "by_batch": torch.tensor(vote),
                "pull": torch.tensor(pull),
            }
        )

    def forward(self, query: Tensor) -> Prompt:
        keys, experts = torch.cat([self.keys, self.key[None]]), torch.cat([self.experts, self.expert[None]])
        chosen = nearest(cosines(query, keys), 1, self.vote)[:, 0]
        return self.at(experts[chosen])

    def in_training(self, query: Tensor) -> tuple[Prompt, Tensor]:
        return self.at(self.expert[None]), -self.weight * cosines(query, self.key[None]).mean()

    def at(self, expert: Tensor) -> Prompt:
        """expert: `[b or 1, blocks, 2, p, width]`."""
        prefix = {i: (own[0][None], own[1][None]) for i, own in zip(self.blocks[0], self.general, strict=True)}
        for i, own in zip(self.blocks[1], expert.unbind(1), strict=True):
            keys, values = own.unbind(1)
            if i in prefix:  # a block with both: the general ones first
                pairs = zip(prefix[i], (keys, values), strict=True)
                keys, values = (torch.cat([a.expand(len(b), -1, -1), b], 1) for a, b in pairs)
            prefix[i] = keys, values
        return Prompt(prefix)

    def grown(self, generator: torch.Generator) -> Tensors:
        """The next task's prompt starts as this one's, and its key anew (released code)."""
        now = dict(self.state_dict())
        return now | {
            "experts": torch.cat([now["experts"], now["expert"][None]]),
            "keys": torch.cat([now["keys"], now["key"][None]]),
            "key": uniform(len(now["key"]), generator=generator).to(now["key"].device),
        }


class CodaPool(Pool):
    """CODA-Prompt (Smith et al. 2023). For every block of `at`: components `[blocks, c, p, width]` with a key and an
    attention vector each, `[blocks, c, d]`. The prompt is the sum of all components, each times the cosine of its key and
    (query x attention) (eq. 4, 5); its first half are prefix keys, the second half values. old_*: of earlier tasks."""

    kind, trained = "coda", ("components", "keys", "attention")

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.blocks, self.weight = tensors["at"].tolist(), float(tensors["ortho"])

    @classmethod
    def start(
        cls,
        blocks: tuple[int, ...],
        count: int,
        length: int,
        width: int,
        d: int,
        ortho: float,
        generator: torch.Generator,
    ) -> CodaPool:
        n, about = len(blocks), {"at": torch.tensor(blocks, dtype=torch.int64), "ortho": torch.tensor(ortho)}
        shapes = {"components": (n, count, length, width), "keys": (n, count, d), "attention": (n, count, d)}
        old = {f"old_{name}": torch.zeros(n, 0, *shape[2:]) for name, shape in shapes.items()}
        new = {name: orthonormal(old[f"old_{name}"], shape, generator) for name, shape in shapes.items()}
        return cls(about | old | new)

    def parts(self) -> list[Tensor]:
        """Components, keys and attention vectors of all tasks, `[blocks, C, ...]`."""
        return [torch.cat([getattr(self, f"old_{name}"), getattr(self, name)], 1) for name in self.trained]

    def forward(self, query: Tensor) -> Prompt:
        components, keys, attention = self.parts()
        unit = F.normalize(keys, dim=2)
        with tf32(False):  # cosine of (query x attention) and the key, without a [b, C, d] tensor
            product = query @ (attention * unit).mT
            size = (query.square() @ attention.square().mT).sqrt().clamp_min(1e-12)
            prompts = (product / size) @ components.flatten(2)
        halves = prompts.unflatten(2, components.shape[2:]).chunk(2, 2)  # [blocks, b, p / 2, width]
        return Prompt({i: (halves[0][j], halves[1][j]) for j, i in enumerate(self.blocks)})

    def in_training(self, query: Tensor) -> tuple[Prompt, Tensor]:
        penalty = query.new_zeros(())
        if self.weight:
            for part in self.parts():
                rows = part.flatten(2)
                with tf32(False):
                    products = rows @ rows.mT
                wanted = torch.eye(rows.shape[1], device=rows.device)
                penalty = penalty + self.weight * (products - wanted).square().mean((1, 2)).sum()
        return self(query), penalty

    def grown(self, generator: torch.Generator) -> Tensors:
        """Components of the next task, orthogonal to all earlier ones while there are dimensions left."""
        now = dict(self.state_dict())
        for name in self.trained:
            old = torch.cat([now[f"old_{name}"], now[name]], 1)
            new = orthonormal(old, now[name].shape, generator)
            now |= {f"old_{name}": old, name: new.to(old.device)}
        return now


class HidePool(Pool):
    """HiDe-Prompt (Wang et al. 2023). prompt `[blocks, 2, p, width]`: prefix keys and values of the current task at blocks
    `at`; prompts `[t, blocks, 2, p, width]`: those of earlier tasks. identity_weight `[k, d]`, identity_bias `[k]`: a linear
    head on the query, with a row for every class of every task; task, classes `[k]`: of each row. The task of the row with
    the largest logit says which prompt an image gets."""

    kind, trained = "hide", ("prompt",)
    prompt: Tensor
    prompts: Tensor
    identity_weight: Tensor
    identity_bias: Tensor
    task: Tensor
    classes: Tensor
    momentum: Tensor

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.blocks = tensors["at"].tolist()

    @classmethod
    def start(
        cls, at: tuple[int, ...], length: int, width: int, d: int, momentum: float, generator: torch.Generator
    ) -> HidePool:
        prompt = uniform(len(at), 2, length, width, generator=generator)
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            {
                "prompt": prompt,
                "prompts": torch.zeros(0, *prompt.shape),
                "identity_weight": torch.zeros(0, d),
                "identity_bias": torch.zeros(0),
                "task": none,
                "classes": none.clone(),
                "at": torch.tensor(at, dtype=torch.int64),
                "momentum": torch.tensor(momentum),
            }
        )

    def forward(self, query: Tensor) -> Prompt:
        logits = identity_logits(query, self.identity_weight, self.identity_bias)
        return self.at_blocks(torch.cat([self.prompts, self.prompt[None]])[self.task[logits.argmax(1)]])

    def own(self) -> Tensor:
        """The current task's prompt while it is trained: with a share of the mean of the earlier ones."""
        if not len(self.prompts):
            return self.prompt
        return (1 - self.momentum) * self.prompt + self.momentum * self.prompts.mean(0)

    def at_blocks(self, prompts: Tensor) -> Prompt:
        """prompts: `[b or 1, blocks, 2, p, width]`."""
        return Prompt({i: (own[:, 0], own[:, 1]) for i, own in zip(self.blocks, prompts.unbind(1), strict=True)})

    def grown(self, generator: torch.Generator) -> Tensors:
        """The next task's prompt starts as this one's (released code)."""
        now = dict(self.state_dict())
        return now | {"prompts": torch.cat([now["prompts"], now["prompt"][None]])}

    def rows_for(self, classes: Sequence[int]) -> Tensors:
        """The tensors with rows for the classes of the current task, which start at zero."""
        now, k = dict(self.state_dict()), len(classes)
        new = {
            "identity_weight": now["identity_weight"].new_zeros(k, now["identity_weight"].shape[1]),
            "identity_bias": now["identity_bias"].new_zeros(k),
            "task": now["task"].new_full((k,), len(now["prompts"])),
            "classes": now["classes"].new_tensor(classes),
        }
        return now | {name: torch.cat([now[name], rows]) for name, rows in new.items()}


POOLS: dict[str, type[Pool]] = {pool.kind: pool for pool in (L2PPool, DualPool, CodaPool, HidePool)}


def identity_logits(query: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[b, d]`, `[k, d]`, `[k]` -> `[b, k]`."""
    with tf32(False):
        return query @ weight.T + bias


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniform in (-1, 1) (PILOT)."""
    return torch.empty(shape).uniform_(-1, 1, generator=generator)


def orthonormal(old: Tensor, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random rows of length 1 on the CPU, for every block orthogonal to each other and to the rows of `old`; random
    directions where the dimensions do not suffice. old: `[blocks, C, ...]`; shape: of the result, `[blocks, c, ...]`."""
    new, before = torch.randn(shape, generator=generator), old.cpu().flatten(2)
    rows, count = new.flatten(2), before.shape[1]
    if count + rows.shape[1] > rows.shape[2]:
        return F.normalize(rows, dim=2).view(shape)
    return torch.linalg.qr(torch.cat([before, rows], 1).mT).Q[..., count:].mT.reshape(shape).contiguous()


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """`[b, d]`, `[M, d]` -> `[b, M]`."""
    with tf32(False):
        return F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T


def nearest(cosine: Tensor, count: int, vote: bool) -> Tensor:
    """The `count` nearest keys of every image, `[b, count]`; vote: for all images those that most of them have."""
    chosen = cosine.topk(count, 1).indices
    if not vote:
        return chosen
    votes = F.one_hot(chosen, cosine.shape[1]).sum((0, 1))
    return votes.argsort(descending=True, stable=True)[:count].expand(len(cosine), -1)
