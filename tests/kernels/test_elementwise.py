"""Compare the elementwise ops with `reference.py` in float64, and P&M with two vectors with the paper's sum."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from fastmerge_kernels import reference
from oracle import DTYPES, INTERPRET, LARGE, SIZES, assert_rounded, assert_sums, vectors


def magnitude(*tensors):
    return 4 * sum(x.double().abs().nan_to_num(0, 0, 0) for x in tensors)


# name: (number of vectors, indices of Fishers, op -> written tensors, formula -> the same, scale of the rounding error)
OPS = {
    "axpy": (2, (), lambda x, d: [fk.axpy(x, d, 0.3)], lambda x, d: [reference.axpy(x, d, 0.3)], magnitude),
    "fisher_merge_": (
        4,
        (1, 3),
        lambda x, f, y, g: [fk.fisher_merge_(x, f, y, g, 0.3), f],
        lambda x, f, y, g: reference.fisher_merge(x, f, y, g, 0.3),
        lambda x, f, y, g: magnitude(x, f, y, g),
    ),
    "pam_accumulate_": (
        5,
        (0, 2),
        lambda s, m, f, x, i: [fk.pam_accumulate_(s, m, f, x, i), s, m][1:],
        reference.pam_accumulate,
        lambda s, m, f, x, i: magnitude(s, m, f) + f.double().abs() * magnitude(x, i),
    ),
    "magmax_update_": (
        3,
        (),
        lambda k, x, i: [fk.magmax_update_(k, x, initial=i)],
        lambda *v: [reference.magmax_update(*v)],
        magnitude,
    ),
    "magmax_delta": (
        2,
        (),
        lambda k, x: [fk.magmax_update_(k, x)],
        lambda *v: [reference.magmax_update(*v)],
        lambda *v: 0.0,
    ),
    "fisher_accumulate_": (
        2,
        (0,),
        lambda f, g: [fk.fisher_accumulate_(f, g, 0.5)],
        lambda f, g: [reference.fisher_accumulate(f, g, 0.5)],
        lambda f, g: magnitude(f, g * g),
    ),
    "ewc_gradient_": (
        4,
        (1,),
        lambda g, f, x, a: [fk.ewc_gradient_(g, f, x, a, 0.5)],
        lambda *v: [reference.ewc_gradient(*v, 0.5)],
        lambda g, f, x, a: magnitude(g) + f.double() * magnitude(x, a),
    ),
}


def inputs(name, n, types, device="cpu"):
    count, fishers, *_ = OPS[name]
    tensors = vectors(count, n, seed=len(name))
    tensors = [x.abs() if k in fishers else x for k, x in enumerate(tensors)]
    return [x.to(t).to(device) for x, t in zip(tensors, itertools.cycle(types), strict=False)]


def check(name, tensors):
    _, _, call, formula, scale = OPS[name]
    kept = [x.cpu().clone() for x in tensors]
    written = call(*tensors)
    for actual, expected in zip(written, formula(*kept), strict=True):
        assert_rounded(actual, expected, scale(*kept))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("n", SIZES)
def test_sizes(device, name, n):
    check(name, inputs(name, n, (torch.float32,), device))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("types", list(itertools.permutations(DTYPES, 2)) + [(t,) for t in DTYPES[1:]])
def test_dtypes(device, name, types):
    check(name, inputs(name, 1203, types, device))


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("fisher_merge_", "pam_accumulate_")])
def test_special_values(device, name):
    """For every combination of NaN, inf, zeros and subnormals, NaN and inf are the same as in the formula."""
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -2.0, 1e-40, 1e30]
    count, fishers, call, formula, scale = OPS[name]
    grid = torch.tensor(list(itertools.product(special, repeat=count)), dtype=torch.float32)
    tensors = [column.abs() if k in fishers else column.contiguous() for k, column in enumerate(grid.T)]
    if "fisher" in name or "ewc" in name:  # 1e30 squared or multiplied overflows fp32, not float64
        tensors = [torch.where(x.abs() == 1e30, 5.0, x) for x in tensors]
    check(name, [x.clone().to(device) for x in tensors])


def test_nonfinite_values_are_counted(device):
    for dtype in DTYPES:
        x, d = (v.to(device) for v in vectors(2, 3000, dtype))
        x[::7], d[5] = float("inf"), float("nan")
        bad = torch.full((1,), 99, dtype=torch.int64, device=device)
        out = fk.axpy(x, d, 1.0, nonfinite=bad)
        assert bad.item() == int((~out.isfinite()).sum()) > 400
        fisher = d.abs()
        fk.fisher_merge_(x, fisher, d, fisher.clone(), 0.5, nonfinite=bad, check=False)
        assert bad.item() == int((~x.isfinite()).sum() + (~fisher.isfinite()).sum())
    big = torch.full((10,), 60000.0, dtype=torch.float16, device=device)  # finite operands, infinite result
    fk.axpy(big, big, 1.0, nonfinite=bad)
    assert bad.item() == 10


def test_fisher_merge_rules(device):
    """Two zero Fishers give a plain lerp, one zero Fisher gives exactly the other model, equal Fishers give a lerp."""
    x, y = (v.to(device) for v in vectors(2, 1000))
    zero, some = torch.zeros(1000, device=device), torch.rand(1000, device=device) + 0.1
    expected = {(0, 0): fk.lerp(x, y, 0.25), (1, 0): x, (0, 1): y, (1, 1): fk.lerp(x, y, 0.25)}
    for (first, second), value in expected.items():
        fisher = some.clone() if first else zero.clone()
        merged = fk.fisher_merge_(x.clone(), fisher, y, some if second else zero, 0.25)
        torch.testing.assert_close(
            merged, value, rtol=3e-6 if first == second == 1 else 0, atol=3e-7 if first == second == 1 else 0
        )
        torch.testing.assert_close(fisher, (0.25 * second + 0.75 * first) * some)


def test_tiny_fishers_keep_their_ratio(device):
    """Fishers of order 1e-30 merge like Fishers of order 1: no epsilon, no underflow."""
    x, y = (v.to(device) for v in vectors(2, 500))
    f, g = torch.rand(500, device=device) + 0.1, torch.rand(500, device=device) + 0.1
    expected = fk.fisher_merge_(x.clone(), f.clone(), y, g, 0.5)
    merged = fk.fisher_merge_(x.clone(), f * 1e-30, y, g * 1e-30, 0.5)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_negative_fishers_are_refused_before_writing():
    x, f = torch.ones(10), torch.ones(10)
    g = f.clone()
    g[3] = -1e-9
    for call in (
        lambda: fk.fisher_merge_(x, f, x.clone(), g, 0.5),
        lambda: fk.fisher_merge_(x, g.clone(), x.clone(), f.clone(), 0.5),
        lambda: fk.pam_accumulate_(x, x.clone(), g, f, f),
    ):
        with pytest.raises(ValueError, match=r"fisher(_t)?: expected no negative entries"):
            call()
    assert bool((x == 1).all() and (f == 1).all())
    with pytest.raises(ValueError, match="lam: expected a number in .0, 1., got 1.5"):
        fk.fisher_merge_(x, f, x.clone(), f.clone(), 1.5)
    with pytest.raises(ValueError, match="moment: shares memory with total"):
        fk.pam_accumulate_(x, x, f, f, f)


def test_magmax_keeps_the_later_of_equals(device):
    kept, new = torch.tensor([1.0, -2, 3, 0], device=device), torch.tensor([-1.0, 2, 1, 0], device=device)
    assert fk.magmax_update_(kept, new).tolist() == [-1, 2, 3, 0]


def test_magmax_equals_the_batch_definition(device):
    """Updating one task at a time equals the argmax over all task vectors (MagMax, eq. 1)."""
    initial, *models = (v.to(device) for v in vectors(6, LARGE))
    kept = torch.zeros_like(initial)
    for model in models:
        fk.magmax_update_(kept, model, initial=initial)
    deltas = torch.stack([m - initial for m in models]).flip(
        0
    )  # argmax takes the first of equals: in the flipped stack, the latest
    assert torch.equal(kept, deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0])


@pytest.mark.parametrize("types", [(torch.float32,), (torch.bfloat16, torch.float32)])
def test_pam_coefficient(device, types):
    for n in SIZES:
        tensors = [x.to(t).to(device) for x, t in zip(vectors(5, n), itertools.cycle(types), strict=False)]
        s, m, x, y, i = (v.double().cpu() for v in tensors)
        terms = torch.stack([(((s * (x - i)).abs() + m.abs()) * (y - x).abs()).sum(), (s.abs() * (y - x) ** 2).sum()])
        assert_sums(
            fk.pam_coefficient(*tensors),
            torch.stack([((s * (x - i) - m) * (y - x)).sum(), (s * (y - x) ** 2).sum()]),
            terms,
        )
        assert torch.equal(reference.pam_coefficient(*tensors).cpu(), reference.pam_coefficient(s, m, x, y, i))
        thirds = [
            sum(x)
            for x in zip(
                *[fk.pam_coefficient(*[v[a:b] for v in tensors]).tolist() for a, b in ((0, n // 3), (n // 3, n))],
                strict=True,
            )
        ]
        assert_sums(torch.tensor(thirds, dtype=torch.float64), fk.pam_coefficient(*tensors).cpu(), terms)


def test_pam_in_two_vectors_equals_the_papers_sum(device):
    """P&M eq. 8 needs every theta_i and F_i; S and M give the same coefficient."""
    n = 2000
    initial, *rest = (v.to(device) for v in vectors(9, n))
    thetas, fishers, merged = rest[:4], [f.abs() for f in rest[4:8]], rest[0] * 0.5 + initial * 0.5
    total, moment = torch.zeros(n, device=device), torch.zeros(n, device=device)
    for theta, fisher in zip(thetas, fishers, strict=True):
        fk.pam_accumulate_(total, moment, fisher, theta, initial)
    delta = (thetas[-1] - merged).double()
    numerator = sum(((merged.double() - t.double()) * f.double()) @ delta for t, f in zip(thetas, fishers, strict=True))
    denominator = sum((delta * f.double()) @ delta for f in fishers)
    first, second = fk.pam_coefficient(total, moment, merged, thetas[-1], initial)
    assert abs(-first / second + numerator / denominator) < 1e-6


def test_threads_and_shards_give_the_same_bits():
    n = LARGE if INTERPRET else 400_001
    for name in OPS:
        whole = OPS[name][2](*[x.clone() for x in inputs(name, n, (torch.float32,))])
        pieces = []
        for a, b in itertools.pairwise([0, 1, 333, n // 2 + 5, n]):
            pieces.append(OPS[name][2](*[x[a:b].clone() for x in inputs(name, n, (torch.float32,))]))
        assert all(torch.equal(torch.cat(parts), w) for parts, w in zip(zip(*pieces, strict=True), whole, strict=True))


def test_parallel_errors_reach_the_caller(monkeypatch):
    """An exception inside a worker thread is raised, not lost."""
    if INTERPRET:
        pytest.skip("tests the threads of the numba loops")
    from fastmerge_kernels.cpu import threads as loops

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            loops.run(lambda start, stop: 1 // 0, 10 * loops.CHUNK)
        assert loops.run(lambda start, stop: stop - start, 10 * loops.CHUNK + 3) == 10 * loops.CHUNK + 3
    finally:
        torch.set_num_threads(threads)
