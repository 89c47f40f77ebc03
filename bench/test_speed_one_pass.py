"""Ops with one formula per entry. Target: 1.2 copies of the same bytes on a CPU, 90 % of a copy's speed on an H100."""

from __future__ import annotations

import fastmerge_kernels as fk
import pytest
import torch
from measure import Case, named
from peers import mergekit


def lerp(b):
    a, c, out = b.normal(), b.normal(), b.normal()
    peer = mergekit("linear", [named(a, b.size), named(c, b.size)], weight=0.5)
    return Case(lambda: fk.lerp(a, c, 0.5, out=out), 3, lambda: 0.5 * a + 0.5 * c, peer)


def axpy(b):
    theta, delta, out = b.normal(), b.normal(1e-3), b.normal()
    return Case(lambda: fk.axpy(theta, delta, 0.5, out=out), 3, lambda: theta + 0.5 * delta)


def fisher_merge(b):
    theta, theta_t, fisher, fisher_t = b.normal(), b.normal(), b.positive(), b.positive()

    def formula():
        mixed = 0.5 * fisher_t + 0.5 * fisher
        merged = (0.5 * fisher_t * theta_t + 0.5 * fisher * theta) / mixed
        return torch.where(mixed == 0, torch.lerp(theta, theta_t, 0.5), merged), mixed

    return Case(lambda: fk.fisher_merge_(theta, fisher, theta_t, fisher_t, 0.5, check=False), 6, formula)


def pam_accumulate(b):
    total, moment, fisher, theta, initial = b.positive(), b.normal(), b.positive(), b.normal(), b.normal()
    return Case(
        lambda: fk.pam_accumulate_(total, moment, fisher, theta, initial, check=False),
        7,
        lambda: (total + fisher, moment + fisher * (theta - initial)),
    )


def pam_coefficient(b):
    total, moment, merged, theta, initial = b.positive(), b.normal(), b.normal(), b.normal(), b.normal()

    def formula():
        d = theta - merged
        return ((total * (merged - initial) - moment) * d).sum(), (total * d * d).sum()

    return Case(lambda: fk.pam_coefficient(total, moment, merged, theta, initial), 5, formula)


def magmax_update(b):
    kept, theta, initial = b.normal(1e-3), b.normal(), b.normal()

    def formula():
        d = theta - initial
        return torch.where(d.abs() >= kept.abs(), d, kept)

    return Case(lambda: fk.magmax_update_(kept, theta, initial=initial), 4, formula)


def fisher_accumulate(b):
    fisher, gradient = b.positive(), b.normal(1e-3)
    return Case(lambda: fk.fisher_accumulate_(fisher, gradient), 3, lambda: fisher + gradient * gradient)


def ewc_gradient(b):
    gradient, fisher, theta, anchor = b.normal(1e-3), b.positive(), b.normal(), b.normal()
    return Case(
        lambda: fk.ewc_gradient_(gradient, fisher, theta, anchor, 0.1),
        5,
        lambda: gradient + 0.1 * fisher * (theta - anchor),
    )


def magnitude_threshold(b):
    theta, initial, k = b.normal(1e-3), torch.zeros(b.n, device=b.device, dtype=b.dtype), b.n // 5
    call = lambda: fk.magnitude_threshold(theta, k, initial=initial, keep="exactly")  # noqa: E731
    return Case(call, 2, lambda: (theta - initial).abs().topk(k, sorted=False).values.amin())


def ties_update(b):
    state, theta, initial = [torch.zeros(b.n, device=b.device) for _ in range(4)], b.normal(), b.normal()

    def formula():
        d = theta - initial
        d = d * (d.abs() >= 0.02)
        state[0].add_(d.clamp_min(0)), state[1].add_(d.clamp_max(0)), state[2].add_(d > 0), state[3].add_(d < 0)

    limit = {"threshold": torch.full((1,), 0.02, device=b.device)}
    return Case(lambda: fk.ties_update_(*state, theta, initial=initial, **limit), 2 + 32 // b.dtype.itemsize, formula)


def ties_finalize(b):
    positive, negative, ones, initial, out = b.positive(), -b.positive(), torch.ones(b.n), b.normal(), b.normal()
    ones = ones.to(b.device, b.dtype)

    def formula():
        up = positive + negative >= 0
        return initial + torch.where(up, positive, negative) / ones.clamp_min(1)

    return Case(lambda: fk.ties_finalize(positive, negative, ones, ones, initial=initial, out=out), 6, formula)


def stock_update(b):
    total, units, theta, initial = b.normal(), b.normal(), b.normal(), b.normal()

    def formula():
        d = theta - initial
        return total + d, units + d / d.norm()

    return Case(lambda: fk.stock_update_(total, units, theta, initial=initial), 8, formula)


def segment_norms(b):
    x, initial = b.normal(), b.normal()
    return Case(lambda: fk.segment_norms(x, initial=initial), 2, lambda: (x - initial).square().sum())


def stock_finalize(b):
    total, units, initial, out = b.normal(), b.normal(1e-3), b.normal(), b.normal()
    count = 8

    def formula():
        cosine = ((units.square().sum() - count) / (count * (count - 1))).clamp(0, 1)
        return initial + count * cosine / (1 + (count - 1) * cosine) * total / count

    return Case(lambda: fk.stock_finalize(total, units, count, initial=initial, out=out), 4, formula)


OPS = (lerp, axpy, fisher_merge, pam_accumulate, pam_coefficient, magmax_update, fisher_accumulate, ewc_gradient)
OPS += (magnitude_threshold, ties_update, ties_finalize, segment_norms, stock_update, stock_finalize)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_one_pass(bench, op, size, dtype):
    case = op(bench)
    case.bytes, case.model_bytes = case.bytes * bench.bytes, bench.bytes
    info = bench.row(case)
    assert info["GB/s"] > 0
