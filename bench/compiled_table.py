"""Registers per thread and instructions per entry of every Triton kernel, compiled without a GPU, as a Markdown table.

    python bench/compiled_table.py > bench/results/compiled.md

Registers are those of the kernel as it runs. Instructions are machine instructions (SASS) per vector entry, outside
loops (`once`) and in one pass through the loops (`in loops`). Rules over lists make one pass per model: an entry costs
`once + T * in loops`. Sums make one pass per block of their span, so an entry costs `in loops`. The counts include code
for rare cases (counting a NaN, dividing denormals). Vectors are fp32 and aligned, as the ops launch them; entries per
thread are those of one pass. `digit_kernel`, `plane_kernel`, `project_kernel` and `table_kernel` compute or write a few
numbers: they have no entries and no row.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
from compiling import compile_launch, instructions, launches, registers_and_stack  # noqa: E402

CAPABILITIES = (80, 90, 100)
NO_ROW = {"digit_kernel", "plane_kernel", "project_kernel", "table_kernel"}


def entries(arguments: dict) -> int:
    """Return the vector entries of one program (of one pass through its loop)."""
    return arguments.get("LANES", 0) * 4 or arguments.get("SIZE") or arguments["BLOCK"]


def options(kernel, arguments: dict) -> str:
    """Name the optional arguments that this launch leaves out."""
    absent = [p.name for p in kernel.params if arguments[p.name] is None and not p.name.endswith("_pointer")]
    return f" (no {', '.join(absent)})" if absent else ""


def main() -> None:
    heads = [f"sm_{c} {what}" for c in CAPABILITIES for what in ("registers", "once", "in loops")]
    print(f"Registers per thread and instructions per entry, fp32, Triton {triton.__version__}.")
    print("Made by `python bench/compiled_table.py`, which says what is counted.\n")
    print(" | ".join(["| kernel", "entries/thread", *heads]) + " |")
    print("|---" + "|--:" * (len(heads) + 1) + "|")
    seen = set()
    for kernel, arguments, settings in launches(torch.float32):
        name = kernel.__name__ + options(kernel, arguments)
        if name in seen or kernel.__name__ in NO_ROW:
            continue
        seen.add(name)
        cells = []
        for capability in CAPABILITIES:
            compiled = compile_launch(kernel, arguments, settings, capability)
            per_thread = entries(arguments) / (32 * compiled.metadata.num_warps)
            once, looped = (x / per_thread for x in instructions(compiled, capability))
            cells += [str(registers_and_stack(compiled)[0]), f"{once:.1f}", f"{looped:.1f}" if looped else ""]
        print(" | ".join(["| " + name, f"{per_thread:g}", *cells]) + " |")


if __name__ == "__main__":
    main()
