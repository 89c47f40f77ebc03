"""How many images a step computes at once, so that its memory fits the device.

Given by `--micro-batch`. Otherwise, on a GPU, from the memory that is free when a kind of step first runs: a step of
that kind needs FACTOR[kind] times the activations that one forward pass saves for its backward pass, for each image.
The size is the batch, or half of it, a quarter, and so on, so that small changes of free memory seldom change it. It is
part of a checkpoint: a run that continues adds its parts in the same order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from fastmerge.errors import UserError, first_line
from fastmerge.flat import FlatModel
from fastmerge.models.attention import differentiable_attention
from fastmerge.models.recompute import blocks_of
from fastmerge.wording import counted

# Peak of live tensors per image, relative to the activations saved with unfused attention (tests/test_parts.py): measured
# on ViT-Ti/16 and ViT-S/16 in fp32, where they agree within 3 %, and rounded up. bf16 needs less.
FACTOR = {"evaluate": 0.15, "train": 1.0, "search": 1.1, "fisher": 1.2, "tangent": 1.9, "curvature": 2.5}
MODELS = 8  # vectors of the model's length that the largest step makes besides
SHARE = 0.8  # of the free memory; the rest is for rounding and fragmentation

T = TypeVar("T")


class OutOfMemory(UserError):
    """A step does not fit the device's memory, in half-size parts either. changed: whether the step had begun to change what
    a checkpoint holds, so that only the last checkpoint is valid."""

    def __init__(self, message: str, changed: bool = False):
        super().__init__(message)
        self.changed = changed


class Parts:
    """sizes: images at once, by kind of step; kinds that are missing take the whole batch. It is in every checkpoint.

    batch: images of the largest batch. free: gives the device's free bytes; None: memory decides nothing. per_image:
    gives the bytes of activations that a kind of step saves for an image. model: bytes of the weights. say: shows a line
    to the user. own: this process's part of a batch of n images, where several share it (ranks.py).
    """

    def __init__(
        self,
        batch: int,
        micro_batch: int,
        free: Callable[[], int] | None,
        per_image: Callable[[str], int],
        model: int,
        own: Callable[[int], slice] = lambda n: slice(0, n),
    ):
        self.own = own
        self.batch, self.micro_batch = batch, micro_batch
        self.free, self.per_image, self.model = free, per_image, model
        self.sizes: dict[str, int] = {}
        self.say: Callable[[str], None] = print
        self._halved: set[str] = set()
        self._last = ("", 0)  # kind of step and images at once
        self._changes = False  # whether the present step has begun to change something

    def of(self, n: int, kind: str) -> list[tuple[slice, float]]:
        """Cut this process's part of a batch of n images: slices, and the share of each in the batch. A mean over the batch
        is the sum of the parts' means times their shares, over all processes."""
        return self.cut(self.own(n), n, kind)

    def cut(self, own: slice, n: int, kind: str) -> list[tuple[slice, float]]:
        """Cut the slice `own` of a batch of n images; see `of`."""
        if kind not in self.sizes and (self.micro_batch or self.free is not None):
            self.sizes[kind] = self.micro_batch or self.fitting(kind)
        size = min(self.sizes.get(kind, n), n) or 1
        self._last = kind, size
        ends = [(start, min(start + size, own.stop)) for start in range(own.start, own.stop, size)]
        return [(slice(start, stop), (stop - start) / n) for start, stop in ends]

    def usual(self, n: int) -> bool:
        """Whether n images are a whole batch, this process's share of it, or a whole part of that."""
        return n in (self.batch, self.share) or n in self.sizes.values()

    @property
    def share(self) -> int:
        """Images of the largest batch that this process takes."""
        own = self.own(self.batch)
        return own.stop - own.start

    def fitting(self, kind: str) -> int:
        """The largest of share, share / 2, share / 4, ... images that fit the free memory, at least 1."""
        assert self.free is not None
        room = SHARE * self.free() - MODELS * self.model
        size, most = max(self.share, 1), room / (FACTOR[kind] * self.per_image(kind))
        while size > max(most, 1):
            size = math.ceil(size / 2)
        return size

    def changes(self) -> None:
        """A step calls this before it changes weights, an optimiser or a sum: from here on it cannot be repeated."""
        self._changes = True

    def attempt(self, work: Callable[[], T], again: bool = True) -> T:
        """Do `work`. After an out-of-memory error, do it again with half as many images at once, once for every kind of step.
        again: whether `work` can be repeated, until it calls `changes`.

        Raises:
            OutOfMemory: it cannot, half as many do not fit either, or they are one image.
        """
        outer, self._changes = self._changes, False  # work may itself attempt a part of its work
        try:
            return self._attempt(work, again)
        finally:
            self._changes = outer

    def _attempt(self, work: Callable[[], T], again: bool) -> T:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                why = first_line(error)
            kind, size = self._last  # read here, where the traceback is gone and with it the tensors of its frames
            if not again or self._changes or kind in self._halved or size <= 1:
                raise OutOfMemory(
                    f"out of memory ({kind}, {counted(size, 'image')} at once): {why}. Free memory on the device or take "
                    "a smaller --cache-gb, and the same command continues; or give a smaller --micro-batch or --model with "
                    "another --run-dir",
                    self._changes,
                )
            self._halved.add(kind)
            self.sizes[kind] = math.ceil(size / 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.say(
                f"out of memory ({kind}, {counted(size, 'image')} at once): from now on {self.sizes[kind]} at once"
            )


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are free, those that torch holds in reserve included."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def saved_bytes(flat: FlatModel, size: int, kind: str = "") -> int:
    """Bytes of activations per image that a forward pass with unfused attention saves for its backward pass.

    They are the difference between two images and one, so casts of weights do not count. With gradient checkpointing, a
    training step saves the inputs of the blocks, and at a time the activations of one block. size: pixels.
    """
    module, whole = flat.module, _saved(flat, 2, size, True) - _saved(flat, 1, size, True)
    if not module.recompute or kind not in ("train", "search"):
        return whole
    return _saved(flat, 2, size, False) - _saved(flat, 1, size, False) + whole // len(blocks_of(module))


@contextlib.contextmanager
def saved_storages() -> Iterator[dict[int, Tensor]]:
    """A tensor of every storage that autograd saves for backward passes in this context, by its address."""
    storages: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor  # kept, so that no other gets its address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield storages


def _saved(flat: FlatModel, images: int, size: int, unfused: bool) -> int:
    x = torch.zeros(images, 3, size, size, device=flat.theta.device)
    weights = flat.as_dict(flat.theta.detach().requires_grad_())  # also of a frozen model, which prompts train through
    attention = differentiable_attention() if unfused else contextlib.nullcontext()
    with attention, saved_storages() as storages:
        features = functional_call(flat.module, weights, (x,))
    storages.pop(flat.theta.untyped_storage()._cdata, None)
    del features
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
