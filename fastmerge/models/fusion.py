"""The head of PROOF: projections of image and text, and attention over the image, the classes and context prompts.

Attention (one head, Vaswani et al. 2017) over the tokens x_i of one image:

    x_i <- LayerNorm(x_i + W_o sum_j softmax_j(q(x_i) k(x_j) / sqrt d) v(x_j) + b_o)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.models.heads import TextHead
from fastmerge.models.precision import tf32
from fastmerge.models.trainable import PassesThrough

PROJECTIONS = ("image", "image_bias", "text", "text_bias")
ATTENTION = ("query", "key", "value", "out", "out_bias", "norm", "norm_bias")
GROWING = ("known", "contexts")


class FusionHead(TextHead):
    """weight: the text embeddings of the classes. sum `[classes, d]`, count `[classes]`: of the features of length 1, for the
    prototypes. known: `[k]`, the classes so far; only they take part, and the others have the logit -inf.

    image, text `[d, d]`, image_bias, text_bias `[d]`: the sums of the tasks' projections. contexts: `[T m, d]`. query, key,
    value, out `[d, d]`, out_bias, norm, norm_bias `[d]`: of the attention.

    over_batch: the class texts and prototypes after the attention are means over the batch, not those of each image.
    """

    per_class = ("weight", "sum", "count")
    knows_all = False
    needs_initial_features = True
    sum: Tensor
    count: Tensor
    known: Tensor
    contexts: Tensor

    def __init__(self, weight: Tensor, scale: float, over_batch: bool):
        super().__init__(weight, scale)
        (classes, d), self.over_batch = weight.shape, over_batch
        self.register_buffer("batch", torch.tensor(over_batch))
        self.register_buffer("sum", torch.zeros(classes, d))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("known", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("contexts", torch.zeros(0, d))
        for name in (*PROJECTIONS, *ATTENTION):
            shape = (d,) if name in ("norm", "norm_bias") or name.endswith("_bias") else (d, d)
            self.register_buffer(name, torch.zeros(shape))

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> FusionHead:
        """The head with this state."""
        head = cls(state["weight"], float(state["scale"]), bool(state["batch"]))
        head.load_state_dict(state)
        return head

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in GROWING:
            setattr(self, name, getattr(self, name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def grow(self, classes: Sequence[int], generator: torch.Generator) -> None:
        known = self.known.tolist()
        fresh = [c for c in classes if c not in known]
        self.known = torch.tensor(known + fresh, dtype=torch.int64, device=self.known.device)

    def observe(self, features: Tensor, labels: Tensor) -> None:
        member = F.one_hot(labels, len(self.count))  # not index_add_, whose order of summation varies on a GPU
        self.sum += member.T.to(self.sum.dtype) @ F.normalize(features.to(self.sum.dtype), dim=1)
        self.count += member.sum(0)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        parts = self.parts(features, {name: self.get_buffer(name) for name in (*PROJECTIONS, *ATTENTION, "contexts")})
        hit = classes[:, None] == self.known
        return (parts[0] + parts[1] + parts[2])[:, hit.int().argmax(1)].masked_fill(~hit.any(1), -torch.inf)

    def parts(self, features: Tensor, fusion: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of the known classes, `[b, k]` each: of the projections, of the class texts after the attention, of the
        prototypes after the attention. features: `[b, d]`; fusion: projections, attention and contexts by name."""
        k, means = len(self.known), self.sum[self.known] / self.count[self.known].clamp(min=1)[:, None]
        with tf32(False):
            image, mean = (
                F.normalize(F.linear(x, fusion["image"], fusion["image_bias"]), dim=1)
                for x in (F.normalize(features, dim=1), means)
            )
            text = F.normalize(F.linear(self.weight[self.known], fusion["text"], fusion["text_bias"]), dim=1)
            shared = torch.cat([text, mean, fusion["contexts"]]).expand(len(image), -1, -1)
            fused = attended(torch.cat([image[:, None], shared], 1), fusion)
            its, texts, means = fused[:, 0], fused[:, 1 : 1 + k], fused[:, 1 + k : 1 + 2 * k]
            if self.over_batch:
                texts, means = (x.mean(0).expand_as(x) for x in (texts, means))
            near = [torch.einsum("bd,bkd->bk", its, x) for x in (texts, means)]
            return self.scale * image @ text.T, near[0], near[1]


def attended(tokens: Tensor, fusion: dict[str, Tensor]) -> Tensor:
    """The tokens `[b, n, d]` after the attention."""
    q, k, v = (tokens @ fusion[name].T for name in ("query", "key", "value"))
    mixed = (q @ k.mT / tokens.shape[2] ** 0.5).softmax(2) @ v
    return F.layer_norm(
        tokens + F.linear(mixed, fusion["out"], fusion["out_bias"]),
        tokens.shape[2:],
        fusion["norm"],
        fusion["norm_bias"],
    )


class NewProjections(PassesThrough):
    """What a task trains: its projections and `context` `[m, d]`, drawn anew, and the attention, which goes on from the
    head's."""

    def __init__(self, head: FusionHead, tokens: int, generator: torch.Generator):
        super().__init__()
        d = head.weight.shape[1]

        def drawn(*shape: int) -> Tensor:  # as in nn.Linear
            return torch.empty(shape).uniform_(-(d**-0.5), d**-0.5, generator=generator)

        for name in PROJECTIONS:
            setattr(self, name, nn.Parameter(drawn(*head.get_buffer(name).shape)))
        self.context = nn.Parameter(torch.randn(tokens, d, generator=generator))
        start = {name: head.get_buffer(name).cpu() for name in ATTENTION}
        if not len(head.contexts):  # the first task
            start = {name: torch.randn(d, d, generator=generator) * d**-0.5 for name in ATTENTION[:4]}
            start |= {"out_bias": drawn(d), "norm": torch.ones(d), "norm_bias": torch.zeros(d)}
        for name, value in start.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def added(self, head: FusionHead) -> dict[str, Tensor]:
        """The head's projections, attention and contexts with those of the task."""
        sums = {name: head.get_buffer(name) + self.get_parameter(name) for name in PROJECTIONS}
        attention = {name: self.get_parameter(name) for name in ATTENTION}
        return sums | attention | {"contexts": torch.cat([head.contexts, self.context])}
