"""Image cache: decodes a task's images once into a uint8 tensor on the device, and prefetches the next task's images.

A task is trained for many epochs on the same few thousand images, so its images are decoded and resized once and then
picked by index (the data path of Keller Jordan's cifar10-airbench). A set that does not fit the memory budget is
streamed: its batches are decoded shortly before use. Both ways give the same pixels and leave out the same unreadable
images, so the results of a run do not depend on the budget.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmerge.data.dataset import Split
from fastmerge.data.files import host_pixels
from fastmerge.errors import UserError
from fastmerge.wording import counted

CHUNK = 256  # images decoded and copied to the device at a time; a decoder can be stopped between chunks
HOST_BYTES = 8_000_000_000  # of images in memory on a machine without a GPU
LOOK_AHEAD = 3  # batches decoded ahead of their use
CPU = torch.device("cpu")


class TaskImages:
    """Images of one task in memory. labels: [n] int64 on the device. skipped: number of unreadable images left out.

    images: [n, 3, S, S] uint8 on the device.
    """

    def __init__(self, images: Tensor, labels: Tensor, skipped: int) -> None:
        self.images, self.labels, self.skipped = images, labels, skipped

    def __len__(self) -> int:
        return len(self.labels)

    def plan(self, order: Iterable[Tensor]) -> None:
        """Announce the coming batches, in order. Only StreamedImages uses them."""

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [b, 3, S, S] and labels [b], both on the device, for index [b] int64 on the CPU."""
        rows = index.to(self.labels.device, non_blocking=True)
        return self.images[rows], self.labels[rows]


class StreamedImages(TaskImages):
    """TaskImages decoded at every use. On the host, a background thread decodes the batches announced by `plan`."""

    def __init__(
        self, split: Split, indices: np.ndarray, size: int, device: torch.device, ahead: ThreadPoolExecutor
    ) -> None:
        n = len(indices)
        if split.skip_bad:  # find unreadable images now, so that an epoch is as long as in memory
            chunks = (split.read(indices[i : i + CHUNK], 8, CPU)[1] for i in range(0, n, CHUNK))
            indices = indices[torch.cat(list(chunks)).numpy()]
        self.split, self.indices, self.size, self._ahead = split, indices, size, ahead
        self.labels = torch.from_numpy(split.labels[indices]).to(device)
        self.skipped = n - len(indices)
        self._order: deque[Tensor] = deque()
        self._decoded: deque[tuple[Tensor, Future[Tensor]]] = deque()

    def plan(self, order: Iterable[Tensor]) -> None:
        """Announce the batches; a batch requested out of this order is decoded on request."""
        for _, future in self._decoded:
            future.cancel()
        self._decoded.clear()
        self._order = deque() if self.split.on_device else deque(order)
        self._fill()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        device = self.labels.device
        if self._decoded and torch.equal(self._decoded[0][0], index):
            images = self._decoded.popleft()[1].result()
            self._fill()
        else:
            images = self._read(index)
        return images.to(device, non_blocking=True), self.labels[index.to(device, non_blocking=True)]

    def _fill(self) -> None:
        while self._order and len(self._decoded) < LOOK_AHEAD:
            index = self._order.popleft()
            self._decoded.append((index, self._ahead.submit(self._read, index)))

    def _read(self, index: Tensor) -> Tensor:
        where = self.labels.device if self.split.on_device else CPU
        images, good = self.split.read(self.indices[index.numpy()], self.size, where)
        if not good.all():
            name = self.split.ids[self.indices[index[~good][0]]]
            raise UserError(f"image {name} could be read before but not now. Do not change the data during a run.")
        # a GPU takes pinned memory while the host goes on
        return images.pin_memory() if self.labels.is_cuda and not images.is_cuda else images


class ImageCache:
    """The images of a run at `size` pixels on `device`.

    budget_bytes: limit on the bytes of pixels on the device; it applies once to the kept sets (test images) and once to the
    others (a task's train images, and on the host the prefetched next ones). It is at most a third of the GPU's memory
    that is free at the start, or a quarter of the host's. None: that much, on the host at most HOST_BYTES. Beside a GPU the
    prefetched images may have a quarter of the host's free memory. A set that does not fit is streamed. A set that is not
    kept lives as long as the caller holds it, so only the kept sets make memory grow with the number of tasks.
    """

    def __init__(self, size: int, device: torch.device | str, budget_bytes: int | None = None) -> None:
        self.size, self.device = size, torch.device(device)
        host = self.device.type != "cuda"
        most = _free_bytes(self.device) // (4 if host else 3)
        self.budget_bytes = min(most, (HOST_BYTES if host else most) if budget_bytes is None else budget_bytes)
        self._kept: dict[tuple[Split, bytes], TaskImages] = {}
        self._kept_bytes = self._current_bytes = 0
        self._next: _Prefetch | None = None
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="look-ahead")
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def get(self, split: Split, indices: np.ndarray, keep: bool = False) -> TaskImages:
        """The images `indices` of `split`, decoded now unless they were prefetched or kept.

        Raises UserError for an unreadable image (also one found by `prefetch`), and if no image is readable.
        """
        key = (split, indices.tobytes())
        if key in self._kept:
            return self._kept[key]
        prefetch = self._next
        if prefetch and (prefetch.key == key or not keep):
            self._next = None
            if prefetch.key != key:
                prefetch.stop.set()
        needed, used = self._bytes(indices), self._kept_bytes if keep else 0
        if used + needed > self.budget_bytes:
            images: TaskImages | StreamedImages = StreamedImages(split, indices, self.size, self.device, self._ahead)
            needed = 0
        elif prefetch and prefetch.key == key:
            images = self._on_device(*prefetch.decoded.result())
        else:
            images = self._on_device(*self._decode(split, indices, self.device))
        if not len(images):
            raise UserError(
                f"none of {counted(len(indices), 'image')} can be read; the first is {split.ids[indices[0]]}."
            )
        if keep:
            self._kept[key] = images
            self._kept_bytes += needed
        else:
            self._current_bytes = needed
        return images

    def prefetch(self, split: Split, indices: np.ndarray) -> None:
        """Start decoding the images of a later `get` in the background; do nothing if they would not fit the budget.

        The background thread works on the host only, because only one thread may use the device.
        """
        key = (split, indices.tobytes())
        room = self.budget_bytes - self._current_bytes if self.device == CPU else _free_bytes(CPU) // 4
        if (
            key in self._kept
            or self._bytes(indices) > min(room, self.budget_bytes)
            or (split.on_device and self.device != CPU)
        ):
            return
        if self._next and self._next.key == key:
            return
        self.close()
        stop = threading.Event()
        self._next = _Prefetch(key, self._behind.submit(self._decode, split, indices, CPU, stop), stop)

    def close(self) -> None:
        """Stop the background decoding, if any."""
        if self._next:
            self._next.stop.set()
            self._next = None

    def _decode(
        self, split: Split, indices: np.ndarray, device: torch.device, stop: threading.Event | None = None
    ) -> tuple[Tensor, np.ndarray, int]:
        """Images [n, 3, S, S] on `device`, their labels, and how many could not be read."""
        shape = (len(indices), 3, self.size, self.size)
        images = host_pixels(shape) if device == CPU else torch.empty(shape, dtype=torch.uint8, device=device)
        labels, filled = np.empty(len(indices), np.int64), 0
        for start in range(0, len(indices), CHUNK):
            if stop and stop.is_set():
                break
            chunk = indices[start : start + CHUNK]
            pixels, good = split.read(chunk, self.size, device if split.on_device else CPU)
            if not good.all():
                pixels, chunk = pixels[good.to(pixels.device)], chunk[good.numpy()]
            images[filled : filled + len(chunk)] = pixels
            labels[filled : filled + len(chunk)] = split.labels[chunk]
            filled += len(chunk)
        return images[:filled], labels[:filled], len(indices) - filled

    def _on_device(self, images: Tensor, labels: np.ndarray, skipped: int) -> TaskImages:
        return TaskImages(images.to(self.device), torch.from_numpy(labels).to(self.device), skipped)

    def _bytes(self, indices: np.ndarray) -> int:
        return len(indices) * 3 * self.size * self.size


class _Prefetch(NamedTuple):
    key: tuple[Split, bytes]
    decoded: Future[tuple[Tensor, np.ndarray, int]]
    stop: threading.Event


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: only budget_bytes is the limit
        return 1 << 62
    return min([free, *_free_in_cgroups()])


def _free_in_cgroups(mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the memory limits of this process (of a container, of a job) leave, in bytes, without file caches, which the
    kernel gives back. Limits of all groups above its own count; a container sees its own as the topmost one."""
    free = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds == "":
                mount, limit, used, cached = mounts, "memory.max", "memory.current", "inactive_file"
            elif "memory" in kinds.split(","):  # version 1
                mount, limit, used, cached = (
                    mounts / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                )  # fmt: skip
            else:
                continue
            inside = PurePosixPath(group).relative_to("/")
            for folder in (mount / inside, *(mount / above for above in inside.parents)):
                with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                    most = int((folder / limit).read_text())
                    stat = dict(pair.split() for pair in (folder / "memory.stat").read_text().splitlines())
                    taken = int((folder / used).read_text()) - int(stat.get(cached, 0))
                    free.append(max(0, most - taken))
    return free
