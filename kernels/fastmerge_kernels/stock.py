"""Model Stock (Jang et al. 2024) in O(T): no pairwise products, over a list of models or as a stream.

    stock_merge       initial + t mean(delta) per segment,  t = T cos / (1 + (T - 1) cos)         4 (3 T + 4) bytes/parameter
    segment_norms     per segment ||x - initial||^2                                               8
    stock_update_     D += delta,  U += delta / ||delta|| per segment,  delta = theta - initial   32
    stock_finalize    initial + t D / T                                                           16

The mean cosine of all pairs of task vectors comes from U alone: cos = (||U||^2 - T) / (T (T - 1)), because ||U||^2 sums the
cosines of all ordered pairs. The paper has one ratio per layer for T = 2 and its authors average the cosines for more; that
is mergekit's rule too, fusion_bench averages angles. Segments are tensors (boundaries 0, ..., n; default: one segment).

cos is clamped to [0, 1]: task vectors that point apart give t = 0, the initial model; the formula has a pole at -1 / (T - 1).
One model: t = 1. A segment in which a task vector is zero gets nothing in U for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_counter, check_disjoint, check_models, check_overlap, check_vectors
from .lists import weighted_sum
from .registry import backend, register
from .segments import boundaries


@register(
    "segment_norms(Tensor x, Tensor? initial, SymInt[] segments) -> Tensor",
    fake=lambda x, initial, segments: x.new_empty(len(segments) - 1, dtype=torch.float64),
    capturable=False,
)
def _norms(x: Tensor, initial: Tensor | None, segments: Sequence[int]) -> Tensor:
    return backend("stock", x).norms(x, initial, tuple(segments))


@register(
    "stock_update_(Tensor theta, Tensor? initial, Tensor norms, SymInt[] segments, Tensor(a!) total, "
    "Tensor(b!) units) -> ()",
    capturable=False,
)
def _update(
    theta: Tensor, initial: Tensor | None, norms: Tensor, segments: Sequence[int], total: Tensor, units: Tensor
) -> None:
    check_disjoint(total=total, units=units)
    for name, x in (("total", total), ("units", units)):
        check_overlap(name, x, theta=theta, initial=initial)
    backend("stock", theta).update(theta, initial, norms, tuple(segments), total, units)


@register(
    "stock_squares(Tensor[] models, Tensor initial, SymInt[] segments) -> Tensor",
    fake=lambda models, *args: args[0].new_empty(2, len(args[1]) - 1, dtype=torch.float64),
    capturable=False,
)
def _squares(models: Sequence[Tensor], initial: Tensor, segments: Sequence[int]) -> Tensor:
    return backend("stock", initial).squares(models, initial, tuple(segments))


@register(
    "stock_finalize(Tensor total, Tensor initial, Tensor factors, SymInt[] segments, Tensor(a!) out, "
    "Tensor(b!)? nonfinite) -> ()",
    capturable=False,
)
def _finalize(
    total: Tensor, initial: Tensor, factors: Tensor, segments: Sequence[int], out: Tensor, nonfinite: Tensor | None
) -> None:
    check_overlap("out", out, total=total, initial=initial)
    backend("stock", out).finalize(total, initial, factors, tuple(segments), out, nonfinite)


@torch.no_grad()
def segment_norms(x: Tensor, *, initial: Tensor | None = None, segments: Sequence[int] | None = None) -> Tensor:
    """||x - initial||^2 of every segment: float64 [segments] on the device, summed in a fixed order."""
    check_vectors("x", x=x, initial=initial)
    return _norms(x, initial, list(boundaries(segments, x.numel())))


@torch.no_grad()
def stock_update_(
    total: Tensor, units: Tensor, theta: Tensor, *, initial: Tensor | None = None, segments: Sequence[int] | None = None
) -> Tensor:
    """Add one model to D (`total`) and U (`units`), both [n], in place; start with zeros.

    theta: [n], the model, or its task vector if `initial` is None. Two passes over it. Returns int64 [segments], 1 where the
    task vector is not zero: summed over the models that is `moved` of `stock_ratio`. Raises TypeError / ValueError.
    """
    check_vectors("total", total=total, units=units, theta=theta, initial=initial)
    bounds = list(boundaries(segments, theta.numel()))
    norms = _norms(theta, initial, bounds)
    _update(theta, initial, norms, bounds, total, units)
    return (norms != 0).long()


def _ratio(squares: Tensor, moved: Tensor | int, count: int) -> Tensor:
    """t of every segment, float64 [segments], from ||U||^2 and how many task vectors are not zero."""
    if count == 1:
        return torch.ones_like(squares)
    cosine = ((squares - moved) / (count * (count - 1))).clamp(0.0, 1.0)
    return count * cosine / (1 + (count - 1) * cosine)


@torch.no_grad()
def stock_ratio(
    units: Tensor, count: int, *, moved: Tensor | None = None, segments: Sequence[int] | None = None
) -> Tensor:
    """The interpolation ratio t of every segment, float64 [segments], from U and the number of models T >= 1.

    moved: int64 [segments], how many of the task vectors are not zero there (default: all of them).
    """
    if count < 1:
        raise ValueError(f"count: expected the number of models, at least 1, got {count}")
    squares = segment_norms(units, segments=segments)
    if moved is not None and (moved.shape != squares.shape or moved.device != squares.device):
        raise ValueError(
            f"moved: expected shape {list(squares.shape)} on {squares.device}, got {list(moved.shape)} on {moved.device}"
        )
    return _ratio(squares, count if moved is None else moved, count)


@torch.no_grad()
def stock_finalize(
    total: Tensor,
    units: Tensor,
    count: int,
    *,
    initial: Tensor,
    moved: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """initial + t D / T with the ratio of `stock_ratio` in each segment.

    total, units: [n] of `stock_update_`; count: how many models went in; moved: as in `stock_ratio`. out: may be an input
    (default: new, dtype of initial). nonfinite: int64 [1], receives the number of written NaN and inf. Raises TypeError /
    ValueError.
    """
    check_vectors("total", total=total, units=units, initial=initial, out=out)
    check_counter(nonfinite, total.device)
    bounds = boundaries(segments, total.numel())
    factors = stock_ratio(units, count, moved=moved, segments=bounds) / count
    out = torch.empty_like(initial) if out is None else out
    _finalize(total, initial, factors, list(bounds), out, nonfinite)
    return out


@torch.no_grad()
def stock_merge(
    models: Sequence[Tensor],
    *,
    initial: Tensor,
    segments: Sequence[int] | None = None,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """Model Stock of a list of models [n]: three passes over it, nothing stored beside the output.

    segments: boundaries 0, ..., n of the tensors (default: one). out: may be an input (default: new, dtype of initial).
    nonfinite: int64 [1], receives the number of written NaN and inf. Raises TypeError / ValueError.
    """
    models = check_models(models, initial=initial, out=out)
    bounds, count = boundaries(segments, initial.numel()), len(models)
    squares, moved = _squares(models, initial, list(bounds))
    ratio = _ratio(squares, moved, count)
    out = torch.empty_like(initial) if out is None else out
    weights = (ratio / count).float().expand(count, -1)
    return weighted_sum(models, weights, initial=initial, segments=bounds, out=out, nonfinite=nonfinite)
