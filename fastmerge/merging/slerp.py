"""SLERP (Shoemake 1985; mergekit): spherical interpolation of the weights, tensor by tensor.

    slerp(a, b, t) = sin((1 - t) w) / sin w  a + sin(t w) / sin w  b,   cos w = <a, b> / (||a|| ||b||)

The t-th model has weight 1 / t, so two models are merged halfway. Nearly parallel tensors (|cos| > 0.9995) are
interpolated linearly, as in mergekit; models fine-tuned from one start usually are. The result depends on the order.

NuSLERP (mergekit) does the same with the task vectors, which are not parallel: theta_init + slerp(delta_a, delta_b, t), and
its limit for parallel ones is that of rounding. mergekit takes two models; here the t-th has weight 1 / t again.
"""

from __future__ import annotations

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.merging.rule import Rule


class Slerp(Rule):
    needs_base = False
    parallel = 0.9995  # from this |cos| on the interpolation is linear

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        (merged,) = self.zeros("merged")
        t, bounds = 1 / self.count, self.base.bounds
        a, b, apart = (
            fk.segment_norms(x, initial=y, segments=bounds) for x, y in ((merged, None), (theta, None), (theta, merged))
        )
        norms = (a * b).sqrt()
        cosine = torch.where(norms > 0, (a + b - apart) / (2 * norms), 1.0).clamp(-1, 1)
        angle, straight = cosine.acos(), cosine.abs() > self.parallel
        sine = torch.where(straight, 1.0, angle.sin())
        weights = torch.stack(
            [
                torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine),
                torch.where(straight, t, (t * angle).sin() / sine),
            ]
        )
        fk.weighted_sum([merged, theta], weights, segments=bounds, out=merged)

    def _write(self, out: Tensor) -> Tensor:
        return out.copy_(self.kept["merged"])


class NuSlerp(Slerp):
    """merged: the merged task vector."""

    needs_base = True
    parallel = 1 - 1e-12

    def _take(self, theta: Tensor, fisher: Tensor | None) -> None:
        super()._take(fk.axpy(theta, self.base.theta, -1.0), None)

    def _write(self, out: Tensor) -> Tensor:
        return fk.axpy(self.base.theta, self.kept["merged"], 1.0, out=out)
