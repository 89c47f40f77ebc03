"""Merge rules that draw one Philox word u per entry (see `philox.py`): nothing random is stored, shards agree with the whole.

    random_mix        entry i of model floor(u T / 2^32): each of T models with equal probability   4 (T + 1) bytes/parameter
    random_replace_   theta where u < floor(p 2^32), else what was there: random_mix as a subsequence    12
    dare_delta        0 where u < floor(p 2^32), else (theta - initial) / (1 - p)  (DARE, sec. 3.2)  12, without `initial` 8

Two calls with the same (seed, subsequence) draw the same words, so give every model or task its own subsequence. NaN and inf
that are chosen are written and counted; what is dropped or not chosen leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_counter, check_fraction, check_models, check_overlap, check_vectors
from .philox import check_span, key_words
from .registry import backend, register


@register(
    "random_mix(Tensor[] models, SymInt seed, SymInt subsequence, SymInt offset, Tensor(a!) out, "
    "Tensor(b!)? nonfinite) -> ()"
)
def _random_mix(
    models: Sequence[Tensor], seed: int, subsequence: int, offset: int, out: Tensor, nonfinite: Tensor | None
) -> None:
    for k, model in enumerate(models):
        check_overlap("out", out, **{f"models[{k}]": model})
    backend("sampling", out).random_mix(models, seed, subsequence, offset, out, nonfinite)


@register(
    "random_replace_(Tensor theta, float p, SymInt seed, SymInt subsequence, SymInt offset, "
    "Tensor(a!) kept, Tensor(b!)? nonfinite) -> ()"
)
def _random_replace(
    theta: Tensor, p: float, seed: int, subsequence: int, offset: int, kept: Tensor, nonfinite: Tensor | None
) -> None:
    check_overlap("kept", kept, theta=theta)
    backend("sampling", kept).random_replace(theta, p, seed, subsequence, offset, kept, nonfinite)


@register(
    "dare_delta(Tensor theta, Tensor? initial, float p, SymInt seed, SymInt subsequence, "
    "SymInt offset, Tensor(a!) out, Tensor(b!)? nonfinite) -> ()"
)
def _dare_delta(
    theta: Tensor,
    initial: Tensor | None,
    p: float,
    seed: int,
    subsequence: int,
    offset: int,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    check_overlap("out", out, theta=theta, initial=initial)
    backend("sampling", out).dare_delta(theta, initial, p, seed, subsequence, offset, out, nonfinite)


@torch.no_grad()
def random_mix(
    models: Sequence[Tensor],
    *,
    seed: int,
    subsequence: int,
    offset: int = 0,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """Every entry from one of the models, each with probability 1 / len(models) (to 2^-32).

    models: T tensors [n]. seed, subsequence: integers in [0, 2^63). offset: position of the first entry in the whole
    vector. out: may be one of the models (default: new, dtype of models[0]). Raises TypeError / ValueError.
    """
    models = check_models(models, out=out)
    key_words(seed, subsequence)
    check_span(offset, models[0].numel())
    check_counter(nonfinite, models[0].device)
    out = torch.empty_like(models[0]) if out is None else out
    _random_mix(models, seed, subsequence, offset, out, nonfinite)
    return out


@torch.no_grad()
def random_replace_(
    kept: Tensor,
    theta: Tensor,
    p: float,
    *,
    seed: int,
    subsequence: int,
    offset: int = 0,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """kept <- theta in a random fraction p of the entries, in place; returns kept.

    With p = 1 / t for the t-th model and a subsequence of its own for each, an entry of `kept` comes from each model so far
    with equal probability: the random mix of a stream of models. p: in [0, 1]. Other arguments as in `random_mix`.
    """
    check_vectors("kept", kept=kept, theta=theta)
    check_fraction("p", p)
    key_words(seed, subsequence)
    check_span(offset, kept.numel())
    check_counter(nonfinite, kept.device)
    _random_replace(theta, float(p), seed, subsequence, offset, kept, nonfinite)
    return kept


@torch.no_grad()
def dare_delta(
    theta: Tensor,
    p: float,
    *,
    initial: Tensor | None = None,
    seed: int,
    subsequence: int,
    offset: int = 0,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """DARE: each entry of the task vector dropped with probability p, the others divided by 1 - p.

    theta: [n], the model, or its task vector if `initial` is None. p: in [0, 1). out: may be theta or initial (default: new,
    dtype of theta). Other arguments as in `random_mix`. Raises TypeError / ValueError. mergekit rescales by the L1 norm
    instead; peft's density is 1 - p.
    """
    check_vectors("theta", theta=theta, initial=initial, out=out)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a drop probability in [0, 1), got {p}")
    key_words(seed, subsequence)
    check_span(offset, theta.numel())
    check_counter(nonfinite, theta.device)
    out = torch.empty_like(theta) if out is None else out
    _dare_delta(theta, initial, float(p), seed, subsequence, offset, out, nonfinite)
    return out
