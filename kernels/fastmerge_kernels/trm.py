"""The three ops of TRM's merging phase, one pass over memory each.

Trajectory Regularized Merging, arXiv 2605.08311; equation numbers of its first version.

    d = current - previous,   r ~ N(0, I),   P = (r - (<r,d>/<d,d>) d) / ||...||            (eq. 3)
    trm_direction      (<r,d>, <d,d>, <r,r>)                          8 bytes/parameter (fp32)
    trm_merge          previous + alpha d + beta P                    12, `literal` 16       (eq. 4, 5)
    subspace_gradient  (<G,d>, <G,P>, <G,G>)                          12, with gradient2 16

r and the replacement mask are functions of position (see `philox.py`): made in registers, never stored. `replace` says what
the paper's random replacement means; a masked entry comes from `previous` or `current`, half each:

    none       no mask
    anchored   where(mask, previous | current, previous + alpha d + beta P), with d = r = P = 0 under the mask in all three
    literal    where(mask, previous | current, initial)
               + alpha (current - initial) + (1 - alpha) (previous - initial) + beta P

Entries that are exactly zero in `previous` and in `current` (padding, pruned weights) take part in nothing: d, r and P are 0
there and the merged value is 0, in all three readings; a gradient there still counts in <G,G>.

Degenerate planes: d = 0 makes P the normalised r; r parallel to d (||r - c d||^2 <= 1e-6 ||r||^2, as for a single entry)
makes P = 0. NaN and inf propagate as in the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_choice, check_counter, check_fraction, check_overlap, check_vectors, scalar
from .philox import check_span, key_words
from .registry import backend, register

REPLACE = ("none", "anchored", "literal")


def perpendicular(direction: Tensor) -> tuple[float, float]:
    """(c, 1 / ||r - c d||) with c = <r,d> / <d,d>, from `trm_direction`'s three sums on the CPU.

    d = 0 gives c = 0. r parallel to d (to 1e-3 rad) gives (c, 0), which makes P = 0.
    """
    rd, dd, rr = direction.tolist()
    c = 0.0 if dd == 0 else rd / dd
    square = rr - c * rd
    return c, 0.0 if square <= 1e-6 * rr else square**-0.5


def _sums(previous: Tensor, *args, **kwargs) -> Tensor:
    return torch.empty(3, dtype=torch.float64, device=previous.device)


@register(
    "trm_direction(Tensor previous, Tensor current, SymInt seed, SymInt subsequence, str replace, "
    "float ratio, SymInt offset) -> Tensor",
    fake=_sums,
)
def _trm_direction(
    previous: Tensor, current: Tensor, seed: int, subsequence: int, replace: str, ratio: float, offset: int
) -> Tensor:
    return backend("trm", previous).direction(previous, current, seed, subsequence, replace, ratio, offset)


@register(
    "trm_merge(Tensor previous, Tensor current, Tensor? initial, float alpha, Tensor? alpha_tensor, "
    "float beta, Tensor? beta_tensor, Tensor direction, SymInt seed, SymInt subsequence, "
    "str replace, float ratio, SymInt offset, Tensor(a!) out, Tensor(b!)? nonfinite) -> ()"
)
def _trm_merge(
    previous: Tensor,
    current: Tensor,
    initial: Tensor | None,
    alpha: float,
    alpha_tensor: Tensor | None,
    beta: float,
    beta_tensor: Tensor | None,
    direction: Tensor,
    seed: int,
    subsequence: int,
    replace: str,
    ratio: float,
    offset: int,
    out: Tensor,
    nonfinite: Tensor | None,
) -> None:
    check_overlap("out", out, previous=previous, current=current, initial=initial)
    position = (seed, subsequence, replace, ratio, offset)
    backend("trm", previous).merge(
        previous, current, initial, (alpha, alpha_tensor), (beta, beta_tensor), direction, *position, out, nonfinite
    )


@register(
    "subspace_gradient(Tensor gradient, Tensor? gradient2, float scale2, Tensor previous, "
    "Tensor current, Tensor direction, SymInt seed, SymInt subsequence, str replace, float ratio, "
    "SymInt offset) -> Tensor",
    fake=lambda gradient, *args, **kwargs: _sums(gradient),
)
def _subspace_gradient(
    gradient: Tensor,
    gradient2: Tensor | None,
    scale2: float,
    previous: Tensor,
    current: Tensor,
    direction: Tensor,
    seed: int,
    subsequence: int,
    replace: str,
    ratio: float,
    offset: int,
) -> Tensor:
    position = (seed, subsequence, replace, ratio, offset)
    return backend("trm", previous).gradient(gradient, gradient2, scale2, previous, current, direction, *position)


def _check(previous: Tensor, seed: int, subsequence: int, replace: str, ratio: float, offset: int) -> None:
    key_words(seed, subsequence)
    check_choice("replace", replace, REPLACE)
    check_fraction("ratio", ratio)
    check_span(offset, previous.numel())


def _check_direction(direction: Tensor, previous: Tensor) -> None:
    if direction.shape != (3,) or direction.dtype != torch.float64 or direction.device != previous.device:
        raise ValueError(
            f"direction: expected the float64 [3] of trm_direction on {previous.device}, "
            f"got {direction.dtype} {list(direction.shape)} on {direction.device}"
        )


@torch.no_grad()
def trm_direction(
    previous: Tensor,
    current: Tensor,
    *,
    seed: int,
    subsequence: int,
    replace: str = "anchored",
    ratio: float = 0.6,
    offset: int = 0,
) -> Tensor:
    """(<r,d>, <d,d>, <r,r>) as float64 [3] on the tensors' device; sums of shards add up to the whole vector's.

    previous, current: [n] fp32/bf16/fp16. seed, subsequence: integers in [0, 2^63). ratio: fraction of replaced entries, in
    [0, 1]. offset: position of the first entry in the whole vector. The order of summation is fixed. Raises TypeError /
    ValueError naming the argument.
    """
    check_vectors("previous", previous=previous, current=current)
    _check(previous, seed, subsequence, replace, ratio, offset)
    return _trm_direction(previous, current, seed, subsequence, replace, ratio, offset)


@torch.no_grad()
def trm_merge(
    previous: Tensor,
    current: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    direction: Tensor,
    *,
    seed: int,
    subsequence: int,
    replace: str = "anchored",
    ratio: float = 0.6,
    offset: int = 0,
    initial: Tensor | None = None,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """theta(alpha, beta) of the module docstring, in `out` ([n]; may be an input; default: new, dtype of previous).

    previous, current, initial: [n] fp32/bf16/fp16, any mix; initial is needed by, and only by, replace='literal'. alpha,
    beta: floats or tensors of one element. direction: what `trm_direction` gave for the *whole* vector with the same
    arguments. nonfinite: int64 tensor of one element, receives the number of written NaN and inf. A shard with its offset
    gets the bits of the whole vector's merge. Raises TypeError / ValueError naming the argument.
    """
    check_vectors("previous", previous=previous, current=current, initial=initial, out=out)
    _check(previous, seed, subsequence, replace, ratio, offset)
    _check_direction(direction, previous)
    check_counter(nonfinite, previous.device)
    if (initial is not None) != (replace == "literal"):
        raise ValueError(f"initial: needed for replace='literal' and only there; replace={replace!r}")
    out = torch.empty_like(previous) if out is None else out
    a, b = scalar("alpha", alpha), scalar("beta", beta)
    _trm_merge(previous, current, initial, *a, *b, direction, seed, subsequence, replace, ratio, offset, out, nonfinite)
    return out


@torch.no_grad()
def subspace_gradient(
    gradient: Tensor,
    previous: Tensor,
    current: Tensor,
    direction: Tensor,
    *,
    seed: int,
    subsequence: int,
    replace: str = "anchored",
    ratio: float = 0.6,
    offset: int = 0,
    gradient2: Tensor | None = None,
    scale2: float = 0.0,
) -> Tensor:
    """(<G,d>, <G,P>, <G,G>) as float64 [3] with G = gradient + scale2 gradient2.

    The first two are the gradient of a loss at theta(alpha, beta) with respect to alpha and beta, the last is its energy.
    gradient, gradient2, previous, current: [n] fp32/bf16/fp16, any mix; the other arguments as in `trm_merge`. Sums of
    shards add up. Raises TypeError / ValueError naming the argument.
    """
    check_vectors("gradient", gradient=gradient, gradient2=gradient2, previous=previous, current=current)
    _check(previous, seed, subsequence, replace, ratio, offset)
    _check_direction(direction, previous)
    return _subspace_gradient(
        gradient, gradient2, float(scale2), previous, current, direction, seed, subsequence, replace, ratio, offset
    )
