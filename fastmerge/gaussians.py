"""A Gaussian for the features of every class: what methods keep in place of old images, to draw features from it later."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmerge.data.scenario import Task
from fastmerge.statistics_pass import ClassMoments

KEPT = ("classes", "task", "count", "mean", "covariance")


class Gaussians:
    """k classes in the order in which they came; a class that returns in another domain joins its statistics.

    classes: `[k]` class indices; task: `[k]` the task where a class came first; count: `[k]` images; int64.
    mean: `[k, d]`; covariance: `[k, d, d]`, unbiased, zero for a class of one image; fp32. A class without
    images is left out.
    """

    classes: Tensor
    task: Tensor
    count: Tensor
    mean: Tensor
    covariance: Tensor

    def __init__(self, d: int, device: torch.device):
        whole = dict.fromkeys(KEPT[:3], torch.zeros(0, dtype=torch.int64, device=device))
        mean, covariance = torch.zeros(0, d, device=device), torch.zeros(0, d, d, device=device)
        self.load_state_dict(whole | {"mean": mean, "covariance": covariance})

    def __len__(self) -> int:
        return len(self.known)

    def update(self, task: Task, moments: ClassMoments) -> None:
        """Take in the classes of a task; all tensors change at once, at the end."""
        counts, means, scatters = moments.result()
        places = moments.batches.present
        fresh = [task.classes[place] for place in places if task.classes[place] not in self.known]
        known, old = self.known + fresh, len(self)
        state = {name: torch.cat([x, x.new_zeros(len(fresh), *x.shape[1:])]) for name, x in self.state_dict().items()}
        state["classes"][old:] = torch.tensor(fresh, dtype=torch.int64)
        state["task"][old:] = task.index
        for place in places:
            row = known.index(task.classes[place])
            before, mean = state["count"][row].clone(), state["mean"][row].double()  # zero for a new class
            after, step = before + counts[place], means[place] - mean
            scatter = scatters[place] + (before - 1) * state["covariance"][row].double()
            scatter += before * counts[place] / after * torch.outer(step, step)
            state["count"][row] = after
            state["mean"][row] = (mean + counts[place] / after * step).float()
            state["covariance"][row] = (scatter / (after - 1).clamp(min=1)).float()
        self.load_state_dict(state)

    def roots(self, ridge: float, shrunk: bool = False) -> Tensor:
        """Symmetric square roots of covariance + ridge * identity, `[k, d, d]` fp32; shrunk: of `shrink` of it.

        They exist for any covariance, and have no sign that a device could choose; negative eigenvalues, which come from
        rounding, count as zero.
        """
        found = []
        for covariance in self.covariance:
            matrix = covariance.to(torch.float64, copy=True)
            matrix.diagonal().add_(ridge)
            matrix = shrink(matrix) if shrunk else matrix
            values, vectors = torch.linalg.eigh(matrix)
            found.append((vectors * values.clamp(min=0).sqrt() @ vectors.T).float())
        return torch.stack(found) if found else self.covariance

    def drawn(
        self, roots: Tensor, n: int, generator: torch.Generator, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """n features of every class in random order, `[k n, d]`, and the place of each one's class, `[k n]`. roots: of the
        covariances; scale: factors of the means, `[k]`."""
        k, d = self.mean.shape
        noise = torch.randn(k, n, d, generator=generator).to(roots.device, non_blocking=True)
        mean = self.mean if scale is None else scale[:, None] * self.mean
        features = torch.baddbmm(mean[:, None], noise, roots).flatten(0, 1)
        order = torch.randperm(k * n, generator=generator)
        places = (order // n).to(features.device, non_blocking=True)
        return features[order.to(features.device, non_blocking=True)], places

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name in KEPT:
            setattr(self, name, tensors[name])
        self.known: list[int] = self.classes.tolist()
        self.tasks: list[int] = self.task.tolist()


def shrink(covariance: Tensor) -> Tensor:
    """Add the mean of the diagonal to the diagonal, and the mean of the other entries to these (FeCAM, Goswami et al. 2023,
    with both factors 1, as the released code of RAPF has it). covariance: `[d, d]`."""
    d = len(covariance)
    on, every = covariance.diagonal().sum(), covariance.sum()
    found = covariance + (every - on) / max(1, d * (d - 1))
    found.diagonal().copy_(covariance.diagonal() + on / d)
    return found
