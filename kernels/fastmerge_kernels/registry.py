"""Registration of ops with `torch.library`, and the choice between CPU loop and Triton kernel.

A family `x` has its formulas and public functions in `x.py`, its numba loops in `cpu/x.py` and its Triton kernels in
`gpu/x.py`. The last two are imported on first use, so importing the package costs neither numba nor Triton. With
TRITON_INTERPRET=1 in the environment CPU tensors go through the Triton kernels too (Triton's interpreter, for tests).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")

_library = torch.library.Library("fastmerge", "DEF")


def register(
    schema: str, *, fake: Callable | None = None, devices: Sequence[str] = DEVICES, capturable: bool = True
) -> Callable[..., Callable]:
    """Decorator that makes a function the op `fastmerge::name` and returns the op.

    schema: torch's notation, `name(Tensor x, Tensor(a!) out) -> ()`; `(a!)` marks an argument that the op writes. fake:
    function of the same arguments that returns empty results of the right shape; an op that returns nothing needs none.
    devices: where the op runs, of `DEVICES`; elsewhere the call raises NotImplementedError that names the op. capturable:
    False for ops whose first call with new segments copies tables to the device and keeps them: a CUDA graph captures later
    calls, but torch.compile must keep them out of its graphs, whose memory is reused (tag `cudagraph_unsafe`).

    `Library` is used because `custom_op` imports torch._dynamo at its first call, which takes seconds. `custom_op` would
    raise the version counters of written tensors; here the wrapper does.
    """
    if not devices or not set(devices) <= set(DEVICES):
        raise ValueError(f"devices: expected some of {', '.join(DEVICES)}, got {list(devices)}")
    name = schema.partition("(")[0]

    def decorate(function: Callable) -> Callable:
        _library.define(schema, tags=() if capturable else (torch.Tag.cudagraph_unsafe,))
        op = getattr(torch.ops.fastmerge, name).default
        written = [
            k for k, argument in enumerate(op._schema.arguments) if argument.alias_info and argument.alias_info.is_write
        ]

        @functools.wraps(function)
        def kernel(*args):
            result = function(*args)
            torch.autograd.graph.increment_version([args[k] for k in written if args[k] is not None])
            return result

        def refuse(*args):
            raise NotImplementedError(f"fastmerge::{name} runs on {' and '.join(devices)} tensors only")

        for device in DEVICES:
            _library.impl(name, kernel if device in devices else refuse, device.upper())
        torch.library.register_fake(f"fastmerge::{name}", fake or (lambda *args: None), lib=_library)
        return op

    return decorate


def backend(family: str, tensor: Tensor):
    """The module with this family's loops for the tensor's device: `gpu.family` (Triton) or `cpu.family` (numba)."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return importlib.import_module(f".gpu.{family}", __package__)
    if tensor.device.type == "cpu":
        return importlib.import_module(f".cpu.{family}", __package__)
    raise RuntimeError(f"fastmerge_kernels runs on cpu and cuda tensors, got a tensor on {tensor.device}")
