"""FlatModel: the trainable parameters of a module in one 1-D buffer and their gradients in another.

Each parameter and its `.grad` are views of the two buffers, so a merge rule, an optimiser step or a snapshot is one
pass over one tensor and needs no state dict. Layout: tensors are sorted by parameter name (so the order in a dict or
module does not change which random number an entry gets), each starts at a multiple of 16 elements, and the buffer ends
at a multiple of 1024 (vector loads without a tail mask). The padding is zero and stays zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

ALIGN = 16  # elements: 64 bytes in fp32, a cache line and four 128-bit loads
TAIL = 1024  # elements: one block of the kernels


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class FlatModel:
    """`module` with its trainable floating-point parameters moved into one buffer.

    frozen: the parameters never change from here on: they need no autograd and have no gradient.

    Attributes:
        module: the module itself; its trainable parameters become views of `theta`.
        theta: `[n]` parameter, `dtype`; the only parameter to optimise. `theta.grad` is `gradient`.
        gradient: `[n]`, same dtype; `backward()` adds to it. Clear it with `zero_grad()`, never set it to None. `[0]` if
            frozen.
        names, parameters, shapes, sizes: per tensor, in buffer order (sorted names).
        offsets: `len(names) + 1` element offsets; tensor i is `theta[offsets[i] : offsets[i] + sizes[i]]`.

    Tied parameters are stored once, under their first sorted name. Frozen parameters (`requires_grad=False`) and
    buffers stay in the module as they are. Parameters of other floating dtypes are converted to `dtype`.

    Raises:
        ValueError: no parameter is trainable, or a trainable parameter is not floating point.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32, frozen: bool = False):
        self.module, self.frozen = module, frozen
        # by default a tied parameter appears only under its first name in module order: list all, keep the first sorted
        by_name = sorted((n, p) for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad)
        first = {id(p): n for n, p in reversed(by_name)}
        trainable = [(n, p) for n, p in by_name if first[id(p)] == n]
        if not trainable:
            raise ValueError("module has no parameter with requires_grad=True: nothing to train or to merge")
        for name, p in trainable:
            if not p.is_floating_point():
                raise ValueError(f"parameter {name!r} is {p.dtype}: only floating-point parameters can be trained")
        self.names = [n for n, _ in trainable]
        self.parameters = [p for _, p in trainable]
        self.shapes = [p.shape for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.offsets = [0]
        for size in self.sizes:
            self.offsets.append(_round_up(self.offsets[-1] + size, ALIGN))
        self.numel = max(_round_up(self.offsets[-1], TAIL), TAIL)
        buffer = torch.zeros(self.numel, dtype=dtype, device=self.parameters[0].device)
        for view, p in zip(self.views(buffer), self.parameters, strict=True):
            view.copy_(p.detach())
        self._bind(buffer)

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield shaped views of `flat` (`[n]`, any dtype) in the order of `names`; writes go to `flat`."""
        for offset, size, shape in zip(self.offsets, self.sizes, self.shapes, strict=False):
            yield flat[offset : offset + size].view(shape)

    def _bind(self, buffer: Tensor) -> None:
        self.theta = nn.Parameter(buffer, requires_grad=not self.frozen)
        if self.frozen:
            self.gradient = buffer.new_zeros(0)
            for p, value in zip(self.parameters, self.views(buffer), strict=True):
                p.grad, p.data = None, value
                p.requires_grad_(False)
            return
        self.gradient = torch.zeros_like(buffer)
        self.theta.grad = self.gradient
        for p, value, grad in zip(self.parameters, self.views(buffer), self.views(self.gradient), strict=True):
            p.grad = None  # p.data cannot be set while a gradient has another device or dtype
            p.data = value
            p.grad = grad

    def to(self, device: torch.device | str) -> FlatModel:
        """Move everything and keep the views; gradients are set to zero. Use this instead of `module.to(...)`."""
        buffer = self.theta.detach().to(device)
        for p in self.parameters:
            p.grad = None
        self.module.to(device)
        self._bind(buffer)
        return self

    def check_views(self) -> None:
        """Raise RuntimeError if a parameter or gradient is not a view of the buffers (e.g. after `module.to(...)`)."""
        kinds = [("parameter", self.theta)] + [("gradient of", self.gradient)] * (not self.frozen)
        for kind, flat in kinds:
            for name, p, view in zip(self.names, self.parameters, self.views(flat.detach()), strict=True):
                tensor = p if kind == "parameter" else p.grad
                if tensor is None or tensor.data_ptr() != view.data_ptr() or tensor.shape != view.shape:
                    raise RuntimeError(
                        f"{kind} {name!r} is no longer a view of the flat buffer: move the model with FlatModel.to(), "
                        "clear gradients with FlatModel.zero_grad(), and load weights in place (assign=False)"
                    )

    def zero_grad(self) -> None:
        self.gradient.zero_()

    def as_dict(self, theta: Tensor) -> dict[str, Tensor]:
        """Shaped pieces of `theta` (`[n]`) by name, for `torch.func.functional_call(module, as_dict(theta), x)`.

        Differentiable. One `torch.split` has one concatenation as its backward; N slices would allocate N model-sized
        zero buffers there.
        """
        pieces, end = [], 0
        for offset, size in zip(self.offsets, self.sizes, strict=False):
            pieces += [offset - end, size]  # the padding before a tensor, then the tensor
            end = offset + size
        chunks = torch.split(theta, [*pieces, self.numel - end])
        return {n: c.view(s) for n, c, s in zip(self.names, chunks[1::2], self.shapes, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors by name. They do not alias the buffer, so each can be saved separately."""
        return {n: v.clone() for n, v in zip(self.names, self.views(self.theta.detach()), strict=True)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy named tensors (as from `state_dict`) into the buffer.

        Raises:
            KeyError, ValueError: a name is missing or unknown, or a shape differs. Then nothing is written.
        """
        if wrong := sorted(set(self.names) ^ set(tensors)):
            raise KeyError(f"names differ between the model and the given tensors: {', '.join(wrong[:5])}")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != shape:
                raise ValueError(f"{name!r}: expected shape {tuple(shape)}, got {tuple(tensors[name].shape)}")
        for name, view in zip(self.names, self.views(self.theta.detach()), strict=True):
            view.copy_(tensors[name])
