"""Elementwise ops and `pam_coefficient` on DTensors of two gloo processes equal the ops on the whole vectors."""

from __future__ import annotations

import fastmerge_kernels as fk
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="independent of the kernels")
N = 1001  # the shards have different lengths


def whole() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, generator=generator).abs() for _ in range(5)]


def results(a, b, c, d, e, number, bad):
    """Call every op that takes DTensors; the tensors that it wrote or returned."""
    yield fk.lerp(a, b, 0.3, nonfinite=bad)
    yield fk.lerp(a, b, number)
    yield fk.axpy(a, b, 0.3, out=c)
    yield fk.fisher_merge_(a, b, c, d, number, check=False)
    fk.pam_accumulate_(a, b, c, d, e, check=False)
    yield from (a, b)
    yield fk.magmax_update_(a, b)
    yield fk.magmax_update_(c, b, initial=e)
    yield fk.fisher_accumulate_(d, e)
    yield fk.ewc_gradient_(a, b, c, d, 0.5)
    yield fk.pam_coefficient(a, b, c, d, e)


def work(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh, bad = dist.init_device_mesh("cpu", (2,)), torch.zeros(1, dtype=torch.int64)
    for placement in (Shard(0), Replicate()):
        parts = [distribute_tensor(x, mesh, [placement]) for x in whole()]
        assert parts[0].to_local().numel() == (N if placement == Replicate() else (501, 500)[rank])
        pairs = zip(results(*parts, torch.tensor(0.3), bad), results(*whole(), torch.tensor(0.3), bad), strict=True)
        for k, (mine, expected) in enumerate(pairs):
            if expected.numel() == 2:
                torch.testing.assert_close(mine.full_tensor(), expected, rtol=1e-6, atol=0)  # terms are fp32
            else:
                assert mine.placements == (placement,) and torch.equal(mine.full_tensor(), expected), k

    a, b, c = (distribute_tensor(x, mesh, [Shard(0)]) for x in whole()[:3])
    other, partial = distribute_tensor(whole()[0], mesh, [Replicate()]), fk.pam_coefficient(a, b, c, a, b)
    assert partial.placements == (Partial(),)
    for call, words in (
        (lambda: fk.lerp(a, other, 0.5), "b: expected the placements of a"),
        (lambda: fk.lerp(a, b, 0.5, out=other), "out: expected the placements of a"),
        (lambda: fk.axpy(a, whole()[0], 0.5), "delta: expected a DTensor that is replicated or sharded"),
        (lambda: fk.lerp(partial.float(), partial.float(), 0.5), "a: expected a DTensor that is replicated or sharded"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(NotImplementedError, match="trm_direction"):
        fk.trm_direction(a, b, seed=1, subsequence=0)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
