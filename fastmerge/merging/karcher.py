"""The Karcher mean of the weights on the sphere, tensor by tensor (Karcher 1977; mergekit).

The unit vectors u_i = w_i / ||w_i|| have a mean m with sum_i log_m(u_i) = 0; ten steps m <- exp_m(mean_i log_m(u_i)) from the
normalised sum find it. The result is m times the mean norm. For two models this is SLERP halfway. Tensors that are zero in
a model do not count there. mergekit takes the norm of zero tensors into the mean too; so do we.

It needs all models at once, so it keeps them: Theta(T n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmerge.merging.keeps_all import KeepsAll

STEPS = 10


class Karcher(KeepsAll):
    needs_base = False

    def _write(self, out: Tensor) -> Tensor:
        out.zero_()
        for models, merged in zip(self.base.tensors(self.kept["tasks"]), self.base.tensors(out), strict=True):
            merged.copy_(on_sphere(models.double()))
        return out


def on_sphere(models: Tensor) -> Tensor:
    """The mean `[n]` of `models` `[T, n]`, float64."""
    norms = models.norm(dim=1, keepdim=True)
    units, counted = models / norms.where(norms > 0, 1.0), (norms > 0).double()
    mean = units.sum(0)
    mean = torch.where(mean.any(), mean, units[0])
    mean = mean / mean.norm().clamp_min(1e-300)
    for _ in range(STEPS):
        cosine = (units @ mean)[:, None].clamp(-1, 1)
        angle = cosine.acos()
        straight = angle < 1e-7  # log is the difference itself
        logs = torch.where(straight, 1.0, angle / angle.sin().where(~straight, 1.0)) * (units - cosine * mean)
        step = (counted * logs).sum(0) / counted.sum().clamp_min(1)
        length = step.norm()
        mean = length.cos() * mean + length.sin() * step / length.clamp_min(1e-300)
        mean = mean / mean.norm().clamp_min(1e-300)
    return norms.mean() * mean
