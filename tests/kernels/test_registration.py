"""Registration of the ops: `opcheck`, `torch.compile(fullgraph=True)`, argument errors, imports, caching."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import fastmerge_kernels as fk
import numpy as np
import pytest
import torch
from oracle import INTERPRET, vectors

pytestmark = pytest.mark.skipif(INTERPRET, reason="independent of the kernels")
KEY = {"seed": 3, "subsequence": 1}


def calls(device):
    """Yield (op, arguments) for every registered op, with and without its optional arguments."""
    a, b, c, g = vectors(4, 1100, device=device)
    number, bad = torch.tensor(0.3, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    direction = fk.trm_direction(a, b, **KEY)
    ops = torch.ops.fastmerge
    yield ops.lerp, (a, b, torch.empty_like(a), 0.25, None, None)
    yield ops.lerp, (a, b, torch.empty_like(a), 0.0, number, bad)
    yield ops.axpy, (a, b, torch.empty_like(a), 0.25, None, bad)
    yield ops.fisher_merge_, (a, b.abs(), c.clone(), g.abs(), 0.25, None, bad)
    yield ops.pam_accumulate_, (a.abs(), b, c, g.clone(), a.clone(), bad)
    yield ops.pam_coefficient, (a.abs(), b, c, g, a)
    yield ops.magmax_update_, (a, b, c.clone(), bad)
    yield ops.magmax_delta_, (a, c.clone(), bad)
    yield ops.fisher_accumulate_, (a, b.abs(), 0.5, None, bad)
    yield ops.ewc_gradient_, (a.abs(), b, c, g.clone(), 0.5, None, bad)
    yield ops.random_mix, ([a, b, c], 3, 1, 7, torch.empty_like(a), bad)
    yield ops.random_replace_, (a, 0.3, 3, 1, 7, c.clone(), bad)
    yield ops.dare_delta, (a, b, 0.5, 3, 1, 7, torch.empty_like(a), bad)
    one, cut, state = (
        torch.ones(1, dtype=torch.int32, device=device),
        torch.full((1,), 9, device=device),
        [a * 0 for _ in range(5)],
    )
    bounds, per_segment = [0, 16, 1100], torch.ones(2, dtype=torch.float64, device=device)
    yield ops.magnitude_histogram, (a, b, None, 0, 8, bounds)
    yield ops.magnitude_histogram, (a, None, torch.full((2,), 127, dtype=torch.int32, device=device), 8, 8, bounds)
    yield ops.magnitude_threshold, (a, b, [3, 100], bounds, True)
    yield ops.ties_update_, (a, b, one, cut, [0, 1100], 1.0, 1.0, *state)
    yield ops.ties_signs, (a, b, None)
    yield ops.ties_signs, (a, b, c)
    yield ops.numbers, ([0.5, 2.0, -1.0], a)
    yield ops.ties_finalize, (a, b, c.abs(), g.abs(), None, None, 1.0, None, 0.5, None, torch.empty_like(a), bad)
    limits, cuts = torch.ones(2, 2, dtype=torch.int32, device=device), torch.full((2, 2), 9, device=device)
    pair, ones = [b, c], torch.ones(2, device=device)
    trim = (limits, cuts, bounds, ones, ones, False)
    yield ops.ties_merge, (pair, a, *trim, "majority", 1.0, None, torch.empty_like(a), bad)
    yield ops.ties_merge, (pair, a, *trim, "positive", 0.0, number, torch.empty_like(a), None)
    weights = torch.rand(2, 2, device=device)
    yield ops.weighted_sum, (pair, weights, a, bounds, torch.empty_like(a), bad)
    yield ops.weighted_sum, (pair, weights, None, bounds, torch.empty_like(a), None)
    yield ops.magmax_merge, (pair, a, 0.5, None, torch.empty_like(a), bad)
    yield ops.fisher_average, (pair, [a.abs(), g.abs()], weights[:, :1].contiguous(), torch.empty_like(a), bad)
    yield ops.dare_merge, (pair, weights[:, :1].contiguous(), 0.5, a, 3, 1, 7, torch.empty_like(a), bad)
    yield ops.stock_squares, (pair, a, bounds)
    yield ops.segment_norms, (a, b, bounds)
    yield ops.stock_update_, (a, b, per_segment, bounds, c.clone(), g.clone())
    yield ops.stock_finalize, (a, b, per_segment, bounds, torch.empty_like(a), bad)
    for replace in ("none", "anchored", "literal"):
        position = (3, 1, replace, 0.6, 7)
        initial = c if replace == "literal" else None
        yield ops.trm_direction, (a, b, *position)
        yield ops.trm_merge, (a, b, initial, 0.3, None, 0.0, number, direction, *position, torch.empty_like(a), bad)
        yield ops.subspace_gradient, (g, c, 0.5, a, b, direction, *position)


def test_opcheck(device):
    seen = set()
    for op, arguments in calls(device):
        every = (
            {} if op not in seen else {"test_utils": ("test_schema", "test_faketensor")}
        )  # the other checks take a second each
        torch.library.opcheck(op, arguments, **every)
        seen.add(op)


def test_every_op_is_checked():
    """A new op must be added to `calls`."""
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastmerge::")
    }
    assert registered == {op.__name__ for op, _ in calls("cpu")}


def test_ops_with_segments_stay_out_of_cuda_graphs():
    for op, _ in calls("cpu"):
        segments = any(argument.name == "segments" for argument in op.default._schema.arguments)
        assert (torch.Tag.cudagraph_unsafe in op.default.tags) == segments, op


def trm_step(a, b, c, g, alpha, seed):
    bad = torch.zeros(1, dtype=torch.int64, device=a.device)
    direction = fk.trm_direction(a * 1.0, b, seed=seed, subsequence=1)
    merged = fk.trm_merge(a, b, alpha, 2.0, direction, seed=seed, subsequence=1, nonfinite=bad)
    literal = fk.trm_merge(a, b, alpha, 2.0, direction, seed=seed, subsequence=1, replace="literal", initial=c)
    sums = fk.subspace_gradient(g, a, b, direction, seed=seed, subsequence=1, gradient2=c, scale2=0.5)
    kept = a.clone()
    fk.lerp(kept, b, alpha, out=kept)
    return direction, merged, literal, sums, kept * 2, bad


def pairwise(a, b, c, g, alpha, seed):
    theta, fisher, state = a.clone(), g.abs(), [a * 0 for _ in range(6)]
    fk.fisher_merge_(theta, fisher, b, c.abs(), alpha)
    fk.pam_accumulate_(state[0], state[1], g.abs(), b, a)
    fk.magmax_update_(state[2], b, initial=a)
    fk.fisher_accumulate_(state[3], g, 0.5)
    fk.ewc_gradient_(state[4], g.abs(), b, a, 2.0)
    fk.stock_update_(state[4], state[5], b, initial=a)
    coefficient = fk.pam_coefficient(state[0], state[1], c, b, a)
    stock = fk.stock_finalize(state[4], state[5], 1, initial=a)
    return theta, fisher, *state, coefficient, stock, fk.axpy(a, b, 0.5), fk.segment_norms(a, segments=[0, 16, 1100])


def streamed_ties(a, b, c, g, alpha, seed):
    state = [a * 0 for _ in range(4)]
    for model in (b, c):
        threshold, cut = fk.magnitude_threshold(model, 200, initial=a, keep="exactly")
        fk.ties_update_(*state, model, initial=a, threshold=threshold, cut=cut)
    digit, rank = fk.magnitude_digit(fk.magnitude_histogram(a), torch.full((1,), 9, device=a.device))
    return fk.ties_finalize(*state, initial=a, zero="majority"), digit, rank


def lists(a, b, c, g, alpha, seed):
    models, key, segments = [b, c, g], {"seed": seed, "subsequence": 1}, [0, 16, 1100]
    return (
        fk.weighted_sum(models, initial=a, segments=segments),
        fk.magmax_merge(models, initial=a, scale=alpha),
        fk.fisher_average(models, [m.abs() for m in models]),
        fk.random_mix(models, **key),
        fk.random_replace_(a.clone(), b, 0.5, **key),
        fk.dare_merge(models, 0.5, initial=a, **key),
        fk.dare_delta(b, 0.5, initial=a, **key),
        fk.ties_merge(models, initial=a, segments=segments),
        fk.stock_merge(models, initial=a, segments=segments),
    )


@pytest.mark.parametrize("function", [trm_step, pairwise, streamed_ties, lists])
def test_compiles_to_one_graph(device, function):
    """torch.compile(fullgraph=True) does not change the result of any public op."""
    a, b, c, g = vectors(4, 1100, device=device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in (5, 6, 2**62):
        alpha = torch.tensor(0.1 * (seed % 10), device=device)
        pairs = zip(compiled(a, b, c, g, alpha, seed), function(a, b, c, g, alpha, seed), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_every_public_op_is_compiled():
    """A new public op must be added to a function above."""
    source = "".join(inspect.getsource(f) for f in (trm_step, pairwise, streamed_ties, lists))
    used = set(re.findall(r"fk\.(\w+)\(", source))
    assert set(fk.__all__) - used == {"perturb", "stock_ratio"}  # an alias of axpy; part of `stock_finalize`


def test_writes_raise_the_version_counter(device):
    a, b = vectors(2, 64, device=device)
    bad, version = torch.zeros(1, dtype=torch.int64, device=device), a._version
    fk.lerp(a, b, 0.5, out=a, nonfinite=bad)
    assert a._version > version and bad._version > 0


def test_parameters_may_require_grad(device):
    a, b = (torch.nn.Parameter(x) for x in vectors(2, 640, device=device))
    expected = fk.lerp(a.detach(), b.detach(), 0.5)
    assert torch.equal(fk.lerp(a, b, 0.5, out=a), expected) and not fk.lerp(a, b, 0.5).requires_grad


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"current": torch.zeros(9)}, ValueError, "current: expected shape .10., that of previous, got .9."),
        ({"current": torch.zeros(10, dtype=torch.float64)}, TypeError, "current: expected dtype .* got torch.float64"),
        ({"current": torch.zeros(10, dtype=torch.int32)}, TypeError, "current: expected dtype .* got torch.int32"),
        ({"current": torch.zeros(20)[::2]}, ValueError, "current: expected a contiguous tensor"),
        ({"current": torch.zeros(2, 5)}, ValueError, "current: expected a 1-D tensor, got shape .2, 5."),
        ({"current": [0.0] * 10}, TypeError, "current: expected a tensor, got list"),
        (
            {"current": torch.zeros(10, device="meta")},
            ValueError,
            "current: expected device cpu, that of previous, got meta",
        ),
        ({"out": torch.zeros(11)}, ValueError, "out: expected shape"),
        ({"direction": torch.zeros(2, dtype=torch.float64)}, ValueError, "direction: expected the float64 .3."),
        ({"direction": torch.zeros(3)}, ValueError, "direction: expected the float64 .3."),
        ({"replace": "anchord"}, ValueError, "replace: expected one of none, anchored, literal, got 'anchord'"),
        ({"replace": "literal"}, ValueError, "initial: needed for replace='literal'"),
        ({"initial": torch.zeros(10)}, ValueError, "initial: needed for replace='literal' and only there"),
        ({"ratio": 1.5}, ValueError, "ratio: expected a number in .0, 1., got 1.5"),
        ({"ratio": float("nan")}, ValueError, "ratio: expected"),
        ({"offset": -1}, ValueError, "offset: expected 0 <= offset"),
        ({"offset": 2**62}, ValueError, "offset: expected 0 <= offset"),
        ({"seed": -1}, ValueError, "seed: expected an integer in"),
        ({"subsequence": 2**63}, ValueError, "subsequence: expected an integer in"),
        ({"alpha": torch.zeros(2)}, ValueError, "alpha: expected one floating-point element"),
        ({"nonfinite": torch.zeros(1)}, TypeError, "nonfinite: expected an int64 tensor"),
        ({"nonfinite": torch.zeros(2, dtype=torch.int64)}, ValueError, "nonfinite: expected one element"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {
        "previous": torch.ones(10),
        "current": torch.ones(10),
        "alpha": 0.5,
        "beta": 0.1,
        "seed": 0,
        "subsequence": 0,
    }
    arguments |= {"direction": torch.ones(3, dtype=torch.float64), "out": torch.full((10,), 7.0)} | change
    out = arguments["out"].clone()
    with pytest.raises(error, match=words):
        fk.trm_merge(**arguments)
    assert torch.equal(arguments["out"], out)  # nothing was written


def test_partial_overlap_is_an_error():
    memory = torch.zeros(30)
    with pytest.raises(ValueError, match="out: partly overlaps b"):
        fk.lerp(memory[20:], memory[5:15], 0.5, out=memory[:10])
    with pytest.raises(ValueError, match="out: partly overlaps a"):
        fk.lerp(memory[:10], memory[20:], 0.5, out=memory[:5].view(torch.bfloat16))


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="fastmerge::lerp"):
        torch.ops.fastmerge.lerp(*[torch.zeros(3).to_sparse()] * 3, 0.5, None, None)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def test_an_op_of_one_device_is_refused_by_name_on_others():
    code = """
import torch
from fastmerge_kernels.registry import register

op = register("only_cuda(Tensor x) -> Tensor", fake=torch.empty_like, devices=("cuda",))(lambda x: x + 1)
assert op(torch.ones(3, device="meta")).shape == (3,)
try:
    op(torch.ones(3))
except NotImplementedError as error:
    print(error)
try:
    register("nowhere(Tensor x) -> ()", devices=("tpu",))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "fastmerge::only_cuda runs on cuda tensors only",
        "devices: expected some of cpu, cuda, got ['tpu']",
    ]


def test_import_is_light():
    """Importing loads neither numba nor Triton; the first op loads numba, but not Triton or torch's compiler."""
    run = python(
        "import sys, torch; before = set(sys.modules); import fastmerge_kernels as fk\n"
        "new = set(sys.modules) - before; assert not new & {'numba', 'triton', 'llvmlite'}, new\n"
        "fk.lerp(torch.ones(3), torch.ones(3), 0.5)\n"
        "assert 'numba' in sys.modules and not {'triton', 'torch._dynamo'} & set(sys.modules)"
    )
    assert run.returncode == 0, run.stderr


def addition(start, stop, x):
    return int(start + stop + x[0])


@pytest.mark.parametrize("fault", ["no folder", "full disk"])
def test_unwritable_cache_gives_one_warning(monkeypatch, fault):
    """If numba finds no cache folder or cannot write to it, loops still work and one warning states the cost."""
    from fastmerge_kernels.cpu import cache
    from numba.core import caching

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setattr(cache, "_SOURCES", fault)
    if fault == "no folder":
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    else:
        monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for dtype in (np.float32, np.float64):
            assert cache.loop(addition)(1, 2, np.ones(1, dtype)) == 4
    assert [str(w.message)[:50] for w in seen] == ["fastmerge_kernels compiles its CPU loops anew in e"]


def test_cache_is_used_and_follows_the_sources(monkeypatch, tmp_path):
    """A second dispatcher loads what the first compiled; one with a new fingerprint of the sources compiles again."""
    import numba
    from fastmerge_kernels.cpu import cache

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    results = []
    for fingerprint in ("one", "one", "two"):
        monkeypatch.setattr(cache, "_SOURCES", fingerprint)
        function = cache.loop(addition)
        assert function(1, 2, np.ones(1, np.float32)) == 4
        results.append((len(function.stats.cache_hits), len(function.stats.cache_misses)))
    assert results == [(0, 1), (1, 0), (0, 1)]


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "names a class that is gone"])
def test_a_damaged_cache_file_is_made_anew(monkeypatch, tmp_path, ending, damage):
    import numba
    from fastmerge_kernels.cpu import cache

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert cache.loop(addition)(1, 2, np.ones(1, np.float32)) == 4
    (file,) = tmp_path.rglob(f"*{ending}")
    whole = file.read_bytes()
    gone = b"cfastmerge_kernels.cpu.memory\nGone\n."  # a pickle
    file.write_bytes({"cut": whole[:-10], "emptied": b""}.get(damage, gone))
    for misses in (1, 0):  # compiled again, then loaded again
        function = cache.loop(addition)
        assert function(1, 2, np.ones(1, np.float32)) == 4
        assert len(function.stats.cache_misses) == misses


def test_the_cache_key_covers_every_file(tmp_path):
    """A changed constant in any file of the package (a tile size, say) changes the fingerprint."""
    from fastmerge_kernels.cpu import cache

    copy = tmp_path / "fastmerge_kernels"
    shutil.copytree(Path(fk.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = cache.fingerprint(copy)
    assert before == cache._SOURCES
    for file in copy.rglob("*.py"):
        text = file.read_text()
        file.write_text(text + "# another constant\n")
        assert cache.fingerprint(copy) != before, file
        file.write_text(text)
    assert cache.fingerprint(copy) == before
