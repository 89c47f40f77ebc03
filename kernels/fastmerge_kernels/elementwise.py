"""Ops that are one formula per entry, and the reduction that goes with P&M's.

    op                   computes                                                            bytes/parameter (fp32)
    lerp                 (1 - alpha) a + alpha b                                             12
    axpy (= perturb)     theta + c delta                                                     12
    fisher_merge_        theta <- (lam F_t theta_t + (1 - lam) F theta) / F',  F <- F',      24
                         F' = lam F_t + (1 - lam) F; plain lerp where F' = 0                 (CMM)
    pam_accumulate_      S += F,  M += F (theta - initial)                                   28   (P&M)
    pam_coefficient      <S (merged - initial) - M, D>, <S D, D>,  D = theta - merged        20   (P&M, eq. 8)
    magmax_update_       kept <- theta - initial where its magnitude is >= that of kept      16   (MagMax)
    fisher_accumulate_   F += scale g^2                                                      12
    ewc_gradient_        g += lam F (theta - anchor)                                         20   (EWC)

All vectors are [n] fp32/bf16/fp16, any mix, arithmetic is fp32. Numbers may be floats or tensors of one element. Every op
that writes takes `nonfinite`, an int64 tensor of one element that receives the number of NaN and inf written. NaN and inf
propagate as in the formulas. Errors are TypeError / ValueError that name the argument; nothing is written then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import (
    check_counter,
    check_disjoint,
    check_fraction,
    check_nonnegative,
    check_overlap,
    check_vectors,
    scalar,
)
from .registry import backend, register


def _elementwise(schema: str) -> Callable:
    """Register an op of the form (vectors read, vectors written, numbers, nonfinite).

    The backends are `launch(name, vectors, numbers, nonfinite)`; the order of the vectors is that of the schema.
    """
    arguments = torch._C.parse_schema(f"fastmerge::{schema}").arguments
    vectors = [(x.name, x.alias_info is not None) for x in arguments if str(x.type) == "Tensor"]
    name = schema.partition("(")[0]

    def function(*values) -> None:
        tensors, numbers, nonfinite = values[: len(vectors)], values[len(vectors) : -1], values[-1]
        named = [(*vector, tensor) for vector, tensor in zip(vectors, tensors, strict=True)]
        inputs = {key: tensor for key, written, tensor in named if not written}
        outputs = {key: tensor for key, written, tensor in named if written}
        check_disjoint(**outputs)
        for key, tensor in outputs.items():
            check_overlap(key, tensor, **inputs)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        backend("elementwise", tensors[0]).launch(name, tensors, pairs, nonfinite)

    return register(schema)(function)


_lerp = _elementwise(
    "lerp(Tensor a, Tensor b, Tensor(a!) out, float alpha, Tensor? alpha_tensor, Tensor(z!)? nonfinite) -> ()"
)
_axpy = _elementwise(
    "axpy(Tensor theta, Tensor delta, Tensor(a!) out, float c, Tensor? c_tensor, Tensor(z!)? nonfinite) -> ()"
)
_fisher_merge = _elementwise(
    "fisher_merge_(Tensor theta_t, Tensor fisher_t, Tensor(a!) theta, Tensor(b!) fisher, float lam, "
    "Tensor? lam_tensor, Tensor(z!)? nonfinite) -> ()"
)
_pam_accumulate = _elementwise(
    "pam_accumulate_(Tensor fisher, Tensor theta, Tensor initial, Tensor(a!) total, "
    "Tensor(b!) moment, Tensor(z!)? nonfinite) -> ()"
)
_magmax_update = _elementwise(
    "magmax_update_(Tensor theta, Tensor initial, Tensor(a!) kept, Tensor(z!)? nonfinite) -> ()"
)
_magmax_delta = _elementwise("magmax_delta_(Tensor delta, Tensor(a!) kept, Tensor(z!)? nonfinite) -> ()")
_fisher_accumulate = _elementwise(
    "fisher_accumulate_(Tensor gradient, Tensor(a!) fisher, float scale, Tensor? scale_tensor, "
    "Tensor(z!)? nonfinite) -> ()"
)
_ewc_gradient = _elementwise(
    "ewc_gradient_(Tensor fisher, Tensor theta, Tensor anchor, Tensor(a!) gradient, float lam, "
    "Tensor? lam_tensor, Tensor(z!)? nonfinite) -> ()"
)


@torch.no_grad()
def lerp(
    a: Tensor, b: Tensor, alpha: float | Tensor, *, out: Tensor | None = None, nonfinite: Tensor | None = None
) -> Tensor:
    """(1 - alpha) a + alpha b, exact at alpha = 0 and 1 if finite. out: may be `a` or `b` (default: new, dtype of a)."""
    check_vectors("a", a=a, b=b, out=out)
    check_counter(nonfinite, a.device)
    out = torch.empty_like(a) if out is None else out
    _lerp(a, b, out, *scalar("alpha", alpha), nonfinite)
    return out


@torch.no_grad()
def axpy(
    theta: Tensor, delta: Tensor, c: float | Tensor, *, out: Tensor | None = None, nonfinite: Tensor | None = None
) -> Tensor:
    """theta + c delta. out: may be `theta` or `delta` (default: new, dtype of theta)."""
    check_vectors("theta", theta=theta, delta=delta, out=out)
    check_counter(nonfinite, theta.device)
    out = torch.empty_like(theta) if out is None else out
    _axpy(theta, delta, out, *scalar("c", c), nonfinite)
    return out


perturb = axpy


@torch.no_grad()
def fisher_merge_(
    theta: Tensor,
    fisher: Tensor,
    theta_t: Tensor,
    fisher_t: Tensor,
    lam: float | Tensor,
    *,
    check: bool = True,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """Fisher-weighted average of two models, in place: CMM's merge. Returns theta.

    theta <- (1 - w) theta + w theta_t with w = lam fisher_t / F', and fisher <- F' = lam fisher_t + (1 - lam) fisher. Where
    F' = 0 neither model has information and w = lam (the paper leaves this open; its code divides 0 by 0). check: raise
    ValueError for a negative Fisher entry before writing (one more pass over both, and a wait for the device).
    """
    check_vectors("theta", theta=theta, fisher=fisher, theta_t=theta_t, fisher_t=fisher_t)
    check_counter(nonfinite, theta.device)
    number = scalar("lam", lam)
    if number[1] is None:
        check_fraction("lam", number[0])
    if check:
        check_nonnegative(fisher=fisher, fisher_t=fisher_t)
    _fisher_merge(theta_t, fisher_t, theta, fisher, *number, nonfinite)
    return theta


@torch.no_grad()
def pam_accumulate_(
    total: Tensor,
    moment: Tensor,
    fisher: Tensor,
    theta: Tensor,
    initial: Tensor,
    *,
    check: bool = True,
    nonfinite: Tensor | None = None,
) -> None:
    """total S += fisher, moment M += fisher (theta - initial): what P&M's eq. 8 needs of all past tasks, in two vectors.

    The paper stores every theta_i and F_i; S and M give the same coefficient. check: as in `fisher_merge_`.
    """
    check_vectors("total", total=total, moment=moment, fisher=fisher, theta=theta, initial=initial)
    check_counter(nonfinite, total.device)
    if check:
        check_nonnegative(fisher=fisher)
    _pam_accumulate(fisher, theta, initial, total, moment, nonfinite)


@torch.no_grad()
def magmax_update_(
    kept: Tensor, theta: Tensor, *, initial: Tensor | None = None, nonfinite: Tensor | None = None
) -> Tensor:
    """Keep, per entry, the task vector of largest magnitude; the later one wins ties (MagMax, as in its released code).

    kept: the task vector chosen so far (start with zeros), updated in place and returned. theta: the new model, or its task
    vector if `initial` is None. A NaN is never dropped: one in the new task vector is taken, one in `kept` stays.
    """
    check_vectors("kept", kept=kept, theta=theta, initial=initial)
    check_counter(nonfinite, kept.device)
    if initial is None:
        _magmax_delta(theta, kept, nonfinite)
    else:
        _magmax_update(theta, initial, kept, nonfinite)
    return kept


@torch.no_grad()
def fisher_accumulate_(
    fisher: Tensor, gradient: Tensor, scale: float | Tensor = 1.0, *, nonfinite: Tensor | None = None
) -> Tensor:
    """fisher += scale gradient^2, in place: a diagonal empirical Fisher from per-sample (or per-batch) gradients."""
    check_vectors("fisher", fisher=fisher, gradient=gradient)
    check_counter(nonfinite, fisher.device)
    _fisher_accumulate(gradient, fisher, *scalar("scale", scale), nonfinite)
    return fisher


@torch.no_grad()
def ewc_gradient_(
    gradient: Tensor,
    fisher: Tensor,
    theta: Tensor,
    anchor: Tensor,
    lam: float | Tensor,
    *,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """gradient += lam fisher (theta - anchor), in place: the gradient of EWC's lam/2 sum F (theta - anchor)^2."""
    check_vectors("gradient", gradient=gradient, fisher=fisher, theta=theta, anchor=anchor)
    check_counter(nonfinite, gradient.device)
    _ewc_gradient(fisher, theta, anchor, gradient, *scalar("lam", lam), nonfinite)
    return gradient


def _pair(total: Tensor, *args) -> Tensor:
    return torch.empty(2, dtype=torch.float64, device=total.device)


@register(
    "pam_coefficient(Tensor total, Tensor moment, Tensor merged, Tensor theta, Tensor initial) -> Tensor",
    fake=_pair,
)
def _pam_coefficient(total: Tensor, moment: Tensor, merged: Tensor, theta: Tensor, initial: Tensor) -> Tensor:
    return backend("elementwise", total).pam_coefficient(total, moment, merged, theta, initial)


@torch.no_grad()
def pam_coefficient(total: Tensor, moment: Tensor, merged: Tensor, theta: Tensor, initial: Tensor) -> Tensor:
    """(<S (merged - initial) - M, D>, <S D, D>) with D = theta - merged, float64 [2] on the device; sums of shards add up.

    P&M's coefficient (eq. 8) is alpha = -first / second: total S and moment M (`pam_accumulate_`) must include the current
    task. The caller decides what a zero denominator or an alpha outside [0, 1] means.
    """
    check_vectors("total", total=total, moment=moment, merged=merged, theta=theta, initial=initial)
    return _pam_coefficient(total, moment, merged, theta, initial)
