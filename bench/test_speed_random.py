"""Ops that make random numbers in registers (Philox), with TRM's. Target: 5 copies on a CPU, 85 % of one on an H100."""

from __future__ import annotations

import fastmerge_kernels as fk
import pytest
import torch
from measure import Case

KEY = {"seed": 1, "subsequence": 2}


def _plane(a, c):
    d, r = c - a, torch.randn_like(a)
    mask = torch.rand_like(a) < 0.6
    return d.masked_fill_(mask, 0), r.masked_fill_(mask, 0), mask


def trm_direction(b):
    a, c = b.normal(), b.normal()

    def formula():
        d, r, _ = _plane(a, c)
        return r @ d, d @ d, r @ r

    return Case(lambda: fk.trm_direction(a, c, **KEY), 2, formula)


def trm_merge(b, replace="anchored"):
    a, c, out = b.normal(), b.normal(), b.normal()
    direction = fk.trm_direction(a, c, **KEY, replace=replace)

    def formula():
        d, r, mask = _plane(a, c)
        p = r - (r @ d) / (d @ d) * d
        merged = a + 0.5 * d + 0.01 * p / p.norm()
        return torch.where(mask, torch.where(torch.rand_like(a) < 0.5, a, c), merged)

    return Case(
        lambda: fk.trm_merge(a, c, 0.5, 0.01, direction, **KEY, replace=replace, out=out),
        3,
        formula if replace == "anchored" else None,
    )


def trm_merge_plane(b):
    return trm_merge(b, "none")


def subspace_gradient(b):
    g, a, c = b.normal(1e-3), b.normal(), b.normal()
    direction = fk.trm_direction(a, c, **KEY)

    def formula():
        d, r, _ = _plane(a, c)
        p = r - (r @ d) / (d @ d) * d
        return g @ d, g @ p / p.norm(), g @ g

    return Case(lambda: fk.subspace_gradient(g, a, c, direction, **KEY), 3, formula)


def dare_delta(b):
    theta, initial, out = b.normal(), b.normal(), b.normal()

    def formula():
        d = theta - initial
        return d * torch.empty_like(d).bernoulli_(0.2) / 0.2

    return Case(lambda: fk.dare_delta(theta, 0.8, initial=initial, **KEY, out=out), 3, formula)


def random_replace(b):
    kept, theta = b.normal(), b.normal()

    def formula():
        return torch.where(torch.rand_like(kept) < 0.5, theta, kept)

    return Case(lambda: fk.random_replace_(kept, theta, 0.5, **KEY), 3, formula)


OPS = (trm_direction, trm_merge, trm_merge_plane, subspace_gradient, dare_delta, random_replace)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_random(bench, op, size, dtype):
    case = op(bench)
    case.bytes, case.model_bytes = case.bytes * bench.bytes, bench.bytes
    info = bench.row(case)
    assert info["GB/s"] > 0
