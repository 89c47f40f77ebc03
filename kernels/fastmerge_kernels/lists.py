"""Rules over a list of T models in one pass: blocks outside, models inside, nothing stored beside the output.

    weighted_sum      initial + sum_k w_k (theta_k - initial), w_k per model, or per model and segment     4 (T + 2)
    magmax_merge      initial + scale * the task vector of largest magnitude, the later at ties  (MagMax)  4 (T + 2)
    fisher_average    sum_k w_k F_k theta_k / sum_k w_k F_k                     (Matena & Raffel 2022)     4 (2 T + 1)
    dare_merge        initial + sum_k w_k dare(theta_k - initial)               (DARE, sec. 3.2)           4 (T + 2)

bytes per parameter on the right, fp32. `weighted_sum` is the weight average (w_k = 1 / T), task arithmetic (w_k = scale), and
with weights per segment every layer-wise rule. TIES and Model Stock over lists are `ties_merge` and `stock_merge`; the
streaming forms of all of them take one model at a time and give the same up to rounding (`magmax_update_`: same bits).

Models are summed in the order of the list, in fp32, whatever the number of threads. NaN and inf propagate, a weight of 0 does
not hide them. Errors are TypeError / ValueError that name the argument; nothing is written then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_counter, check_models, check_nonnegative, check_overlap, check_vectors, scalar
from .philox import check_span, key_words
from .registry import backend, register
from .segments import boundaries


def _overlaps(out: Tensor, models: Sequence[Tensor], **others: Tensor | None) -> None:
    check_overlap("out", out, **{f"models[{k}]": model for k, model in enumerate(models)}, **others)


@register(
    "numbers(float[] values, Tensor like) -> Tensor",
    fake=lambda values, like: like.new_empty(len(values), dtype=torch.float32),
)
def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """fp32 [len(values)] on the device of `like`, without waiting for it. An op, so that a compiled function can call it."""
    return backend("lists", like).numbers(values, like)


@register(
    "weighted_sum(Tensor[] models, Tensor weights, Tensor? initial, SymInt[] segments, "
    "Tensor(a!) out, Tensor(b!)? nonfinite) -> ()",
    capturable=False,
)
def _weighted_sum(
    models: Sequence[Tensor],
    weights: Tensor,
    initial: Tensor | None,
    segments: Sequence[int],
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    _overlaps(out, models, initial=initial)
    backend("lists", out).weighted_sum(models, weights, initial, tuple(segments), out, nonfinite)


@register(
    "magmax_merge(Tensor[] models, Tensor initial, float scale, Tensor? scale_tensor, "
    "Tensor(a!) out, Tensor(b!)? nonfinite) -> ()"
)
def _magmax(
    models: Sequence[Tensor],
    initial: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    _overlaps(out, models, initial=initial)
    backend("lists", out).magmax(models, initial, (scale, scale_tensor), out, nonfinite)


@register(
    "fisher_average(Tensor[] models, Tensor[] fishers, Tensor weights, Tensor(a!) out, Tensor(b!)? nonfinite) -> ()"
)
def _fisher(
    models: Sequence[Tensor], fishers: Sequence[Tensor], weights: Tensor, out: Tensor, nonfinite: Tensor | None
) -> None:
    _overlaps(out, models, **{f"fishers[{k}]": fisher for k, fisher in enumerate(fishers)})
    backend("lists", out).fisher(models, fishers, weights, out, nonfinite)


@register(
    "dare_merge(Tensor[] models, Tensor weights, float p, Tensor initial, SymInt seed, "
    "SymInt subsequence, SymInt offset, Tensor(a!) out, Tensor(b!)? nonfinite) -> ()"
)
def _dare(
    models: Sequence[Tensor],
    weights: Tensor,
    p: float,
    initial: Tensor,
    seed: int,
    subsequence: int,
    offset: int,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    _overlaps(out, models, initial=initial)
    backend("lists", out).dare(models, weights, p, initial, seed, subsequence, offset, out, nonfinite)


def model_weights(weights: Sequence[float] | Tensor | None, count: int, segments: int, like: Tensor) -> Tensor:
    """fp32 [count, segments] on the device of `like` from T numbers, a tensor [T] or [T, segments], or None (1 / T each)."""
    if weights is None:
        weights = [1.0 / count] * count
    if isinstance(weights, Tensor):
        given = weights.detach().to(like.device, torch.float32)
    else:
        given = numbers([float(w) for w in weights], like)
    if given.dim() not in (1, 2) or given.shape[0] != count:
        raise ValueError(f"weights: expected {count}, one per model, got shape {list(given.shape)}")
    if given.dim() == 2 and given.shape[1] != segments:
        raise ValueError(f"weights: expected shape [{count}, {segments}], got {list(given.shape)}")
    return (given if given.dim() == 2 else given[:, None].expand(count, segments)).contiguous()


@torch.no_grad()
def weighted_sum(
    models: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    *,
    initial: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """initial + sum_k weights[k] (models[k] - initial); without `initial`, sum_k weights[k] models[k].

    models: T tensors [n]. weights: T numbers, or a tensor [T] or [T, segments] (default: 1 / T each, the average). segments:
    boundaries 0, ..., n. out: may be one of the models or initial (default: new, dtype of models[0]). nonfinite: int64 [1],
    receives the number of written NaN and inf. Raises TypeError / ValueError.
    """
    models = check_models(models, initial=initial, out=out)
    check_counter(nonfinite, models[0].device)
    bounds = boundaries(segments, models[0].numel())
    weights = model_weights(weights, len(models), len(bounds) - 1, models[0])
    out = torch.empty_like(models[0]) if out is None else out
    _weighted_sum(models, weights, initial, list(bounds), out, nonfinite)
    return out


@torch.no_grad()
def magmax_merge(
    models: Sequence[Tensor],
    *,
    initial: Tensor,
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """initial + scale * (per entry, the task vector of largest magnitude): MagMax; ties, NaN as in `magmax_update_`.

    Arguments as in `weighted_sum`.
    """
    models = check_models(models, initial=initial, out=out)
    check_counter(nonfinite, models[0].device)
    out = torch.empty_like(models[0]) if out is None else out
    _magmax(models, initial, *scalar("scale", scale), out, nonfinite)
    return out


@torch.no_grad()
def fisher_average(
    models: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    check: bool = True,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """sum_k w_k F_k theta_k / sum_k w_k F_k; the plain weighted mean where all weighted Fishers are zero.

    fishers: T tensors [n] >= 0. weights: T positive numbers (default: equal). check: raise ValueError for a negative Fisher
    entry before writing (one more pass over the Fishers, and a wait for the device). Other arguments as in `weighted_sum`.
    Peers add a floor to the denominator instead of the rule for zero Fishers.
    """
    models = check_models(models, out=out)
    fishers = list(fishers)
    if len(fishers) != len(models):
        raise ValueError(f"fishers: expected {len(models)}, one per model, got {len(fishers)}")
    named = {f"fishers[{k}]": fisher for k, fisher in enumerate(fishers)}
    check_vectors("models[0]", **{"models[0]": models[0]}, **named)
    check_counter(nonfinite, models[0].device)
    given = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if not all(0 < w < float("inf") for w in given):
        raise ValueError(f"weights: expected positive numbers, got {given}")
    if check:
        check_nonnegative(**named)
    shares = model_weights([w / sum(given) for w in given], len(models), 1, models[0])
    out = torch.empty_like(models[0]) if out is None else out
    _fisher(models, fishers, shares, out, nonfinite)
    return out


@torch.no_grad()
def dare_merge(
    models: Sequence[Tensor],
    p: float,
    weights: Sequence[float] | Tensor | None = None,
    *,
    initial: Tensor,
    seed: int,
    subsequence: int,
    offset: int = 0,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """initial + sum_k weights[k] dare(models[k] - initial): every task vector loses entries with probability p, the rest
    is divided by 1 - p. Model k draws its words from subsequence + k, as `dare_delta` with that subsequence does.

    p: in [0, 1). offset: position of the first entry in the whole vector. Other arguments as in `weighted_sum`.
    """
    models = check_models(models, initial=initial, out=out)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a drop probability in [0, 1), got {p}")
    key_words(seed, subsequence)
    key_words(seed, subsequence + len(models) - 1)
    check_span(offset, models[0].numel())
    check_counter(nonfinite, models[0].device)
    weights = model_weights(weights, len(models), 1, models[0])
    out = torch.empty_like(models[0]) if out is None else out
    _dare(models, weights, float(p), initial, seed, subsequence, offset, out, nonfinite)
    return out
