"""Compare lerp and the TRM ops with the float64 formulas of `reference.py`; test shards, threads and dtypes."""

from __future__ import annotations

import itertools

import fastmerge_kernels as fk
import pytest
import torch
from fastmerge_kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, INTERPRET, LARGE, SIZES, assert_rounded, assert_sums, vectors

REPLACE = ("none", "anchored", "literal")
KEY = {"seed": 2**62 + 12345, "subsequence": 7}


def cpu(*tensors):
    return [None if x is None else x.cpu() for x in tensors]


def check_merge(previous, current, initial, position, alpha=0.4, beta=3.0, out=None):
    """Compare one merge with the reference; both get the direction that the reference computes."""
    direction = reference.trm_direction(*cpu(previous, current), **position)
    bad = torch.full((1,), -1, dtype=torch.int64, device=previous.device)
    initial = initial if position["replace"] == "literal" else None
    merged = fk.trm_merge(
        previous,
        current,
        alpha,
        beta,
        direction.to(previous.device),
        initial=initial,
        out=out,
        nonfinite=bad,
        **position,
    )
    p, c, i = cpu(previous, current, initial)
    expected = reference.trm_merge(p, c, alpha, beta, direction, initial=i, **position)
    rough = 2 * p.double().abs() + 2 * c.double().abs() + beta * 6 * reference.perpendicular(direction)[1]
    assert_rounded(merged, expected, rough if i is None else rough + 3 * i.double().abs())
    assert bad.item() == int((~merged.isfinite()).sum())
    return merged


def check_sums(previous, current, gradient, gradient2, position):
    p, c, g, g2 = cpu(previous, current, gradient, gradient2)
    expected = reference.trm_direction(p, c, **position)
    d, r = reference._plane(p, c, *(position[k] for k in ("seed", "subsequence", "replace", "ratio", "offset")))
    assert_sums(
        fk.trm_direction(previous, current, **position), expected, torch.stack([(r * d).abs().sum(), d @ d, r @ r])
    )
    direction = expected.to(previous.device)
    actual = fk.subspace_gradient(gradient, previous, current, direction, gradient2=gradient2, scale2=-0.5, **position)
    total = g.double() + (0 if g2 is None else -0.5 * g2.double())
    along, scale = reference.perpendicular(expected)
    terms = torch.stack([total @ d, scale * (total @ r).abs(), total @ total])
    terms = torch.stack(
        [(total * d).abs().sum(), scale * ((total * r).abs().sum() + abs(along) * (total * d).abs().sum()), terms[2]]
    )
    expected = reference.subspace_gradient(g, p, c, expected, gradient2=g2, scale2=-0.5, **position)
    assert_sums(actual, expected, terms)


@pytest.mark.parametrize("n", SIZES)
def test_lerp_sizes(device, n):
    a, b = vectors(2, n, device=device)
    for alpha in (0.0, 1.0, 0.3, -2.5):
        assert_rounded(fk.lerp(a, b, alpha), reference.lerp(*cpu(a, b), alpha), 4 * (a.abs() + b.abs()).cpu())
    assert torch.equal(fk.lerp(a, b, 0.0), a) and torch.equal(fk.lerp(a, b, 1.0), b)


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, repeat=3)))
def test_lerp_dtypes(device, types):
    a, b, out = (x.to(t) for x, t in zip(vectors(3, 1203, device=device), types, strict=True))
    result = fk.lerp(a, b, torch.tensor(0.3, device=device), out=out)
    assert result is out
    assert_rounded(
        out, reference.lerp(*cpu(a, b), float(torch.tensor(0.3))), a.double().abs().cpu() + b.double().abs().cpu()
    )


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("n", SIZES)
def test_merge_and_sums_sizes(device, replace, n):
    previous, current, initial, gradient, gradient2 = vectors(5, n, device=device)
    position = {**KEY, "replace": replace, "ratio": 0.6, "offset": 0}
    check_merge(previous, current, initial, position)
    check_sums(previous, current, gradient, gradient2, position)


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("offset", [3, 2**41 + 129] if INTERPRET else [3, 512, 2**31 - 700, 2**41 + 129])
def test_merge_and_sums_offsets(device, replace, offset):
    previous, current, initial, gradient, _ = vectors(5, 2100, device=device)
    position = {**KEY, "replace": replace, "ratio": 0.6, "offset": offset}
    check_merge(previous, current, initial, position)
    check_sums(previous, current, gradient, None, position)


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize(
    "types", [*itertools.product(DTYPES[1:], repeat=2), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_merge_and_sums_dtypes(device, replace, types):
    previous, current, initial, gradient, gradient2 = vectors(5, 1111, device=device)
    previous, current, initial = previous.to(types[0]), current.to(types[1]), initial.to(types[0])
    position = {**KEY, "replace": replace, "ratio": 0.6, "offset": 70}
    check_merge(previous, current, initial, position, out=torch.empty_like(gradient).to(types[1]))
    check_sums(previous, current, gradient.to(types[0]), gradient2.to(types[1]), position)


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("ratio", [0.0, 2**-33, 1.0])
def test_ratio_ends(device, replace, ratio):
    previous, current, initial, gradient, gradient2 = vectors(5, 1024, device=device)
    position = {**KEY, "replace": replace, "ratio": ratio, "offset": 0}
    check_merge(previous, current, initial, position)
    check_sums(previous, current, gradient, gradient2, position)


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_values(device, replace, dtype):
    """NaN, inf, signed zeros, subnormals and extreme values follow the formula, and non-finite results are counted."""
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16, NaN to infinity")
    kind = torch.finfo(dtype)
    special = [
        float("nan"),
        float("inf"),
        -float("inf"),
        0.0,
        -0.0,
        1.0,
        -1.0,
        kind.tiny,
        -kind.smallest_normal / 4,
        kind.max / 8,
    ]
    grid = torch.tensor(list(itertools.product(special, repeat=3)), dtype=dtype)
    previous, current, initial = (column.contiguous().to(device) for column in grid.T)
    position = {**KEY, "replace": replace, "ratio": 0.6, "offset": 0}
    direction = torch.tensor([0.5, 2.0, 100.0], dtype=torch.float64)
    for out in (None, previous.clone()):
        bad = torch.zeros((), dtype=torch.int64, device=device)
        kept = initial if replace == "literal" else None
        merged = fk.trm_merge(
            previous, current, 0.25, 0.5, direction.to(device), initial=kept, out=out, nonfinite=bad, **position
        )
        p, c, i = cpu(previous, current, kept)
        expected = reference.trm_merge(p, c, 0.25, 0.5, direction, initial=i, **position)
        rough = sum(x.double().abs().nan_to_num(0, 0, 0) for x in (p, c) if x is not None) * 4 + 4
        assert_rounded(merged, expected, rough if i is None else rough + 4 * i.double().abs().nan_to_num(0, 0, 0))
        assert bad.item() == int((~merged.isfinite()).sum()) > 0


def test_both_zero_stays_zero(device):
    n = 1100 if INTERPRET else 2100
    previous, current, initial, gradient, _ = vectors(5, n, device=device)
    zero = (previous == 0) & (current == 0)
    assert zero.sum() >= n // 20
    for replace in REPLACE:
        position = {**KEY, "replace": replace}
        direction = fk.trm_direction(previous, current, **position)
        merged = fk.trm_merge(
            previous,
            current,
            0.5,
            9.0,
            direction,
            initial=torch.ones_like(initial) if replace == "literal" else None,
            **position,
        )
        assert bool((merged[zero] == 0).all()) and bool((merged[~zero] != 0).all())
        dropped = torch.where(zero, 0.0, gradient)
        for g in (gradient, dropped):  # gradients of padding change neither inner product
            sums = fk.subspace_gradient(g, previous, current, direction, **position)
            assert torch.equal(sums[:2], fk.subspace_gradient(dropped, previous, current, direction, **position)[:2])


def test_direction_is_perpendicular_and_normalised(device):
    """P, computed from the op's sums, satisfies ||P|| = 1 and <P, d> = 0."""
    previous, current = vectors(2, LARGE, device=device)
    for replace in ("none", "anchored"):
        position = {**KEY, "replace": replace}
        direction = fk.trm_direction(previous, current, **position)
        d, r = reference._plane(*cpu(previous, current), KEY["seed"], KEY["subsequence"], replace, 0.6, 0)
        c, scale = reference.perpendicular(direction.cpu())
        p = (r - c * d) * scale
        assert abs(p.norm() - 1) < 1e-6 and abs(p @ d) < 1e-6 * d.norm()
        sums = fk.subspace_gradient(p.float().to(device), previous, current, direction, **position).cpu()
        assert abs(sums[1] - 1) < 1e-6 and abs(sums[0]) < 1e-6 * d.norm()


def test_degenerate_planes(device):
    """If d = 0, P is the normalised r. With one entry r is parallel to d, so P = 0. NaN stays NaN."""
    same = torch.ones(1000, device=device)
    position = {**KEY, "replace": "none"}
    direction = fk.trm_direction(same, same, **position)
    assert direction[:2].tolist() == [0, 0] and direction[2] > 0
    moved = fk.trm_merge(same, same, 0.7, 5.0, direction, **position).cpu().double() - 1
    assert abs(moved.norm() - 5) < 1e-5
    one, two = torch.ones(1, device=device), torch.full((1,), 3.0, device=device)
    direction = fk.trm_direction(one, two, **position)
    assert fk.trm_merge(one, two, 0.5, 1e6, direction, **position).item() == 2.0
    assert fk.subspace_gradient(one, one, two, direction, **position).tolist() == [2.0, 0.0, 1.0]
    broken = torch.full((10,), float("nan"), device=device)
    direction = fk.trm_direction(broken, same[:10], **position)
    assert bool(fk.trm_merge(same[:10], same[:10] * 2, 0.5, 1.0, direction, **position).isnan().all())


@pytest.mark.parametrize("replace", REPLACE)
def test_shards_give_the_same_bits(device, replace):
    """Merging pieces of the vector with their offsets equals merging the whole; the sums of the pieces add up."""
    n = LARGE
    previous, current, initial, gradient, _ = vectors(5, n, device=device)
    position = {**KEY, "replace": replace, "ratio": 0.6}
    direction = fk.trm_direction(previous, current, offset=1000, **position)
    start = initial if replace == "literal" else None
    whole = fk.trm_merge(previous, current, 0.3, 2.0, direction, initial=start, offset=1000, **position)
    cuts = [0, 1, 640, n] if INTERPRET else sorted([0, 1, 130, 640, n // 3, n // 2 + 1, n])
    merged, sums, gradients = [], torch.zeros(3, dtype=torch.float64, device=device), 0
    for a, b in itertools.pairwise(cuts):
        p, c, i, g = (x[a:b].clone() for x in (previous, current, initial, gradient))
        piece = {**position, "offset": 1000 + a}
        merged.append(fk.trm_merge(p, c, 0.3, 2.0, direction, initial=i if replace == "literal" else None, **piece))
        sums += fk.trm_direction(p, c, **piece)
        gradients = gradients + fk.subspace_gradient(g, p, c, direction, **piece)
    assert torch.equal(torch.cat(merged), whole)
    torch.testing.assert_close(sums, direction, rtol=1e-5, atol=1e-3)
    expected = fk.subspace_gradient(gradient, previous, current, direction, offset=1000, **position)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-3)


@settings(max_examples=3 if INTERPRET else 40, deadline=None)
@given(st.data())
def test_shards_anywhere(data):
    n, offset = data.draw(st.integers(2, 1800)), data.draw(st.integers(0, 2**60))
    cut, replace = data.draw(st.integers(1, n - 1)), data.draw(st.sampled_from(REPLACE))
    previous, current, initial = vectors(3, n)
    position = {"seed": data.draw(st.integers(0, 2**63 - 1)), "subsequence": 0, "replace": replace}
    direction = torch.tensor([0.1, 1.0, float(n)], dtype=torch.float64)

    def merge(a, b):
        start = initial[a:b] if replace == "literal" else None
        return fk.trm_merge(
            previous[a:b], current[a:b], 0.6, 1.0, direction, initial=start, offset=offset + a, **position
        )

    assert torch.equal(torch.cat([merge(0, cut), merge(cut, n)]), merge(0, n))


def test_in_place_equals_out_of_place(device):
    for which in (0, 1, 2):
        models = vectors(3, 20_011 if not INTERPRET else 1300, device=device)
        position = {**KEY, "replace": "literal"}
        direction = fk.trm_direction(*models[:2], **position)
        expected = fk.trm_merge(*models[:2], 0.3, 2.0, direction, initial=models[2], **position)
        target = models[which]
        assert fk.trm_merge(*models[:2], 0.3, 2.0, direction, initial=models[2], out=target, **position) is target
        assert torch.equal(target, expected)
    a, b = vectors(2, 1300, device=device)
    expected = fk.lerp(a, b, 0.25)
    assert torch.equal(fk.lerp(a, b, 0.25, out=b), expected)


def test_inputs_are_left_alone(device):
    models = vectors(4, 1500, device=device)
    copies = [x.clone() for x in models]
    direction = fk.trm_direction(*models[:2], **KEY)
    fk.trm_merge(*models[:2], 0.3, 2.0, direction, **KEY)
    fk.subspace_gradient(models[2], *models[:2], direction, gradient2=models[3], scale2=1.0, **KEY)
    fk.lerp(*models[:2], 0.5)
    assert all(torch.equal(x, y) for x, y in zip(models, copies, strict=True))


def test_numbers_may_be_tensors(device):
    previous, current = vectors(2, 700, device=device)
    direction = fk.trm_direction(previous, current, **KEY)
    expected = fk.trm_merge(previous, current, 0.25, 2.0, direction, **KEY)
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        for where in {"cpu", device}:
            alpha, beta = torch.tensor(0.25, dtype=kind, device=where), torch.tensor([2.0], dtype=kind, device=where)
            assert torch.equal(fk.trm_merge(previous, current, alpha, beta, direction, **KEY), expected)


def test_empty_vectors(device):
    empty = torch.empty(0, device=device)
    bad = torch.ones(1, dtype=torch.int64, device=device)
    direction = fk.trm_direction(empty, empty, **KEY)
    assert direction.tolist() == [0, 0, 0]
    assert fk.trm_merge(empty, empty, 0.5, 1.0, direction, nonfinite=bad, **KEY).shape == (0,) and bad.item() == 0
    assert fk.subspace_gradient(empty, empty, empty, direction, **KEY).tolist() == [0, 0, 0]
    assert fk.lerp(empty, empty, 0.5).shape == (0,)


@pytest.mark.skipif(INTERPRET, reason="tests the threads of the numba loops")
def test_results_do_not_depend_on_threads():
    previous, current, _, gradient, _ = vectors(5, 700_001)
    threads = torch.get_num_threads()

    def everything():
        direction = fk.trm_direction(previous, current, offset=77, **KEY)
        merged = fk.trm_merge(previous, current, 0.3, 2.0, direction, offset=77, **KEY)
        return direction, merged, fk.subspace_gradient(gradient, previous, current, direction, offset=77, **KEY)

    try:
        torch.set_num_threads(1)
        expected = everything()
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(everything(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_repeated_reductions_are_bit_identical(device):
    previous, current = vectors(2, LARGE, device=device)
    first = fk.trm_direction(previous, current, **KEY)
    assert all(torch.equal(first, fk.trm_direction(previous, current, **KEY)) for _ in range(3))


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    """CUDA and CPU agree to fp32 rounding."""
    previous, current, initial, gradient, gradient2 = vectors(5, 3_000_017)
    for replace in REPLACE:
        position = {**KEY, "replace": replace, "offset": 12_345}
        direction = fk.trm_direction(previous, current, **position)
        arguments = {"initial": initial} if replace == "literal" else {}
        expected = fk.trm_merge(previous, current, 0.4, 3.0, direction, **arguments, **position)
        there = [x.cuda() for x in (previous, current, initial, gradient, gradient2)]
        on_gpu = fk.trm_direction(there[0], there[1], **position)
        torch.testing.assert_close(on_gpu.cpu(), direction, rtol=1e-5, atol=1.0)
        arguments = {"initial": there[2]} if replace == "literal" else {}
        merged = fk.trm_merge(there[0], there[1], 0.4, 3.0, direction.cuda(), **arguments, **position).cpu()
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=3e-6)


@pytest.mark.gpu
def test_more_than_two_to_the_31_entries_on_cuda():
    """The last entries of a merge of 2^31 + 1000 bf16 entries equal a merge of the last shard alone."""
    n, tail = 2**31 + 1000, 5000
    if torch.cuda.mem_get_info()[0] < 5 * n * 2:
        pytest.skip("needs 22 GB of free device memory")
    previous = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    current, direction = previous * 2, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device="cuda")
    merged = fk.trm_merge(previous, current, 0.3, 2.0, direction, **KEY)
    end = fk.trm_merge(previous[-tail:].clone(), current[-tail:].clone(), 0.3, 2.0, direction, offset=n - tail, **KEY)
    assert torch.equal(merged[-tail:], end)
    assert abs(fk.trm_direction(previous, current, replace="none", **KEY)[1].item() - n) < 1
