"""What Triton and ptxas make of every kernel for sm_80 and sm_90, without a GPU: no spills, 128-bit loads and stores.

A kernel that no call below launches fails `test_every_kernel_is_compiled`.
"""

from __future__ import annotations

import collections
import importlib
import re
from pathlib import Path

import pytest
import torch
from oracle import INTERPRET

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing is compiled in the interpreter")

import fastmerge_kernels  # noqa: E402

SMALL = {
    "add_rows",
    "project_kernel",
    "stock_sums_kernel",
    "tie_place_kernel",
}  # a program per segment, or a single one

WIDEST = (
    "lerp_kernel",
    "merge_kernel",
    "sums_kernel",
    "ties_update_kernel",
    "ties_merge_kernel",
)  # those with most registers or vectors


def launches(dtype: torch.dtype) -> list:
    """Every kernel as the ops launch it, for aligned vectors of this dtype."""
    from compiling import recorded_launches
    from fastmerge_kernels import batch_gpu as batch
    from fastmerge_kernels import elementwise_gpu as elementwise
    from fastmerge_kernels import sampling_gpu, stock_gpu, threshold_gpu, ties_gpu, trm_gpu

    a, b, c, out = (torch.zeros(1 << 21, dtype=dtype) for _ in range(4))
    half, bad = (0.5, None), torch.zeros(1, dtype=torch.int64)
    direction = torch.ones(3, dtype=torch.float64)
    anchored, literal = (5, 6, "anchored", 0.6, 0), (5, 6, "literal", 0.6, 0)
    with recorded_launches() as recorded:
        elementwise.launch("lerp", (a, b, out), [half], bad)
        elementwise.launch("axpy", (a, b, out), [half], bad)
        elementwise.launch("fisher_merge_", (a, b, c, out), [half], bad)
        elementwise.launch("pam_accumulate_", (a, b, c, out, out), [], bad)
        elementwise.launch("magmax_update_", (a, b, c), [], bad)
        elementwise.launch("magmax_delta_", (a, b), [], bad)
        elementwise.launch("fisher_accumulate_", (a, b), [half], bad)
        elementwise.launch("ewc_gradient_", (a, b, c, out), [half], bad)
        elementwise.pam_coefficient(a, b, c, out, out)
        sampling_gpu.random_mix([a, b, c], 5, 6, 0, out, bad)
        sampling_gpu.dare_delta(a, b, 0.5, 5, 6, 0, out, bad)
        bits, place = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
        threshold_gpu.histogram(a, b, None, 0, 8, (0, a.numel()))
        threshold_gpu.histogram(a, b, bits, 8, 8, (0, a.numel()))
        threshold_gpu.tie_positions(a, b, bits, place, (0, a.numel()))
        ties_gpu.update(a, b, bits, place, (0, a.numel()), 0.5, 0.5, out, out, out, out, out)
        ties_gpu.finalize(a, b, c, out, a, b, half, half, out, bad)
        per_segment = torch.ones(2, dtype=torch.float64)
        trim, ones = (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64)), torch.ones(2)
        election = (ones, ones, False, "majority")
        ties_gpu.merge([b, c], a, *trim, (0, a.numel()), *election, half, out, bad)
        batch.weighted_sum([b, c], ones[:, None], a, (0, a.numel()), out, bad)
        batch.magmax([b, c], a, half, out, bad)
        batch.fisher([b, c], [a, b], ones[:, None], out, bad)
        batch.dare([b, c], ones[:, None], 0.5, a, 5, 6, 0, out, bad)
        stock_gpu.squares([b, c], a, (0, 1 << 20, 1 << 21))
        stock_gpu.norms(a, b, (0, 1 << 20, 1 << 21))
        stock_gpu.update(a, b, per_segment, (0, 1 << 20, 1 << 21), c, out)
        stock_gpu.finalize(a, b, per_segment, (0, 1 << 20, 1 << 21), out, bad)
        trm_gpu.direction(a, b, *anchored)
        trm_gpu.gradient(a, b, 0.5, b, c, direction, *anchored)
        trm_gpu.merge(a, b, None, half, half, direction, *anchored, out, bad)
        trm_gpu.merge(a, b, c, half, half, direction, *literal, out, bad)
    return recorded


def names(dtype=torch.float32) -> list[str]:
    return [kernel.__name__ for kernel, _, _ in launches(dtype)] if not INTERPRET else []


@pytest.mark.parametrize("dtype, capability", [(torch.float32, 80), (torch.float32, 90), (torch.bfloat16, 90)])
def test_no_spills_and_wide_accesses(dtype, capability):
    from compiling import compile_launch, registers_and_stack

    seen = set()
    for kernel, arguments, options in launches(dtype):
        if dtype == torch.bfloat16 and (kernel.__name__ not in WIDEST or kernel.__name__ in seen):
            continue
        seen.add(kernel.__name__)
        compiled = compile_launch(kernel, arguments, options, capability)
        registers, stack = registers_and_stack(compiled)
        assert stack == 0, f"{kernel.__name__} spills {stack} bytes"
        assert registers <= 255
        if kernel.__name__ in SMALL:
            continue
        accesses = collections.Counter(re.findall(r"(ld|st)\.global\.(\S+)", compiled.asm["ptx"]))
        vectors = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.dtype == dtype and x.numel() > 1]
        assert accesses["ld", "v4.b32"] >= len(vectors) - 1, accesses
        small = [x.numel() for x in arguments.values() if isinstance(x, torch.Tensor) and x.numel() <= 8]
        narrow = sum(
            count for (_, width), count in accesses.items() if width not in ("v4.b32", "b64")
        )  # b64: rows of sums
        assert narrow <= sum(small), f"{kernel.__name__}: {accesses}"


def test_every_kernel_is_compiled():
    from triton.runtime.jit import JITFunction

    launched = {kernel.__name__ for kernel, _, _ in launches(torch.float32)}
    for file in Path(fastmerge_kernels.__file__).parent.glob("*_gpu.py"):
        module = importlib.import_module(f"fastmerge_kernels.{file.stem}")
        kernels = {n for n, f in vars(module).items() if isinstance(f, JITFunction) and n.endswith("_kernel")}
        assert kernels <= launched, f"{file.name}: {kernels - launched} not compiled by this test"


def test_offsets_are_64_bit():
    """A vector of 2^40 entries: the length arrives as a 64-bit integer and addresses are computed from it."""
    from compiling import compile_launch

    for kernel, arguments, options in launches(torch.float32):
        if kernel.__name__ in (
            "lerp_kernel",
            "merge_kernel",
            "sums_kernel",
            "magmax_merge_kernel",
        ):  # the ways to compute indices
            compiled = compile_launch(kernel, arguments | {"n": 1 << 40}, options, 90)
            assert re.search(r"tt.func public @\w+\(.*%n: i64", compiled.asm["ttir"])
            assert re.search(r"arith.extsi .* : i32 to i64|arith.muli .* : i64", compiled.asm["ttir"])
            assert not re.search(
                r"arith.muli %\w+, .* : i32\n", compiled.asm["ttir"].split("tt.reduce")[0].split("scf.for")[0]
            )
