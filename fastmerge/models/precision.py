"""The precision of matrix products, convolutions and attention inside a backbone (`--precision`).

fp32: all of fp32's 24 bits. tf32: a GPU rounds the inputs of products to 11 bits (NVIDIA A100 and later). bf16: inputs
and results of products have 8 bits, sums inside a product have 24. Weights, the residual stream, normalisation and
softmax, features, logits, losses, gradients and merges are fp32 in all three.

`torch.autocast` does the same in a plain step, but raises in forward-over-reverse mode (`jvp` of `grad`),
because it does not cast tangents. `Bf16` casts with differentiable operations, so every transform works.

A CPU without bf16 instructions takes 13 times as long for a product of bf16 matrices as for one of fp32 matrices (AMD EPYC,
AVX2). There, inputs and results are rounded to bf16 and the product is computed in fp32, with the same number of bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmerge.errors import UserError
from fastmerge.models.attention import SelfAttention, self_attention

Precision = Literal["fp32", "tf32", "bf16"]
CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
PRODUCTS = CONVOLUTIONS | {
    F.linear,
    F.multi_head_attention_forward,
    F.scaled_dot_product_attention,
    torch._native_multi_head_attention,  # of nn.MultiheadAttention where no gradient is needed
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.einsum,
    torch.matmul,
    torch.mm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.mm,
}
FP32 = {
    F.batch_norm,
    F.group_norm,
    F.layer_norm,
    F.normalize,
    F.rms_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
}


def cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """`value` with every tensor of dtype `old`, also in lists and tuples, as `new`. A tensor that stands there several times
    stays one tensor, by which self-attention is recognised."""
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype == old else value
    if type(value) in (list, tuple):
        made: list[Any] = []
        for i, x in enumerate(value):
            before = next((j for j in range(i) if value[j] is x), None)
            made.append(cast(x, old, new) if before is None else made[before])
        return type(value)(made)
    return value


class Bf16(TorchFunctionMode):
    """In this mode products are computed in bf16. A convolution returns fp32: it makes the residual stream."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in PRODUCTS:
            old, new = torch.float32, torch.bfloat16
        elif function in FP32:
            old, new = torch.bfloat16, torch.float32
        else:
            return function(*args, **kwargs)
        args, kwargs = cast(args, old, new), {name: cast(value, old, new) for name, value in kwargs.items()}
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if function in PRODUCTS and device is not None and not in_hardware(device):
            result = rounded(function, *args, **kwargs)
        else:
            result = function(*args, **kwargs)
        return result.float() if function in CONVOLUTIONS else result


@functools.cache
def in_hardware(device: torch.device) -> bool:
    """Whether a product of bf16 matrices is faster than one of fp32 matrices."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def rounded(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A product of bf16 tensors, computed in fp32 and rounded to bf16. Attention is several products, each rounded."""
    linear, mix = partial(rounded, F.linear), partial(rounded, F.scaled_dot_product_attention)
    if function is F.multi_head_attention_forward and (given := self_attention(args, kwargs)):
        return given.instead(linear, mix)
    if function is torch._native_multi_head_attention and args[0] is args[1] is args[2] and args[9] is None:
        return SelfAttention(args[0], *args[4:9]).written_out(linear, mix), None
    wide = {name: cast(value, torch.bfloat16, torch.float32) for name, value in kwargs.items()}
    return cast(function(*cast(args, torch.bfloat16, torch.float32), **wide), torch.float32, torch.bfloat16)


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """In this context, products of fp32 matrices and convolutions on a GPU round their inputs to TF32, or do not."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(on)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def allow_tf32(on: bool) -> None:
    """The same for the whole process, so that it holds in backward passes too."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


@contextlib.contextmanager
def full_fp32(backbone: Any) -> Iterator[None]:
    """In this context the backbone computes in fp32, without TF32 in backward passes too, whatever its precision is."""
    before, backbone.precision = backbone.precision, "fp32"
    try:
        with tf32(False):
            yield
    finally:
        backbone.precision = before


def computing(precision: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass of the backbone."""
    return Bf16() if precision == "bf16" else contextlib.nullcontext()


def flags(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context around it, which a compiler cannot see through: whether a GPU may use TF32."""
    return tf32(precision == "tf32") if device.type == "cuda" else contextlib.nullcontext()


def choose(precision: Precision | None, device: torch.device) -> Precision:
    """The precision of a run: what was given, else bf16 on a GPU that computes in it, else fp32.

    Raises:
        UserError: tf32 on a device that does not have it.
    """
    cuda = device.type == "cuda"
    if precision == "tf32" and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError("--precision tf32: only NVIDIA GPUs since the A100 have it; use --precision fp32 or bf16")
    if precision is None:
        return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return precision
