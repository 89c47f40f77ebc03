"""A concept bottleneck: scores of concepts, and classes as sparse sums of them (Yu et al. 2025, CLG-CBM)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.models.heads import Head
from fastmerge.models.precision import tf32


class ConceptHead(Head):
    """logits = W L f, f the feature of length 1.

    layer: L `[n, d]`, a row for every concept; embeddings: `[n, d]`, the concepts' texts, L2-normalised; weight: W `[k, n]`;
    known: the k classes, others have the logit -inf; texts: the concepts, UTF-8 bytes of lines.
    """

    kind = "concepts"
    per_class = ()
    layer: Tensor
    embeddings: Tensor
    weight: Tensor
    known: Tensor
    texts: Tensor

    def __init__(self, d: int):
        super().__init__()
        for name, shape in (("layer", (0, d)), ("embeddings", (0, d)), ("weight", (0, 0))):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("known", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("texts", torch.zeros(0, dtype=torch.uint8))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, own in list(self.named_buffers()):
            setattr(self, name, own.new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def concepts(self) -> list[str]:
        """The texts of the concepts, in the order of the scores."""
        return bytes(self.texts.tolist()).decode().splitlines()

    def add_texts(self, concepts: list[str]) -> None:
        new = "".join(f"{' '.join(text.split())}\n" for text in concepts).encode()
        self.texts = torch.cat([self.texts, torch.tensor(list(new), dtype=torch.uint8, device=self.texts.device)])

    def scores(self, features: Tensor) -> Tensor:
        """How much every concept is in an image: `[b, d]` -> `[b, n]`."""
        with tf32(False):
            return F.normalize(features, dim=1) @ self.layer.T

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        hit = classes[:, None] == self.known
        with tf32(False):
            logits = self.scores(features) @ self.weight[hit.int().argmax(1)].T
        return logits.masked_fill(~hit.any(1), -torch.inf)


def drawn(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Weights as in nn.Linear, `[rows, columns]`."""
    return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)


class Gate(nn.Module):
    """What chooses concepts: centres `[n, d]`, batch normalisation, and a linear layer to k classes."""

    mean: Tensor
    variance: Tensor

    def __init__(self, n: int, d: int, k: int, generator: torch.Generator):
        super().__init__()
        self.centres = nn.Parameter(drawn(generator, n, d))
        self.scale, self.shift = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.weight, self.bias = (
            nn.Parameter(drawn(generator, k, n)),
            nn.Parameter(drawn(generator, k, n)[:, 0].clone()),
        )
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("variance", torch.ones(n))

    def forward(self, features: Tensor) -> Tensor:
        training = self.training and len(features) > 1  # one feature has no variance
        scores = features @ self.centres.T
        scores = F.batch_norm(scores, self.mean, self.variance, self.scale, self.shift, training)
        return F.linear(scores, self.weight, self.bias)

    def distance(self, mean: Tensor, inverse: Tensor, wanted: Tensor) -> Tensor:
        """The regulariser: how far the mean squared Mahalanobis distance of the centres, of length 1, is from that of the
        concepts, over the fifth power of the latter."""
        centres = self.centres / torch.linalg.vector_norm(self.centres.detach(), dim=1, keepdim=True)
        return ((mahalanobis(centres, mean, inverse) - wanted) / wanted**5).abs()


def mahalanobis(rows: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Mean of (x - mean)^T inverse (x - mean) over the rows x, `[n, d]`."""
    apart = rows - mean
    return ((apart @ inverse) * apart).sum(1).mean()


def nearest_unused(centres: Tensor, concepts: Tensor, number: int) -> Tensor:
    """For each of the first `number` centres in turn, the nearest concept that is not taken. Rows of `concepts`, int64.

    centres: `[m, d]`; concepts: `[n, d]`, of length 1; number is at most m and n.
    """
    near = F.normalize(centres, dim=1) @ concepts.T  # the largest cosine is the least distance
    taken, chosen = torch.zeros(len(concepts), device=concepts.device), []
    for row in near[:number]:
        best = (row - taken).argmax()[None]
        chosen.append(best)
        taken[best] = torch.inf
    return torch.cat(chosen) if chosen else taken[:0].long()


class Bottleneck(nn.Module):
    """The layer and the weight of a `ConceptHead` in training: the old parts, and new rows and columns drawn as in nn.Linear.

    n, k: concepts and classes with the new ones.
    """

    def __init__(self, head: ConceptHead, n: int, k: int, generator: torch.Generator):
        super().__init__()
        layer, weight = drawn(generator, n, head.layer.shape[1]), drawn(generator, k, n)
        layer[: len(head.layer)] = head.layer.cpu()
        weight[: len(head.weight), : head.weight.shape[1]] = head.weight.cpu()
        self.layer, self.weight = nn.Parameter(layer), nn.Parameter(weight)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, d]` -> scores `[b, n]`, logits `[b, k]`."""
        scores = F.normalize(features, dim=1) @ self.layer.T
        return scores, scores @ self.weight.T

    def sparsity(self, factor: float, share: float) -> Tensor:
        """The elastic net of the weight (Zou & Hastie 2005)."""
        return factor * (share * self.weight.abs().sum() + 0.5 * (1 - share) * self.weight.square().sum())


def alignment(features: Tensor, scores: Tensor, embeddings: Tensor) -> Tensor:
    """Minus the mean over the concepts of the cosine, over the images, of the cubes of score and product with the text."""
    return -F.cosine_similarity(scores**3, (features @ embeddings.T) ** 3, dim=0, eps=1e-20).mean()
