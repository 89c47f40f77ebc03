"""Parts of tensors on a GPU: copies to it, the ops, and copies from it overlap.

Two slots take turns. A slot is memory of the device and pinned memory of the host, for the inputs and the output of a part.
While the device works on one slot, the host fills the other and empties what came back. The host waits only for the copy back
of the part before the last, which it needs before it may fill that slot again.

    host            fill 0 | fill 1 | empty 0, fill 0 | empty 1, fill 1 | ...
    copies up              | up 0   | up 1            | up 0            | ...
    ops                             | op 0            | op 1            | ...
    copies down                                       | down 0          | ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmerge.files.rule import Part

ALIGNED = 512  # bytes; as the allocator of the device
Pairs = Sequence[tuple[Tensor, Tensor]]  # to, from


class Lanes:
    """The two copy streams of a device, beside the current stream, where the ops run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]

    def memory(self, count: int, host: bool) -> Tensor:
        """uint8 [count]"""
        if host:
            return torch.empty(count, dtype=torch.uint8, pin_memory=True)
        made = torch.empty(count, dtype=torch.uint8, device=self.device)
        self.streams[0].wait_stream(torch.cuda.current_stream(self.device))  # ops may still use what was here before
        return made

    def up(self, pairs: Pairs) -> None:
        """Copy to the device; the ops that come wait for it."""
        event = self._copy(self.streams[0], pairs)
        torch.cuda.current_stream(self.device).wait_event(event)

    def down(self, pairs: Pairs) -> Callable[[], None]:
        """Copy to the host behind the ops so far; returns a function that waits for the copies."""
        self.streams[1].wait_stream(torch.cuda.current_stream(self.device))
        return self._copy(self.streams[1], pairs).synchronize

    def _copy(self, stream: Any, pairs: Pairs) -> Any:
        with torch.cuda.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return stream.record_event()


class Slot:
    """Memory for one part, on both sides; it grows when a part needs more."""

    def __init__(self, lanes: Lanes):
        self.lanes = lanes
        self.host, self.device = (lanes.memory(0, host) for host in (True, False))

    def like(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(host, device) memory for every tensor, 1-D, of its dtype."""
        starts = [0]
        for x in tensors:
            starts.append(starts[-1] + -(-x.numel() * x.element_size() // ALIGNED) * ALIGNED)
        if starts[-1] > len(self.host):
            self.host, self.device = (self.lanes.memory(starts[-1], host) for host in (True, False))
        return [
            (_view(self.host, start, x), _view(self.device, start, x))
            for start, x in zip(starts, tensors, strict=False)
        ]


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    return memory[start : start + like.numel() * like.element_size()].view(like.dtype)


class Staging:
    """staging(parts, arrived): the parts of an iterator on the device, in their order. What the ops write is in the parts of
    the host when `arrived(owner, part)` is called."""

    def __init__(self, lanes: Lanes):
        self.lanes = lanes
        self.slots = [Slot(lanes), Slot(lanes)]

    def __call__(
        self, parts: Iterable[tuple[Any, Part]], arrived: Callable[[Any, Part], None]
    ) -> Iterator[tuple[Any, Part]]:
        waiting: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()  # wait, then finish
        try:
            for number, (owner, part) in enumerate(parts):
                if len(waiting) == len(self.slots):
                    _finish(waiting)
                there, written = self._up(part, self.slots[number % len(self.slots)])
                yield owner, there
                wait = self.lanes.down([(host, device) for _, host, device in written])
                waiting.append((wait, functools.partial(self._arrive, owner, part, written, arrived)))
            while waiting:
                _finish(waiting)
        finally:  # after an error, or where no more parts are wanted: the slots are free again
            for wait, _ in waiting:
                wait()

    def _up(self, part: Part, slot: Slot) -> tuple[Part, list[tuple[Tensor, Tensor, Tensor]]]:
        """The part on the device, and (final place, host memory, device memory) of what is written."""
        inputs = list({id(x): x for x in (*part.models, part.base, *part.statistics)}.values())
        outputs = [part.tally, *([] if part.out.is_meta else [part.out])]
        places = slot.like([*inputs, *outputs])
        for x, (host, _) in zip(inputs, places, strict=False):
            host.copy_(x)
        self.lanes.up([(device, host) for host, device in places[: len(inputs)]])
        there = {id(x): device for x, (_, device) in zip(inputs, places, strict=False)}
        written = [(x, *place) for x, place in zip(outputs, places[len(inputs) :], strict=True)]
        tally = written[0][2].zero_()
        moved = dataclasses.replace(
            part,
            models=[there[id(x)] for x in part.models],
            base=there[id(part.base)],
            statistics=[there[id(x)] for x in part.statistics],
            tally=tally,
            out=part.out if part.out.is_meta else written[1][2],
        )
        return moved, written

    @staticmethod
    def _arrive(
        owner: Any, part: Part, written: list[tuple[Tensor, Tensor, Tensor]], arrived: Callable[[Any, Part], None]
    ) -> None:
        for place, host, _ in written:
            place.copy_(host)
        arrived(owner, part)


def _finish(waiting: deque[tuple[Callable[[], None], Callable[[], None]]]) -> None:
    wait, finish = waiting.popleft()
    wait()
    finish()
