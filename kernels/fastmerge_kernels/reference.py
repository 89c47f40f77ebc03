"""The formula of every op in float64, the reference for all tests: slow, but written as in the papers.

Inputs are CPU tensors of any float dtype; results are float64. Random words come from a separate Philox in numpy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .philox import PURPOSES, key_words, threshold


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Philox4x32 of counters [4, n] with a two-word key: uint64 [4, n] of 32-bit words (Salmon 2011, sec. 3.3)."""
    x, (k0, k1), low, half = counter.astype(np.uint64), key, np.uint64(0xFFFFFFFF), np.uint64(32)
    for r in range(rounds):
        a, b = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        round_key = [np.uint64((k + r * step) & 0xFFFFFFFF) for k, step in ((k0, 0x9E3779B9), (k1, 0xBB67AE85))]
        x = np.stack([(b >> half) ^ x[1] ^ round_key[0], b & low, (a >> half) ^ x[3] ^ round_key[1], a & low])
    return x


def _counter_words(position: np.ndarray, seed: int, subsequence: int, purpose: str) -> np.ndarray:
    k0, k1, s0, s1 = key_words(seed, subsequence)
    c = position // 512 * 128 + position % 128
    row = lambda value: np.full_like(position, value)  # noqa: E731
    return philox4x32(np.stack([c & 0xFFFFFFFF, (c >> 32) | (PURPOSES[purpose] << 29), row(s0), row(s1)]), (k0, k1))


def random_words(n: int, seed: int, subsequence: int, purpose: str, offset: int = 0) -> np.ndarray:
    """uint64 [n]: the 32-bit word of each position offset .. offset+n-1."""
    position = offset + np.arange(n, dtype=np.int64)
    return np.take_along_axis(_counter_words(position, seed, subsequence, purpose), (position % 512 // 128)[None], 0)[0]


def random_normal(n: int, seed: int, subsequence: int, offset: int = 0) -> Tensor:
    """float64 [n]: Box-Muller on words (0, 1) and (2, 3) of each counter."""
    position = offset + np.arange(n, dtype=np.int64)
    w, word = _counter_words(position, seed, subsequence, "normal"), position % 512 // 128
    a, b = np.where(word < 2, w[0], w[2]), np.where(word < 2, w[1], w[3])
    radius, angle = np.sqrt(-2 * np.log(((a >> np.uint64(8)) + np.uint64(1)) / 2.0**24)), 2 * math.pi * (b / 2.0**32)
    return torch.from_numpy(radius * np.where(word % 2 == 0, np.cos(angle), np.sin(angle)))


def lerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b."""
    return (1 - alpha) * a.double() + alpha * b.double()


def axpy(theta, delta, c) -> Tensor:
    """theta + c delta."""
    return theta.double() + c * delta.double()


def fisher_merge(theta, fisher, theta_t, fisher_t, lam) -> tuple[Tensor, Tensor]:
    """(lam F_t theta_t + (1 - lam) F theta) / F' and F' = lam F_t + (1 - lam) F; lerp where F' = 0."""
    x, f, y, g = theta.double(), fisher.double(), theta_t.double(), fisher_t.double()
    mixed = lam * g + (1 - lam) * f
    return torch.where(mixed == 0, lerp(x, y, lam), (lam * g * y + (1 - lam) * f * x) / mixed), mixed


def pam_accumulate(total, moment, fisher, theta, initial) -> tuple[Tensor, Tensor]:
    """(S + F, M + F (theta - initial))."""
    f = fisher.double()
    return total.double() + f, moment.double() + f * (theta.double() - initial.double())


def pam_coefficient(total, moment, merged, theta, initial) -> Tensor:
    """(<S (merged - initial) - M, D>, <S D, D>), D = theta - merged."""
    s, m, x, i = total.double(), moment.double(), merged.double(), initial.double()
    d = theta.double() - x
    return torch.stack([(s * (x - i) - m) @ d, (s * d) @ d])


def magmax_update(kept, theta, initial=None) -> Tensor:
    """Per entry the task vector of larger magnitude, the later one in a tie; a NaN in either is kept."""
    k, d = kept.double(), theta.double() - (0 if initial is None else initial.double())
    return torch.where((d.abs() < k.abs()) | k.isnan(), k, d)


def fisher_accumulate(fisher, gradient, scale=1.0) -> Tensor:
    """F + scale g^2."""
    return fisher.double() + scale * gradient.double() ** 2


def ewc_gradient(gradient, fisher, theta, anchor, lam) -> Tensor:
    """g + lam F (theta - anchor)."""
    return gradient.double() + lam * fisher.double() * (theta.double() - anchor.double())


def replaced(n: int, seed: int, subsequence: int, ratio: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Masks (entry is replaced, it is replaced by `previous`): u < floor(ratio 2^32), u < floor(ratio / 2 2^32)."""
    u = random_words(n, seed, subsequence, "mask", offset)
    return torch.from_numpy(u < threshold(ratio)), torch.from_numpy(u < threshold(ratio / 2))


def _plane(previous, current, seed, subsequence, replace, ratio, offset):
    """d and r; both are zero where both models are exactly zero and, if anchored, where an entry is replaced."""
    n, d = previous.numel(), current.double() - previous.double()
    keep = (previous != 0) | (current != 0)
    if replace == "anchored":
        keep = keep & ~replaced(n, seed, subsequence, ratio, offset)[0]
    return torch.where(keep, d, 0.0), torch.where(keep, random_normal(n, seed, subsequence, offset), 0.0)


def trm_direction(previous, current, *, seed, subsequence, replace="anchored", ratio=0.6, offset=0) -> Tensor:
    """(<r,d>, <d,d>, <r,r>)."""
    d, r = _plane(previous, current, seed, subsequence, replace, ratio, offset)
    return torch.stack([r @ d, d @ d, r @ r])


def perpendicular(direction: Tensor) -> tuple[float, float]:
    """(c, 1 / ||r - c d||), c = <r,d> / <d,d>. d = 0: c = 0. r parallel to d (to 1e-3 rad): (c, 0), so P = 0."""
    rd, dd, rr = (float(x) for x in direction)
    c = 0.0 if dd == 0 else rd / dd
    square = rr - c * rd
    return c, 0.0 if square <= 1e-6 * rr else square**-0.5


def trm_merge(
    previous,
    current,
    alpha,
    beta,
    direction,
    *,
    seed,
    subsequence,
    replace="anchored",
    ratio=0.6,
    offset=0,
    initial=None,
) -> Tensor:
    """TRM eq. 4 and 5 with P of eq. 3, for the three interpretations of the random replacement."""
    (d, r), (c, scale) = _plane(previous, current, seed, subsequence, replace, ratio, offset), perpendicular(direction)
    p, a, b = (r - c * d) * scale, previous.double(), current.double()
    mask, from_previous = replaced(previous.numel(), seed, subsequence, ratio, offset)
    chosen = torch.where(from_previous, a, b)
    if replace == "none":
        merged = a + alpha * d + beta * p
    elif replace == "anchored":
        merged = torch.where(mask, chosen, a + alpha * d + beta * p)
    else:
        start = initial.double()
        merged = torch.where(mask, chosen, start) + alpha * (b - start) + (1 - alpha) * (a - start) + beta * p
    return torch.where((a == 0) & (b == 0), 0.0, merged)


def subspace_gradient(
    gradient,
    previous,
    current,
    direction,
    *,
    seed,
    subsequence,
    replace="anchored",
    ratio=0.6,
    offset=0,
    gradient2=None,
    scale2=0.0,
) -> Tensor:
    """(<G,d>, <G,P>, <G,G>) with G = gradient + scale2 gradient2."""
    (d, r), (c, scale) = _plane(previous, current, seed, subsequence, replace, ratio, offset), perpendicular(direction)
    g = gradient.double() + (0 if gradient2 is None else scale2 * gradient2.double())
    return torch.stack([g @ d, g @ ((r - c * d) * scale), g @ g])


def random_mix(models, *, seed, subsequence, offset=0) -> Tensor:
    """Entry i of model floor(u T / 2^32)."""
    chosen = random_words(models[0].numel(), seed, subsequence, "mix", offset) * np.uint64(len(models)) >> np.uint64(32)
    return torch.stack([m.double() for m in models]).gather(0, torch.from_numpy(chosen.astype(np.int64))[None])[0]


def random_replace(kept, theta, p, *, seed, subsequence, offset=0) -> Tensor:
    """theta where u < floor(p 2^32), else kept."""
    chosen = torch.from_numpy(random_words(kept.numel(), seed, subsequence, "mix", offset) < threshold(p))
    return torch.where(chosen, theta.double(), kept.double())


def dare_delta(theta, p, *, initial=None, seed, subsequence, offset=0) -> Tensor:
    """0 where u < floor(p 2^32), else (theta - initial) / (1 - p)."""
    dropped = torch.from_numpy(random_words(theta.numel(), seed, subsequence, "drop", offset) < threshold(p))
    return torch.where(dropped, 0.0, (theta.double() - (0 if initial is None else initial.double())) / (1 - p))


def weighted_sum(models, weights, *, initial=None, segments=None) -> Tensor:
    """initial + sum_k w_k (theta_k - initial), weights [T] or [T, segments]."""
    n, w = models[0].numel(), torch.as_tensor(weights, dtype=torch.float32).double().reshape(len(models), -1)
    lengths = torch.tensor(segments or [0, n]).diff()
    base = torch.zeros(n, dtype=torch.float64) if initial is None else initial.double()
    return base + sum(v.repeat_interleave(lengths) * (m.double() - base) for v, m in zip(w, models, strict=True))


def magmax_merge(models, *, initial, scale=1.0) -> Tensor:
    """initial + scale * (per entry the task vector of largest fp32 magnitude, the later one in a tie; NaN is kept)."""
    kept = torch.zeros(initial.shape, dtype=torch.float64)
    for m in models:
        kept = magmax_update(kept, m.float() - initial.float())
    return initial.double() + scale * kept


def fisher_average(models, fishers, weights=None) -> Tensor:
    """sum w F theta / sum w F; the weighted mean of theta where sum w F = 0."""
    w = torch.tensor(weights or [1.0] * len(models), dtype=torch.float64)[:, None]
    theta, f = torch.stack([m.double() for m in models]), torch.stack([f.double() for f in fishers])
    below = (w * f).sum(0)
    return torch.where(below == 0, (w * theta).sum(0) / w.sum(), (w * f * theta).sum(0) / below)


def dare_merge(models, p, weights, *, initial, seed, subsequence, offset=0) -> Tensor:
    """initial + sum_k w_k dare(theta_k - initial), model k with subsequence + k."""
    key = {"seed": seed, "offset": offset}
    deltas = [dare_delta(m, p, initial=initial, subsequence=subsequence + k, **key) for k, m in enumerate(models)]
    return initial.double() + sum(w * d for w, d in zip(weights, deltas, strict=True))


def keep_largest(magnitude: Tensor, k: int, keep: str) -> Tensor:
    """Mask of the k largest magnitudes: 'exactly' k, earlier entries first in a tie, or 'at least' k with all ties."""
    order = torch.sort(magnitude, descending=True, stable=True)
    if keep == "exactly" or k == 0:
        return torch.zeros(len(magnitude), dtype=torch.bool).index_fill_(0, order.indices[:k], True)
    return magnitude >= order.values[k - 1]


def ties(models, *, initial, counts, segments, weights, convention="paper", keep="exactly", scale=1.0) -> Tensor:
    """TIES: trim every task vector per segment, elect a sign per entry, average the entries of that sign."""
    deltas = [m.float() - initial.float() for m in models]  # the threshold compares fp32 magnitudes
    for d in deltas:
        for k, a, b in zip(counts, segments, segments[1:], strict=False):
            d[a:b] *= keep_largest(d[a:b].abs(), k, keep)
    d, w = torch.stack(deltas).double(), torch.tensor(weights, dtype=torch.float64)[:, None]
    mass = (d if convention == "peft" else w * d).sum(0)
    majority = 1.0 if convention != "paper" or mass.sign().sum() >= 0 else -1.0
    agree = d.sign() == torch.where(mass == 0, majority, mass.sign())
    divisor = ((w if convention == "mergekit" else 1.0) * agree).sum(0)
    return initial.double() + scale * (w * d * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)


def stock(models, *, initial, segments) -> tuple[Tensor, Tensor]:
    """(Model Stock, ratio per segment), from the mean cosine of all pairs, clamped to [0, 1]."""
    deltas, out, ratios = torch.stack([m.double() - initial.double() for m in models]), initial.double().clone(), []
    count = len(models)
    for a, b in zip(segments, segments[1:], strict=False):
        part = deltas[:, a:b]
        unit = torch.nan_to_num(part / part.norm(dim=1, keepdim=True))
        cosines = [float(unit[i] @ unit[j]) for i in range(count) for j in range(i)]
        cosine = min(max(sum(cosines) / len(cosines), 0.0), 1.0) if cosines else 1.0
        ratios.append(count * cosine / (1 + (count - 1) * cosine))
        out[a:b] += ratios[-1] * part.mean(0)
    return out, torch.tensor(ratios, dtype=torch.float64)
