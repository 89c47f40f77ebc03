"""Every kernel, compiled without a GPU, spills no registers, uses 128-bit loads and stores, moves no random numbers between
threads, and has no more instructions per entry than `bench/results/compiled.md` says.

`test_every_kernel_is_compiled` fails if `compiling.launches` does not launch a kernel.
"""

from __future__ import annotations

import collections
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from oracle import INTERPRET

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")

import fastmerge_kernels  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "add_rows",
    "digit_kernel",
    "lowest_kernel",
    "plane_kernel",
    "project_kernel",
    "stock_sums_kernel",
    "table_kernel",
    "tie_count_kernel",
    "tie_place_kernel",
}  # one program per segment, or one in all; or they read a few candidates of each chunk

WIDEST = (
    "lerp_kernel",
    "merge_kernel",
    "sums_kernel",
    "ties_update_kernel",
    "ties_merge_kernel",
)  # the kernels with most registers or vectors


@pytest.mark.parametrize(
    "dtype, capability, some",
    [
        (torch.float32, 80, False),
        (torch.float32, 90, False),
        (torch.bfloat16, 90, True),
        (torch.float32, 100, True),
        pytest.param(torch.float32, 100, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 80, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, 100, False, marks=pytest.mark.slow),
    ],
)
def test_no_spills_and_wide_accesses(dtype, capability, some):
    from compiling import compile_launch, launches, registers_and_stack

    seen = set()
    for kernel, arguments, options in launches(dtype):
        if some and (kernel.__name__ not in WIDEST or kernel.__name__ in seen):
            continue
        seen.add(kernel.__name__)
        compiled = compile_launch(kernel, arguments, options, capability)
        registers, stack = registers_and_stack(compiled)
        assert stack == 0, f"{kernel.__name__} spills {stack} bytes"
        assert registers <= 255
        if kernel.__name__ in SMALL:
            continue
        if "LANES" in arguments:  # random numbers
            assert "ttg.convert_layout" not in compiled.asm["ttgir"], (
                f"{kernel.__name__} shuffles through shared memory"
            )
        accesses = collections.Counter(re.findall(r"(ld|st)\.global\.(\S+)", compiled.asm["ptx"]))
        vectors = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.dtype == dtype and x.numel() > 1]
        assert accesses["ld", "v4.b32"] >= len(vectors) - 1, accesses
        if kernel.__name__ == "collect_kernel":  # its stores are scattered
            continue
        small = [x.numel() for x in arguments.values() if isinstance(x, torch.Tensor) and x.numel() <= 8]
        narrow = sum(
            count for (_, width), count in accesses.items() if width not in ("v4.b32", "b64")
        )  # b64: rows of sums
        assert narrow <= sum(small), f"{kernel.__name__}: {accesses}"


def test_every_kernel_is_compiled():
    from compiling import launches
    from triton.runtime.jit import JITFunction

    launched = {kernel.__name__ for kernel, _, _ in launches(torch.float32)}
    for file in (Path(fastmerge_kernels.__file__).parent / "gpu").glob("*.py"):
        module = importlib.import_module(f"fastmerge_kernels.gpu.{file.stem}")
        kernels = {n for n, f in vars(module).items() if isinstance(f, JITFunction) and n.endswith("_kernel")}
        assert kernels <= launched, f"{file.name}: {kernels - launched} not compiled by this test"


def committed_table() -> tuple[str, dict[str, dict[str, str]]]:
    """(Triton's version, kernel -> column -> cell) of bench/results/compiled.md."""
    text = (ROOT / "bench" / "results" / "compiled.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    version = re.search(r"Triton (\d+\.\d+)", text)[1]
    return version, {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def table_module():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import compiled_table
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return compiled_table


@pytest.mark.slow
def test_no_more_instructions_than_in_the_committed_table():
    from compiling import TOOLS, compile_launch, instructions, launches

    if not (TOOLS / "nvdisasm").exists():
        pytest.skip(f"this Triton has no {TOOLS / 'nvdisasm'} to list machine instructions")
    module, (version, rows), seen = table_module(), committed_table(), set()
    if version != ".".join(triton.__version__.split(".")[:2]):
        pytest.skip(f"the table was made with Triton {version}; another compiler makes other code")
    for kernel, arguments, options in launches(torch.float32):
        name = kernel.__name__ + module.options(kernel, arguments)
        if kernel.__name__ in module.NO_ROW or name in seen:
            continue
        seen.add(name)
        assert name in rows, f"{name}: python bench/compiled_table.py > bench/results/compiled.md"
        compiled = compile_launch(kernel, arguments, options, 90)
        per_thread = module.entries(arguments) / (32 * compiled.metadata.num_warps)
        for column, count in zip(("sm_90 once", "sm_90 in loops"), instructions(compiled, 90), strict=True):
            limit = float(rows[name][column] or 0) + 0.06  # the table is rounded
            assert count / per_thread <= limit, f"{name}: {column} {count / per_thread:.1f}, in the table {limit:.1f}"
    assert seen == set(rows), f"python bench/compiled_table.py > bench/results/compiled.md: {seen ^ set(rows)}"


@pytest.mark.parametrize("n, shift", [(100_003, 0), (100_016, 5), (100_003, 77)])
def test_the_middle_of_an_unaligned_vector_is_read_wide(n, shift):
    """A shard that begins `shift` entries into an aligned vector, and any length: all but 15 entries at either end."""
    from compiling import recorded_launches
    from fastmerge_kernels.gpu import elementwise, lists, sampling, trm

    a, b, c, out = (torch.zeros(n + shift)[shift:] for _ in range(4))
    half, bad, direction = (0.5, None), torch.zeros(1, dtype=torch.int64), torch.ones(3, dtype=torch.float64)
    position, ones = (5, 6, "anchored", 0.6, 512 + shift), torch.ones(2, 1)
    calls = (
        lambda: elementwise.launch("lerp", (a, b, out), [half], bad),
        lambda: elementwise.pam_coefficient(a, b, c, out, out),
        lambda: sampling.random_mix([a, b, c], 5, 6, 512 + shift, out, bad),
        lambda: sampling.random_replace(a, 0.5, 5, 6, 512 + shift, out, bad),
        lambda: sampling.dare_delta(a, b, 0.5, 5, 6, 512 + shift, out, bad),
        lambda: lists.magmax([b, c], a, half, out, bad),
        lambda: lists.fisher([b, c], [a, b], ones, out, bad),
        lambda: lists.dare([b, c], ones, 0.5, a, 5, 6, 512 + shift, out, bad),
        lambda: trm.direction(a, b, *position),
        lambda: trm.gradient(a, b, 0.5, b, c, direction, *position),
        lambda: trm.merge(a, b, None, half, half, direction, *position, out, bad),
    )
    for call in calls:
        with recorded_launches() as recorded:
            call()
        lengths = []
        for _, arguments, _ in recorded:
            vectors = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.numel() == arguments.get("n")]
            if vectors:
                aligned = all(x.data_ptr() % 16 == 0 for x in vectors) and arguments["n"] % 16 == 0
                lengths.append((arguments["n"], aligned and arguments.get("shift", 0) % 16 == 0))
        assert sum(length for length, _ in lengths) == n
        assert sum(length for length, wide in lengths if wide) >= n - 30


def test_offsets_are_64_bit():
    """For a vector of 2^40 entries the length is a 64-bit integer, and addresses are computed in 64 bits."""
    from compiling import compile_launch, launches

    for kernel, arguments, options in launches(torch.float32):
        if kernel.__name__ in (
            "lerp_kernel",
            "merge_kernel",
            "sums_kernel",
            "magmax_merge_kernel",
        ):  # one kernel for each way to compute indices
            compiled = compile_launch(kernel, arguments | {"n": 1 << 40}, options, 90)
            assert re.search(r"tt.func public @\w+\(.*%n: i64", compiled.asm["ttir"])
            assert re.search(r"arith.extsi .* : i32 to i64|arith.muli .* : i64", compiled.asm["ttir"])
            assert not re.search(
                r"arith.muli %\w+, .* : i32\n", compiled.asm["ttir"].split("tt.reduce")[0].split("scf.for")[0]
            )
