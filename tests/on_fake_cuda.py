"""CUDA tensors without a GPU: fake tensors, which have shapes, dtypes and devices but no values.

Stubbed, because torch cannot do it with fake CUDA tensors where there is no GPU: the backward engine (it gives zeros),
moving a module (here by new parameters), reading a value (one half) and `unique`. Kernels do not run: an op gives what its
fake implementation says.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import toy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmerge import parts
from fastmerge.data import augment
from fastmerge.data.cache import TaskImages
from fastmerge.methods import METHODS
from fastmerge.models import backbone
from fastmerge.models.heads import TextHead
from fastmerge.training import Learner

CUDA = torch.device("cuda", 0)
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")


def applied(module: nn.Module, change, recurse: bool = True) -> nn.Module:
    """`Module._apply` by new parameters: fake ones cannot change their dtype or device in place."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, x in kept.items():
                if x is not None and ((y := change(x.detach())).device, y.dtype) != (x.device, x.dtype):
                    kept[name] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
    return module


def gradients(outputs, inputs, *args, create_graph: bool = False, **kwargs) -> tuple[Tensor, ...]:
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    return tuple(0 * x if create_graph else torch.zeros_like(x) for x in inputs)


def backward(tensors, *args, **kwargs) -> None:
    if not all(x.requires_grad for x in ([tensors] if isinstance(tensors, Tensor) else tensors)):
        raise RuntimeError("backward of a tensor that does not require grad")


@contextlib.contextmanager
def fake_cuda():
    """Context in which new tensors are fake and modules move to fake devices; yields its `Transfers`."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Transfers() as transfers:
        patch.setattr(nn.Module, "_apply", applied)
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
        patch.setattr(torch.autograd, "grad", gradients)
        patch.setattr(
            Tensor, "exponential_", lambda self, generator=None: self
        )  # fake tensors have none with a generator
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 << 30, 80 << 30))
        for name in ("memory_reserved", "memory_allocated"):
            patch.setattr(torch.cuda, name, lambda device=None: 0)
        patch.setattr(backbone, "hash_tensors", lambda tensors: "")
        patch.setattr(parts, "_saved", lambda flat, images, *args: images << 20)  # it compares addresses
        try:
            yield transfers
        finally:
            augment._channels.cache_clear()


class Transfers(TorchDispatchMode):
    """Record blocking copies between the devices and reads of a device's values (`.item()`), with the line that asks."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name in ("_local_scalar_dense", "nonzero", "_unique2") and first is not None:
            if first.device.type == "cuda":
                self.found.append(self.line("a value is read"))
            if name == "_local_scalar_dense":
                return 0.5 if first.is_floating_point() else first.dtype == torch.bool or 1
            if name == "_unique2":
                return first.clone(), first.clone(), first.clone()
        result = function(*args, **kwargs)
        pair = None
        if name == "_to_copy" and not kwargs.get("non_blocking"):
            pair = first, result
        elif name == "copy_" and not (len(args) > 2 and args[2]):
            pair = args[1], first
        if pair is not None and pair[0].device != pair[1].device:
            self.found.append(self.line(f"{pair[0].device.type} to {pair[1].device.type}"))
        return result

    @staticmethod
    def line(what: str) -> str:
        import traceback

        own = [f for f in traceback.extract_stack() if "fastmerge" in f.filename and "/tests/" not in f.filename]
        return f"{what} in {Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})" if own else what


def learner(name: str, *flags: str) -> Learner:
    """The toy model on fake CUDA for the method of that name."""
    config = toy.parse(["--model=tiny", "--batch-size=8", "--device=cpu", *flags])
    head = toy.head(METHODS[name].head, TextHead(torch.randn(toy.CLASSES, 5), 3.0))
    made = Learner(toy.backbone(name).to(CUDA), head, config, 0, CUDA)
    made.text = toy.Text(CUDA)
    return made


def tasks(count: int = toy.TASKS):
    for task, images in toy.tasks()[:count]:
        yield task, TaskImages(images.images.to(CUDA), images.labels.to(CUDA), 0)
