"""TIES merging (Yadav et al. 2023) as a stream: one task vector at a time, four accumulators, exact; and its exact threshold.

    magnitude_histogram   counts of the bit pattern of |theta - initial|, upper 16 bits, then lower 15       8 bytes/parameter
    magnitude_threshold   the k-th largest magnitude by two histograms: no sort, no copy                       16
    ties_update_          of the kept entries of delta = theta - initial:                                      40
                          P += w delta, C+ += c where delta > 0;  N += w delta, C- += c where delta < 0
    ties_finalize         initial + scale * (P / C+ if elected positive else N / C-), 0 / 0 = 0                24

A non-negative float's bits order like its value, so a histogram of them finds the k-th largest exactly; histograms of shards
add up. An entry is kept if its magnitude is above the threshold, or equal to it and at an index <= `cut`: keep='exactly' puts
the cut behind the k-th kept entry (ties by position), keep='at least' keeps all ties. NaN counts as larger than infinity: it
is kept, makes P NaN, and so arrives in the merged vector.

Conventions (`CONVENTIONS`) differ in what is counted, which sign wins, and what happens at exactly zero mass:

    paper      sign of the sum P + N; zero mass: the sign that most entries elected (released code); divisor: how many agree
    mergekit   sign of the weighted sum; zero mass: positive; divisor: sum of the weights that agree              (0.1.5)
    peft       sign of the unweighted sum; zero mass: positive; divisor: how many agree                           (0.21.2)

With unit weights they agree but for entries of zero mass. Peers keep max(1, floor(density n)) entries, peft floor(density n).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import (
    backend,
    check_choice,
    check_counter,
    check_disjoint,
    check_fraction,
    check_overlap,
    check_vectors,
    register,
    scalar,
)
from .segments import boundaries

KEEP = ("at least", "exactly")
CONVENTIONS = {
    "paper": {"count": "ones", "elect": "weighted", "zero": "majority", "smallest": 1},
    "mergekit": {"count": "weights", "elect": "weighted", "zero": "positive", "smallest": 1},
    "peft": {"count": "ones", "elect": "unweighted", "zero": "positive", "smallest": 0},
}
HIGH, LOW = 1 << 16, 1 << 15  # bins of the first and the second histogram
NOTHING = 0x7FFFFFFF  # bits above every NaN: the threshold that keeps nothing


def _bins(x: Tensor, initial: Tensor | None, high: Tensor | None) -> Tensor:
    return torch.empty(HIGH if high is None else LOW, dtype=torch.int64, device=x.device)


@register("magnitude_histogram", fake=_bins)
def _histogram(x: Tensor, initial: Tensor | None, high: Tensor | None) -> Tensor:
    return backend("ties", x).histogram(x, initial, high)


@register("tie_position", fake=lambda x, *args: torch.empty(1, dtype=torch.int64, device=x.device))
def _tie_position(x: Tensor, initial: Tensor | None, threshold: Tensor, rank: Tensor) -> Tensor:
    return backend("ties", x).tie_position(x, initial, threshold, rank)


@register("ties_update_", mutates=("positive", "negative", "positive_count", "negative_count", "mass"))
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


@register("ties_finalize", mutates=("out", "nonfinite"))
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


@torch.no_grad()
def magnitude_histogram(x: Tensor, *, initial: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Counts of the 31 bits of |x - initial| as fp32: int64 [65536] of bits >> 15, or, given `high`, int64 [32768] of the
    lower 15 bits of the entries whose upper bits equal `high` (int64 [1] on the device). Shards add up.
    """
    check_vectors("x", x=x, initial=initial)
    return _histogram(x, initial, high)


def _kth(histogram: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(the bin that holds the k-th largest, its rank inside the bin), from the top bin down; k >= 1."""
    above = histogram.flip(0).cumsum(0)
    place = torch.searchsorted(above, k).clamp(max=histogram.numel() - 1)
    return histogram.numel() - 1 - place, k - (above[place] - histogram.flip(0)[place])


@torch.no_grad()
def magnitude_threshold(
    x: Tensor,
    k: int | Sequence[int],
    *,
    initial: Tensor | None = None,
    segments: Sequence[int] | None = None,
    keep: str = "at least",
) -> tuple[Tensor, Tensor]:
    """(threshold fp32 [segments], cut int64 [segments]): what to keep so that k entries of each segment remain.

    x: [n]; the magnitudes are |x - initial|. k: entries to keep, one number or one per segment, 0 <= k <= length. segments:
    boundaries 0, ..., n (default: the whole vector). keep: 'at least' k with all ties (cut = n), or 'exactly' k, the earlier
    of equal entries first (cut: index of the last). k = 0 gives the threshold NaN, which keeps nothing. No result is read
    back by the host. Raises TypeError / ValueError.
    """
    check_vectors("x", x=x, initial=initial)
    check_choice("keep", keep, KEEP)
    bounds = boundaries(segments, x.numel())
    counts = [int(k)] * (len(bounds) - 1) if isinstance(k, int) else [int(c) for c in k]
    if len(counts) != len(bounds) - 1:
        raise ValueError(f"k: expected one number or {len(bounds) - 1}, one per segment, got {len(counts)}")
    values, cuts = [], []
    for count, start, stop in zip(counts, bounds, bounds[1:], strict=False):
        if not 0 <= count <= stop - start:
            raise ValueError(f"k: expected 0 <= k <= {stop - start}, the length of its segment, got {count}")
        part, base = x[start:stop], None if initial is None else initial[start:stop]
        if count == 0:
            values.append(torch.full((1,), NOTHING, dtype=torch.int32, device=x.device))
            cuts.append(torch.full((1,), -1, device=x.device))
            continue
        rank = torch.full((1,), count, device=x.device)
        high, rank = _kth(_histogram(part, base, None), rank)
        low, rank = _kth(_histogram(part, base, high), rank)
        values.append((high * LOW + low).to(torch.int32))
        exact = keep == "exactly"
        cuts.append(_tie_position(part, base, values[-1], rank) + start if exact else torch.full_like(rank, x.numel()))
    return torch.cat(values).view(torch.float32), torch.cat(cuts)


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
    sign = -1.0 if zero == "negative" else 1.0
    if zero == "majority":
        step = 1 << 20  # in blocks: no model-sized temporary
        blocks = range(0, positive.numel(), step)
        signs = [
            ((positive[a : a + step] + negative[a : a + step]) if mass is None else mass[a : a + step])
            .sign()
            .sum(dtype=torch.float32)
            for a in blocks
        ]
        sign = torch.stack(signs).sum() if signs else 1.0
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
    scale: float = 1.0,
    keep: str = "exactly",
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """TIES merge of a list of models [n]: the streaming ops above, in a convention of `CONVENTIONS`.

    density: fraction of entries kept, in [0, 1]. segments: boundaries for trimming per tensor (mergekit, peft); None trims
    over the whole vector (paper). out: fp32 by default. Extra memory: the accumulators. Raises TypeError / ValueError.
    """
    if not models:
        raise ValueError("models: expected at least one tensor, got an empty list")
    check_vectors("initial", initial=initial, **{f"models[{k}]": m for k, m in enumerate(models)}, out=out)
    check_fraction("density", density)
    check_choice("convention", convention, tuple(CONVENTIONS))
    rule, bounds = CONVENTIONS[convention], boundaries(segments, initial.numel())
    weights = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if len(weights) != len(models):
        raise ValueError(f"weights: expected {len(models)}, one per model, got {len(weights)}")
    counts = [
        min(b - a, max(rule["smallest"], int(density * (b - a)))) for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    state = [torch.zeros(initial.shape, dtype=torch.float32, device=initial.device) for _ in range(4)]
    mass = torch.zeros_like(state[0]) if rule["elect"] == "unweighted" and len(set(weights)) > 1 else None
    for model, weight in zip(models, weights, strict=True):
        trim = magnitude_threshold(model, counts, initial=initial, segments=bounds, keep=keep)
        ties_update_(
            *state,
            model,
            initial=initial,
            threshold=trim[0],
            cut=trim[1],
            segments=bounds,
            weight=weight,
            count=rule["count"],
            mass=mass,
        )
    out = state[0] if out is None else out
    return ties_finalize(
        *state, mass=mass, initial=initial, scale=scale, zero=rule["zero"], out=out, nonfinite=nonfinite
    )
