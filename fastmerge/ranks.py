"""The processes of one command that share every batch: `torchrun --nproc-per-node N -m fastmerge ...`.

Every process has the whole model. Of each batch it takes its own part, and sums over the batch (the flat gradient, the counts
of an evaluation) are added over all processes, one all-reduce per step. So the result is that of one process with the same
`--batch-size`, up to rounding, and all processes hold the same bits. The first one (rank 0) writes the files and prints.
Files must be visible to all: on several machines the run folder and the data are on a shared disk.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastmerge.errors import UserError

TIMEOUT = datetime.timedelta(hours=2)  # rank 0 may download weights or encode prompts while the others wait


class RankLost(UserError):
    """Another process of the command has ended."""


class Ranks:
    """A single process: every method returns its argument or does nothing."""

    rank, size = 0, 1

    def own(self, n: int) -> slice:
        """This process's part of a batch of n images; it may be empty."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def add_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes; the same bits in all of them."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process. The host waits for the others, not for the device."""
        return flag

    def agree(self, number: int) -> int:
        """The number of rank 0."""
        return number

    def wait(self) -> None:
        """Wait until all processes are here."""

    def check_same(self, tensor: Tensor) -> None:
        """Raise RuntimeError unless `tensor` (fp32) has the same bits in all processes."""

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 does what is inside first, then the others do (they find its downloads and caches)."""
        if self.rank:
            self.wait()
        try:
            yield
        finally:  # after an error too, so that the others find it themselves
            if not self.rank:
                self.wait()


class TorchRanks(Ranks):
    """The processes that torchrun started. NCCL adds tensors of a GPU; gloo adds those of a CPU, and carries decisions."""

    def __init__(self, device: torch.device):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        host = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(host, dist.ProcessGroup)  # every process is a member
        self._host = host

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RankLost(
                f"another process of this command ended ({str(error).splitlines()[0]}). The run is saved up to its last "
                "checkpoint; the same command continues it, also with another --nproc-per-node"
            ) from None

    def add_(self, *tensors: Tensor) -> None:
        with self._together():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag))
        with self._together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host)
        return bool(found)

    def agree(self, number: int) -> int:
        found = torch.tensor(number)
        with self._together():
            dist.broadcast(found, 0, group=self._host)
        return int(found)

    def wait(self) -> None:
        self.any(False)

    def check_same(self, tensor: Tensor) -> None:
        total = tensor.view(torch.int32).sum(dtype=torch.int64)
        ends = torch.stack([total, -total])
        with self._together():
            dist.all_reduce(ends, dist.ReduceOp.MAX)
        if int(ends.sum()):
            raise RuntimeError("the processes of this command hold different weights")

    def close(self) -> None:
        dist.destroy_process_group()


_ranks = Ranks()
_joined: TorchRanks | None = None  # kept from run to run: a second meeting would find the addresses of the first


def ranks() -> Ranks:
    """The processes of this command."""
    return _ranks


def begin(device: torch.device) -> Ranks:
    """Join the other processes if torchrun started this one. device: where the tensors are."""
    global _ranks, _joined
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _ranks = _joined = _joined or TorchRanks(device)
    return _ranks


def end() -> None:
    """Go on alone, until the next `begin`."""
    global _ranks
    _ranks = Ranks()


def leave() -> None:
    """Leave the other processes for good."""
    global _joined
    end()
    if _joined is not None:
        _joined.close()
    _joined = None
