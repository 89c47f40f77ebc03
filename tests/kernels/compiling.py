"""Compile Triton kernels without a GPU: record launches instead of running them, then build as the launcher would."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
POINTERS |= {torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}


@contextlib.contextmanager
def recorded_launches():
    """Within the context `kernel[grid](...)` only appends (kernel, arguments, options) to the yielded list."""
    launches, original = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        bound = dict(zip(self.arg_names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        launches.append((self, bound, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def launches(dtype: torch.dtype) -> list:
    """Record the launches that the ops make of every kernel, for aligned vectors of this dtype."""
    from fastmerge_kernels.gpu import elementwise, lists, sampling, stock, threshold, ties, trm

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
        sampling.random_mix([a, b, c], 5, 6, 0, out, bad)
        sampling.random_replace(a, 0.5, 5, 6, 0, out, bad)
        sampling.dare_delta(a, b, 0.5, 5, 6, 0, out, bad)
        bits, place = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
        threshold.histogram(a, b, None, 0, 11, (0, a.numel()))
        threshold.histogram(a, b, bits, 11, 10, (0, a.numel()))
        threshold.threshold(a, b, (5,), (0, a.numel()), True)
        ties.update(a, b, bits, place, (0, a.numel()), 0.5, 0.5, out, out, out, out, out)
        ties.signs(a, b, None)
        ties.finalize(a, b, c, out, a, b, half, half, out, bad)
        per_segment = torch.ones(2, dtype=torch.float64)
        trim, ones = (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64)), torch.ones(2)
        election = (ones, ones, False, "majority")
        ties.merge([b, c], a, *trim, (0, a.numel()), *election, half, out, bad)
        lists.weighted_sum([b, c], ones[:, None], a, (0, a.numel()), out, bad)
        lists.magmax([b, c], a, half, out, bad)
        lists.fisher([b, c], [a, b], ones[:, None], out, bad)
        lists.dare([b, c], ones[:, None], 0.5, a, 5, 6, 0, out, bad)
        stock.squares([b, c], a, (0, 1 << 20, 1 << 21))
        stock.norms(a, b, (0, 1 << 20, 1 << 21))
        stock.update(a, b, per_segment, (0, 1 << 20, 1 << 21), c, out)
        stock.finalize(a, b, per_segment, (0, 1 << 20, 1 << 21), out, bad)
        trm.direction(a, b, *anchored)
        trm.gradient(a, b, 0.5, b, c, direction, *anchored)
        trm.merge(a, b, None, half, half, direction, *anchored, out, bad)
        trm.merge(a, b, c, half, half, direction, *literal, out, bad)
    return recorded


def compile_launch(kernel: JITFunction, arguments: dict, options: dict, capability: int):
    """Build the kernel for compute capability 80, 90 or 100, specialised as launched (alignment, multiples of 16)."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch's allocations are aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _bundled(tool: str, *arguments: str | Path) -> str:
    """Run an NVIDIA tool that Triton bundles and return its output."""
    path = TOOLS / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def registers_and_stack(compiled) -> tuple[int, int]:
    """Return (registers, bytes of stack and local memory) per thread; the bytes are 0 unless registers spill."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _bundled("cuobjdump", "-res-usage", cubin)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def instructions(compiled, capability: int) -> tuple[int, int]:
    """Count SASS instructions (outside loops, in one pass through each loop), with code for rare cases but no padding.

    ptxas unrolls some loops into several copies; to count one pass, it assembles the PTX here without unrolling.
    """
    assembler = "ptxas" if capability < 90 else "ptxas-blackwell"  # as Triton chooses
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(re.sub(r"(\.address_size 64\n)", r'\1.pragma "nounroll";\n', compiled.asm["ptx"]))
        architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        _bundled(assembler, f"--gpu-name={architecture}", "--regAllocOptLevel=2", ptx, "-o", cubin)
        listing = _bundled("nvdisasm", "-c", cubin)
    labels, names, looped = {}, [], set()
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            target = re.search(r"BRA.*`\((\.L\w+)\)", line)
            if target and labels.get(target[1], len(names)) < len(names):  # a branch back
                looped |= set(range(labels[target[1]], len(names) + 1))
            names.append(code[1])
    real = {k for k, name in enumerate(names) if name != "NOP"}
    return len(real - looped) - 1, len(real & looped)  # the last instruction branches to itself
