"""What only a GPU can show of the ops, under `-m gpu`: graphs, streams, waits, a second device, vectors beyond 2^31 entries.

`test_registration.calls` makes a call of every op; the helpers of these tests run on the CPU as well.
"""

from __future__ import annotations

import copy

import fastmerge_kernels as fk
import pytest
import torch
from oracle import INTERPRET
from test_registration import calls, lists, pairwise, streamed_ties, trm_step, vectors

pytestmark = pytest.mark.skipif(INTERPRET, reason="independent of the kernels' values")
N_BIG = 2**31 + 1000
gpu = pytest.mark.gpu


def tensors(values):
    """All tensors in nested lists and tuples, in order."""
    for x in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors(x)


def run(op, arguments):
    arguments = copy.deepcopy(arguments)
    result = op(*arguments)
    return [x.clone() for x in (*tensors(list(arguments)), *tensors(result))]


def same(found, expected) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=gpu)])
def test_calls_are_repeatable(device):
    """The other tests compare with `run`."""
    for op, arguments in calls(device):
        assert same(run(op, arguments), run(op, arguments)), op


@gpu
def test_every_op_is_captured_in_a_graph():
    """A captured call, replayed on new contents of its arguments, gives what a call gives."""
    for op, arguments in calls("cuda"):
        fresh, held = copy.deepcopy(arguments), copy.deepcopy(arguments)
        run(op, arguments)  # compiles, and makes tables of segments
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = op(*held)
        other = run(op, arguments)  # host memory of the call is used again before the replay
        for mine, original in zip(tensors(list(held)), tensors(list(fresh)), strict=True):
            mine.copy_(original)
        graph.replay()
        torch.cuda.synchronize()
        assert same([*tensors(list(held)), *tensors(result)], other), op


@gpu
def test_ops_follow_the_current_stream():
    """On a side stream an op sees what was queued there before it."""
    stream = torch.cuda.Stream()
    for op, arguments in calls("cuda"):
        expected = run(op, arguments)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            held = [x.clone() if isinstance(x, torch.Tensor) else copy.deepcopy(x) for x in arguments]
            for x in tensors(held):
                original = x.clone()
                x.zero_()
                torch.cuda._sleep(1_000_000)
                x.copy_(original)
            result = op(*held)
        stream.synchronize()
        assert same([*tensors(held), *tensors(result)], expected), op


@gpu
def test_ops_do_not_wait():
    """The second call of every op, under `set_sync_debug_mode("error")`."""
    for op, arguments in calls("cuda"):
        run(op, arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            op(*arguments)
        except RuntimeError as error:
            raise AssertionError(f"{op} waits for the device: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_public_functions_do_not_wait():
    a, b, c = vectors(3, 5000, device="cuda")
    key = {"seed": 3, "subsequence": 1}
    functions = (
        lambda: fk.weighted_sum([b, c], [0.5, 0.5], initial=a),
        lambda: fk.magmax_merge([b, c], initial=a),
        lambda: fk.fisher_average([b, c], [b.abs(), c.abs()], check=False),
        lambda: fk.dare_merge([b, c], 0.5, initial=a, **key),
        lambda: fk.ties_merge([b, c], initial=a),
        lambda: fk.stock_merge([b, c], initial=a),
        lambda: fk.trm_merge(a, b, 0.3, 2.0, fk.trm_direction(a, b, **key), **key),
    )
    for function in functions:
        function()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        for (op, first), (_, second) in zip(calls("cuda:0"), calls("cuda:1"), strict=True):
            found, expected = run(op, second), run(op, first)
            assert all(x.device.index == 1 for x in found), op
            assert same([x.cpu() for x in found], [x.cpu() for x in expected]), op


@gpu
@pytest.mark.parametrize("function", [trm_step, pairwise, streamed_ties, lists])
def test_inductor(function):
    """The code that inductor makes around the ops, with its CUDA graphs, gives the results of eager calls to rounding."""
    a, b, c, g = vectors(4, 1100, device="cuda")
    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for seed in (5, 6, 6, 6):
        alpha = torch.tensor(0.1 * seed, device="cuda")
        found = [x.clone() for x in compiled(a, b, c, g, alpha, seed)]
        for mine, eager in zip(found, function(a, b, c, g, alpha, seed), strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


BIG = {  # op of vectors x, y and a buffer -> result; the last entries must be those of a call with the last entries
    "lerp": lambda x, y, z, offset: fk.lerp(x, y, 0.3, out=z),
    "axpy": lambda x, y, z, offset: fk.axpy(x, y, 0.3, out=z),
    "magmax_update_": lambda x, y, z, offset: fk.magmax_update_(z, y, initial=x),
    "fisher_accumulate_": lambda x, y, z, offset: fk.fisher_accumulate_(z, y),
    "weighted_sum": lambda x, y, z, offset: fk.weighted_sum([x, y], out=z),
    "magmax_merge": lambda x, y, z, offset: fk.magmax_merge([y], initial=x, out=z),
    "random_mix": lambda x, y, z, offset: fk.random_mix([x, y], seed=3, subsequence=1, offset=offset, out=z),
    "random_replace_": lambda x, y, z, offset: fk.random_replace_(z, y, 0.5, seed=3, subsequence=1, offset=offset),
    "dare_delta": lambda x, y, z, offset: fk.dare_delta(y, 0.5, initial=x, seed=3, subsequence=1, offset=offset, out=z),
    "dare_merge": lambda x, y, z, offset: fk.dare_merge(
        [y], 0.5, initial=x, seed=3, subsequence=1, offset=offset, out=z
    ),
    "ties_finalize": lambda x, y, z, offset: fk.ties_finalize(x, -y, x, y, out=z),
}


@pytest.mark.parametrize("n, device", [(9000, "cpu"), pytest.param(N_BIG, "cuda", marks=gpu)])
@pytest.mark.parametrize("name", BIG)
def test_the_end_of_a_long_vector(name, n, device):
    """bf16 vectors of more than 2^31 entries on a GPU: offsets of 32 bits would wrap."""
    tail, call = 1000, BIG[name]
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 4 * n * 2:
        pytest.skip("needs 18 GB of free device memory")
    x, y, z = (torch.full((n,), value, dtype=torch.bfloat16, device=device) for value in (1.0, 2.0, 0.5))
    x[-tail:] = torch.linspace(1, 3, tail)
    parts = [v[-tail:].clone() for v in (x, y, z)]
    found = call(x, y, z, 0)[-tail:]
    assert torch.equal(found, call(*parts, n - tail))


@gpu
def test_sums_of_a_long_vector():
    if torch.cuda.mem_get_info()[0] < 4 * N_BIG * 2:
        pytest.skip("needs 18 GB of free device memory")
    x = torch.ones(N_BIG, dtype=torch.bfloat16, device="cuda")
    assert fk.segment_norms(x).item() == N_BIG
    threshold, cut = fk.magnitude_threshold(x, N_BIG - 5, keep="exactly")
    assert threshold.item() == 1 and cut.item() == N_BIG - 6
    assert fk.magnitude_histogram(x).sum().item() == N_BIG
    assert fk.pam_coefficient(x, x, x, x, x).tolist() == [0, 0]
