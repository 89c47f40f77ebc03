"""TIES merging (Yadav et al. 2023), over a list of models or as a stream of one task vector at a time; both exact.

    ties_merge       trim, elect, average the models of a list; thresholds included             8 T + 4 (T + 2) bytes/param
    ties_update_     of the kept entries of delta = theta - initial:                            40
                     P += w delta, C+ += c where delta > 0;  N += w delta, C- += c where delta < 0
    ties_finalize    initial + scale * (P / C+ if elected positive else N / C-), 0 / 0 = 0      24, zero='majority' 32

Which entries are kept says `magnitude_threshold`. The stream needs four accumulators, whatever the number of tasks; the list
needs none, and gives the same bits. A NaN counts as larger than infinity: it is kept, makes P NaN, and so arrives in the
merged vector.

Conventions (`CONVENTIONS`) differ in what is counted, which sign wins, and what happens at exactly zero mass:

    paper      sign of the sum P + N; zero mass: the sign that most entries elected (released code); divisor: how many agree
    mergekit   sign of the weighted sum; zero mass: positive; divisor: sum of the weights that agree              (0.1.5)
    peft       sign of the unweighted sum; zero mass: positive; divisor: how many agree                           (0.21.2)

With unit weights they agree but for entries of zero mass. The paper and mergekit keep max(1, floor(density n))
entries if density > 0, peft floor(density n).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_counter,
    check_disjoint,
    check_fraction,
    check_models,
    check_overlap,
    check_vectors,
    scalar,
)
from .lists import numbers
from .registry import backend, register
from .segments import boundaries
from .threshold import magnitude_threshold

CONVENTIONS: dict[str, dict[str, Any]] = {
    "paper": {"count": "ones", "elect": "weighted", "zero": "majority", "smallest": 1},
    "mergekit": {"count": "weights", "elect": "weighted", "zero": "positive", "smallest": 1},
    "peft": {"count": "ones", "elect": "unweighted", "zero": "positive", "smallest": 0},
}


@register(
    "ties_update_(Tensor theta, Tensor? initial, Tensor threshold, Tensor cut, SymInt[] segments, "
    "float weight, float unit, Tensor(a!) positive, Tensor(b!) negative, Tensor(c!) positive_count, "
    "Tensor(d!) negative_count, Tensor(e!)? mass) -> ()",
    capturable=False,
)
def _update(
    theta: Tensor,
    initial: Tensor | None,
    threshold: Tensor,
    cut: Tensor,
    segments: Sequence[int],
    weight: float,
    unit: float,
    positive: Tensor,
    negative: Tensor,
    positive_count: Tensor,
    negative_count: Tensor,
    mass: Tensor | None,
) -> None:
    state = {"positive": positive, "negative": negative, "positive_count": positive_count}
    state |= {"negative_count": negative_count} | ({} if mass is None else {"mass": mass})
    check_disjoint(**state)
    for name, x in state.items():
        check_overlap(name, x, theta=theta, initial=initial)
    backend("ties", theta).update(
        theta,
        initial,
        threshold,
        cut,
        tuple(segments),
        weight,
        unit,
        positive,
        negative,
        positive_count,
        negative_count,
        mass,
    )


@register(
    "ties_signs(Tensor positive, Tensor negative, Tensor? mass) -> Tensor",
    fake=lambda positive, *args: positive.new_empty(1, dtype=torch.int64),
)
def _signs(positive: Tensor, negative: Tensor, mass: Tensor | None) -> Tensor:
    """int64 [1] on the device: how many entries have positive mass, minus how many have negative mass."""
    return backend("ties", positive).signs(positive, negative, mass)


@register(
    "ties_finalize(Tensor positive, Tensor negative, Tensor positive_count, Tensor negative_count, "
    "Tensor? mass, Tensor? initial, float zero_sign, Tensor? zero_sign_tensor, float scale, "
    "Tensor? scale_tensor, Tensor(a!) out, Tensor(b!)? nonfinite) -> ()"
)
def _finalize(
    positive: Tensor,
    negative: Tensor,
    positive_count: Tensor,
    negative_count: Tensor,
    mass: Tensor | None,
    initial: Tensor | None,
    zero_sign: float,
    zero_sign_tensor: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    state = (positive, negative, positive_count, negative_count, mass, initial)
    check_overlap("out", out, positive=positive, negative=negative, mass=mass, initial=initial)
    check_overlap("out", out, positive_count=positive_count, negative_count=negative_count)
    backend("ties", out).finalize(*state, (zero_sign, zero_sign_tensor), (scale, scale_tensor), out, nonfinite)


@register(
    "ties_merge(Tensor[] models, Tensor initial, Tensor threshold, Tensor cut, SymInt[] segments, "
    "Tensor weights, Tensor units, bool unweighted, str zero, float scale, Tensor? scale_tensor, "
    "Tensor(a!) out, Tensor(b!)? nonfinite) -> ()",
    capturable=False,
)
def _merge(
    models: Sequence[Tensor],
    initial: Tensor,
    threshold: Tensor,
    cut: Tensor,
    segments: Sequence[int],
    weights: Tensor,
    units: Tensor,
    unweighted: bool,
    zero: str,
    scale: float,
    scale_tensor: Tensor | None,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    check_overlap("out", out, **{f"models[{k}]": model for k, model in enumerate(models)}, initial=initial)
    trim, election = (threshold, cut, tuple(segments)), (weights, units, unweighted, zero)
    backend("ties", out).merge(models, initial, *trim, *election, (scale, scale_tensor), out, nonfinite)


@torch.no_grad()
def ties_update_(
    positive: Tensor,
    negative: Tensor,
    positive_count: Tensor,
    negative_count: Tensor,
    theta: Tensor,
    *,
    initial: Tensor | None = None,
    threshold: Tensor | None = None,
    cut: Tensor | None = None,
    segments: Sequence[int] | None = None,
    weight: float = 1.0,
    count: str = "ones",
    mass: Tensor | None = None,
) -> None:
    """Add one task vector to the four accumulators [n] (start with zeros), in place.

    theta: [n], the model, or its task vector if `initial` is None. threshold, cut: from `magnitude_threshold` with the same
    segments (default: keep everything). weight: a positive number. count: 'ones' counts entries, 'weights' adds weights.
    mass: optional fifth accumulator, the unweighted sum (peft's election). Raises TypeError / ValueError.
    """
    state = {
        "positive": positive,
        "negative": negative,
        "positive_count": positive_count,
        "negative_count": negative_count,
    }
    check_vectors("positive", **state, mass=mass, theta=theta, initial=initial)
    check_choice("count", count, ("ones", "weights"))
    bounds = boundaries(segments, theta.numel())
    if not 0 < weight < float("inf"):
        raise ValueError(f"weight: expected a positive number, got {weight}")
    if threshold is None:
        threshold = torch.zeros(len(bounds) - 1, device=theta.device)
    cut = torch.full(threshold.shape, theta.numel(), device=theta.device) if cut is None else cut
    for name, x, dtype in (("threshold", threshold, torch.float32), ("cut", cut, torch.int64)):
        if x.dtype != dtype or x.shape != (len(bounds) - 1,) or x.device != theta.device:
            raise ValueError(
                f"{name}: expected {dtype} [{len(bounds) - 1}] on {theta.device}, one per segment, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
    unit = float(weight) if count == "weights" else 1.0
    _update(theta, initial, threshold.view(torch.int32), cut, list(bounds), float(weight), unit, *state.values(), mass)


@torch.no_grad()
def ties_finalize(
    positive: Tensor,
    negative: Tensor,
    positive_count: Tensor,
    negative_count: Tensor,
    *,
    mass: Tensor | None = None,
    initial: Tensor | None = None,
    scale: float | Tensor = 1.0,
    zero: str = "positive",
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """initial + scale * mean of the kept values of the elected sign, from the accumulators of `ties_update_`.

    mass: the sum whose sign is elected (default: positive + negative). zero: the sign at exactly zero mass, 'positive',
    'negative', or 'majority' of all entries' signs. initial None gives the merged task vector. out: may be an input
    (default: new, dtype of positive). Raises TypeError / ValueError.
    """
    state = {
        "positive": positive,
        "negative": negative,
        "positive_count": positive_count,
        "negative_count": negative_count,
    }
    check_vectors("positive", **state, mass=mass, initial=initial, out=out)
    check_counter(nonfinite, positive.device)
    check_choice("zero", zero, ("positive", "negative", "majority"))
    sign: Tensor | float = -1.0 if zero == "negative" else 1.0
    if zero == "majority":
        sign = _signs(positive, negative, mass).double()
    out = torch.empty_like(positive) if out is None else out
    _finalize(*state.values(), mass, initial, *scalar("zero", sign), *scalar("scale", scale), out, nonfinite)
    return out


@torch.no_grad()
def ties_merge(
    models: Sequence[Tensor],
    *,
    initial: Tensor,
    density: float = 0.2,
    convention: str = "paper",
    segments: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    scale: float | Tensor = 1.0,
    keep: str = "exactly",
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """TIES merge of a list of models [n] in a convention of `CONVENTIONS`.

    density: fraction of entries kept, in [0, 1]. segments: boundaries for trimming per tensor (mergekit, peft); None trims
    over the whole vector (paper). weights: T positive numbers (default: 1 each). out: may be an input (default: new, fp32).
    Raises TypeError / ValueError.
    """
    models = check_models(models, initial=initial, out=out)
    check_counter(nonfinite, initial.device)
    check_fraction("density", density)
    check_choice("convention", convention, tuple(CONVENTIONS))
    rule, bounds = CONVENTIONS[convention], boundaries(segments, initial.numel())
    given = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if len(given) != len(models) or not all(0 < w < float("inf") for w in given):
        raise ValueError(f"weights: expected {len(models)} positive numbers, one per model, got {given}")
    smallest = rule["smallest"] if density else 0
    counts = [min(b - a, max(smallest, int(density * (b - a)))) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    trims = [magnitude_threshold(m, counts, initial=initial, segments=bounds, keep=keep) for m in models]
    threshold, cut = (torch.stack(part) for part in zip(*trims, strict=True))
    shares = numbers(given, initial)
    units = shares if rule["count"] == "weights" else torch.ones_like(shares)
    out = torch.empty_like(initial, dtype=torch.float32) if out is None else out
    election = (shares, units, rule["elect"] == "unweighted", rule["zero"])
    _merge(
        models,
        initial,
        threshold.view(torch.int32),
        cut,
        list(bounds),
        *election,
        *scalar("scale", scale),
        out,
        nonfinite,
    )
    return out
