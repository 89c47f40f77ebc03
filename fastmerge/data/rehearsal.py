"""Images of a task and kept images of earlier ones, as one set: for methods that rehearse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastmerge.data.cache import TaskImages


class Joined(TaskImages):
    """`images`, then the kept ones. pixels: `[e, 3, S, S]` uint8, labels: `[e]` int64, both on the device.

    A batch has the images of the task first; labels go with their images.
    """

    def __init__(self, images: TaskImages, pixels: Tensor, labels: Tensor) -> None:
        self.given, self.pixels, self.own = images, pixels, labels
        self.labels, self.skipped = torch.cat([images.labels, labels]), images.skipped

    def plan(self, order: Iterable[Tensor]) -> None:
        parts = (self._parted(index)[0] for index in order)
        self.given.plan([part for part in parts if len(part)])

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        of_task, kept = self._parted(index)
        rows = kept.to(self.own.device, non_blocking=True)
        pixels, labels = [self.pixels[rows]], [self.own[rows]]
        if len(of_task):
            images, classes = self.given.batch(of_task)
            pixels, labels = [images, *pixels], [classes, *labels]
        return torch.cat(pixels), torch.cat(labels)

    def _parted(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the task's images, and rows of the kept ones."""
        n, rows = len(self.given), index.tolist()
        parts = [row for row in rows if row < n], [row - n for row in rows if row >= n]
        return torch.tensor(parts[0], dtype=torch.int64), torch.tensor(parts[1], dtype=torch.int64)
