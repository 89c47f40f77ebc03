"""Registration of ops with `torch.library`, and the choice between CPU loop and Triton kernel.

A family `x` has its formulas and public functions in `x.py`, its numba loops in `cpu/x.py` and its Triton kernels in
`gpu/x.py`. The last two are imported on first use, so importing the package costs neither numba nor Triton. With
TRITON_INTERPRET=1 in the environment CPU tensors go through the Triton kernels too (Triton's interpreter, for tests).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("fastmerge", "DEF")


def register_schema(name: str, schema: str, function: Callable, fake: Callable | None = None) -> Callable:
    """Make `function` the op `fastmerge::name` with this schema, on CPU and CUDA; returns the op.

    `fake` gives the results' shapes; without it the op returns nothing. `Library` rather than `custom_op`: the latter imports
    torch._dynamo at its first call, which costs seconds. So version counters of written tensors are raised here.
    """
    _library.define(name + schema)
    op = getattr(torch.ops.fastmerge, name).default
    written = [
        k for k, argument in enumerate(op._schema.arguments) if argument.alias_info and argument.alias_info.is_write
    ]

    @functools.wraps(function)
    def kernel(*args):
        result = function(*args)
        torch.autograd.graph.increment_version([args[k] for k in written if args[k] is not None])
        return result

    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"fastmerge::{name}", fake or (lambda *args: None), lib=_library)
    return op


def register(name: str, mutates: tuple[str, ...] = (), fake: Callable | None = None) -> Callable:
    """`register_schema` as decorator of an annotated function that writes into the arguments `mutates`."""

    def decorate(function: Callable) -> Callable:
        return register_schema(name, torch.library.infer_schema(function, mutates_args=mutates), function, fake)

    return decorate


def backend(family: str, tensor: Tensor):
    """The module with this family's loops for the tensor's device: `gpu.family` (Triton) or `cpu.family` (numba)."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return importlib.import_module(f".gpu.{family}", __package__)
    if tensor.device.type == "cpu":
        return importlib.import_module(f".cpu.{family}", __package__)
    raise RuntimeError(f"fastmerge_kernels runs on cpu and cuda tensors, got a tensor on {tensor.device}")
