"""Modules behind a frozen image tower: the bottleneck of CLIP-Adapter (Gao et al. 2021, arXiv 2110.04544); a linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClipAdapter(nn.Module):
    """f -> ratio * relu(W2 relu(W1 f)) + (1 - ratio) f, no biases (section 3.2, visual branch).

    reduce: W1 `[hidden, d]`, restore: W2 `[d, hidden]`, ratio: 0-d; all fp32. Weights start as in `nn.Linear`.
    """

    ratio: Tensor

    def __init__(self, feature_dim: int, hidden: int, ratio: float, generator: torch.Generator | None = None):
        super().__init__()
        self.reduce = nn.Parameter(torch.empty(hidden, feature_dim))
        self.restore = nn.Parameter(torch.empty(feature_dim, hidden))
        for weight in (self.reduce, self.restore):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
        self.register_buffer("ratio", torch.tensor(ratio))

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> ClipAdapter:
        """The adapter with this state dict."""
        hidden, feature_dim = tensors["reduce"].shape
        adapter = cls(feature_dim, hidden, 0.0)
        adapter.load_state_dict(tensors)
        return adapter

    def forward(self, features: Tensor) -> Tensor:
        """`[b, d]` -> `[b, d]`."""
        learned = torch.relu(torch.relu(features @ self.reduce.T) @ self.restore.T)
        return self.ratio * learned + (1 - self.ratio) * features


def linear_map(weight: Tensor) -> nn.Linear:
    """f -> f W^T without bias; weight: W `[d, d]` fp32."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight)
    return module
