"""Heads: from features to the logits of any set of classes.

text: frozen embeddings of the class names (Radford et al. 2021), as in magmax's `src/heads.py`; one class works too.
linear: a linear layer that gets rows when classes arrive, as in PyCIL and P&M. Rows are trained, never merged.
prototype: normalised class means under the frozen starting model, for backbones without a text tower.

The columns of the logits follow the order of `classes`, which are indices into the data set's class names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.errors import UserError, nearest
from fastmerge.models.backbone import Backbone
from fastmerge.models.precision import tf32
from fastmerge.models.text_embeddings import text_weights

if TYPE_CHECKING:
    from fastmerge.models.openclip import TextEncoder

KINDS = ("text", "linear", "prototype")


class Head(nn.Module):
    """The interface of a head. `state_dict()` holds all its state and also loads into a head that has not grown."""

    kind: str
    per_class: tuple[str, ...]  # tensors of the state with one row per class
    knows_all = False  # whether it classifies classes that it has not met in training
    needs_initial_features = False  # whether `observe` needs the starting model's features on every new task

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """features `[b, d]`, classes `[k]` int64 -> logits `[b, k]`, without TF32 under any `--precision`."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def grow(self, classes: Sequence[int], generator: torch.Generator) -> None:
        """Prepare for a task with these classes; classes that are already known do not change."""

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Take in features `[b, d]` of the starting model with labels `[b]` (class indices)."""

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Load the state of a head of this kind that knew the first classes of this one; the later classes stay as they
        are."""
        own = self.state_dict()
        wide = {name: torch.cat([state[name], own[name][len(state[name]) :].cpu()]) for name in self.per_class}
        self.load_state_dict(state | wide)

    def trainable(self) -> list[nn.Parameter]:
        return []


class TextHead(Head):
    """logits = scale * cos(feature, text embedding); frozen. weight: `[classes, d]` fp32, L2-normalised rows."""

    kind = "text"
    knows_all = True
    per_class: tuple[str, ...] = ("weight",)
    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: float):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        with tf32(False):
            return self.scale * F.normalize(features, dim=1) @ self.weight[classes].T


class AttributeHead(TextHead):
    """A text head whose class rows depend on the image (AttriCLIP): the `top` of N keys that are nearest to its feature by
    cosine choose a set of attributes, and every set has its own rows.

    weight: rows of the starting head; keys: `[N, d]`; members: `[sets, N]` bool; table: `[classes, sets, d]` fp32,
    L2-normalised rows. Classes without rows in the table, which are zero, have the logit 0.
    """

    knows_all = False
    per_class = ("weight", "table")
    keys: Tensor
    members: Tensor
    table: Tensor

    def __init__(self, weight: Tensor, scale: float, count: int, top: int):
        super().__init__(weight, scale)
        self.top = top
        sets = torch.combinations(torch.arange(count), top)
        self.register_buffer("keys", torch.zeros(count, weight.shape[1]))
        self.register_buffer("members", F.one_hot(sets, count).sum(1).bool())
        self.register_buffer("table", torch.zeros(len(weight), len(sets), weight.shape[1]))

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> AttributeHead:
        """The head with this state."""
        members = state["members"]
        head = cls(state["weight"], float(state["scale"]), members.shape[1], int(members[0].sum()))
        head.load_state_dict(state)
        return head

    def which(self, features: Tensor, keys: Tensor) -> Tensor:
        """The number of the set that each image chooses, `[b]` int64. features `[b, d]`, keys `[N, d]`."""
        with tf32(False):
            near = F.normalize(features, dim=1) @ F.normalize(keys.to(features.dtype), dim=1).T
        chosen = F.one_hot(near.topk(self.top, dim=1).indices, self.members.shape[1]).sum(1).float()
        return (chosen @ self.members.T.float()).argmax(1)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        return self.logits(features, self.table[classes].transpose(0, 1), self.which(features, self.keys))

    def logits(self, features: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        """features `[b, d]`, rows `[sets, k, d]`, which `[b]` -> `[b, k]`."""
        with tf32(False):
            return self.scale * torch.einsum("bd,bkd->bk", F.normalize(features, dim=1), rows[which])


class LinearHead(Head):
    """logits = features W^T + b over the classes known so far. Rows start at zero; weight `[known, d]`, bias `[known]`.

    In a domain-incremental run all classes are known from the first task on, and training continues with the same rows.
    A loaded state brings its own d: RanPAC's features are longer than the backbone's.
    """

    kind = "linear"
    per_class = ("row",)
    row: Tensor

    def __init__(self, feature_dim: int, n_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, feature_dim))
        self.bias = nn.Parameter(torch.zeros(0))
        self.register_buffer("row", torch.full((n_classes,), -1))  # row of each class, -1 if it has none

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        rows = self.row[classes]
        with tf32(False):
            logits = features @ self.weight[rows].T + self.bias[rows]
        return logits.masked_fill(rows < 0, -torch.inf)  # --eval-classes all asks for classes without a row

    def grow(self, classes: Sequence[int], generator: torch.Generator) -> None:
        new = [c for c in classes if self.row[c] < 0]
        known = len(self.weight)
        self.row[new] = torch.arange(known, known + len(new), device=self.row.device)
        for name in ("weight", "bias"):
            old = getattr(self, name).detach()
            value = old.new_zeros(known + len(new), *old.shape[1:])
            value[:known] = old
            setattr(self, name, nn.Parameter(value))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("weight", "bias"):
            value = getattr(self, name).new_zeros(state_dict[prefix + name].shape)
            setattr(self, name, nn.Parameter(value))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def trainable(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]


class PrototypeHead(Head):
    """logits = scale * cos(feature, mean of the class's normalised features under the starting model).

    It keeps sums and counts, so a class that returns in another domain refines its mean.
    scale: 100 as in OpenAI's CLIP.
    """

    kind = "prototype"
    per_class = ("sum", "count")
    needs_initial_features = True
    sum: Tensor
    count: Tensor
    scale: Tensor

    def __init__(self, feature_dim: int, n_classes: int, scale: float = 100.0):
        super().__init__()
        self.register_buffer("sum", torch.zeros(n_classes, feature_dim))
        self.register_buffer("count", torch.zeros(n_classes, dtype=torch.int64))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        with tf32(False):
            logits = self.scale * F.normalize(features, dim=1) @ F.normalize(self.sum[classes], dim=1).T
        return logits.masked_fill(self.count[classes] == 0, -torch.inf)

    def observe(self, features: Tensor, labels: Tensor) -> None:
        member = F.one_hot(labels, len(self.count))  # not index_add_, whose order of summation varies on a GPU
        self.sum += member.T.to(self.sum.dtype) @ F.normalize(features.to(self.sum.dtype), dim=1)
        self.count += member.sum(0)


def build_head(
    kind: str,
    *,
    backbone: Backbone,
    encoder: TextEncoder | None,
    class_names: Sequence[str],
    templates: Sequence[str] | Sequence[Sequence[str]],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Head:
    """Build a `text`, `linear` or `prototype` head on the CPU.

    templates: of all classes, or those of each. `device`, `progress`: see `text_weights`.

    Raises:
        UserError: the kind is unknown, or a text head is asked of a backbone without a text tower.
    """
    if kind == "linear":
        return LinearHead(backbone.feature_dim, len(class_names))
    if kind == "prototype":
        return PrototypeHead(backbone.feature_dim, len(class_names))
    if kind != "text":
        raise UserError(f"unknown head {kind!r}.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}")
    if encoder is None:
        raise UserError(f"--head text: model {backbone.name} has no text tower; use --head prototype or --head linear")
    key = f"{backbone.name} {encoder.weights_sha256}"
    rows: dict[tuple[str, ...], list[int]] = {}  # templates -> the classes that have them
    for c in range(len(class_names)):
        own = templates if isinstance(templates[0], str) else templates[c]
        rows.setdefault(tuple(map(str, own)), []).append(c)
    weight = torch.zeros(len(class_names), backbone.feature_dim)
    for prompts, classes in rows.items():
        names = [class_names[c] for c in classes]
        weight[classes] = text_weights(encoder, names, prompts, key, device=device, progress=progress)
    return TextHead(weight, encoder.logit_scale)
