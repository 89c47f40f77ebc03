"""Peak memory of the steps of a run, counted on fake tensors: no memory is needed, and the sizes are those of a GPU.

Counted are live tensors. An allocator's rounding and the workspaces of libraries come on top, as do a task's images.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest
import torch
from on_fake_cuda import Transfers, applied
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from fastmerge.data import augment
from fastmerge.fisher_pass import FisherPass
from fastmerge.methods.cmm import CMM
from fastmerge.methods.trm import TRM
from fastmerge.models import backbone
from fastmerge.training import Train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import models  # noqa: E402
from models import start  # noqa: E402

GIB = 1 << 30


class Peak(Transfers):
    """Bytes of all storages that operations have made and that are alive, and their maximum."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return result

    def gone(self, nbytes: int) -> None:
        self.live -= nbytes


def step_of(kind: str, model: str, batch: int, *flags: str):
    device = torch.device("cpu")
    if kind == "search":
        learner, task, images = start(model, batch, device, *flags)
        method = TRM(learner)
        during = method.begin(task)
        phase = method.merge(task, images, during)
        if method.settings.lambda1:  # the class tokens of the teacher; fake row numbers cannot choose images
            phase.teacher = torch.zeros(learner.backbone.layers, batch, learner.backbone.width)
        return phase
    if kind == "tangent":
        learner, task, images = start(model, batch, device, *flags)
        method = CMM(learner)
        return method.train(task, images, method.begin(task))
    if kind == "fisher":
        return FisherPass(*start(model, batch, device, *flags), labels="data")  # fake logits cannot be drawn from
    return Train(*start(model, batch, device, *flags))


def peak(kind: str, model: str, batch: int, *flags: str, gpu: int = 0) -> int:
    """Peak bytes of the second step (or of the only one), with the model and everything that the phase keeps.

    gpu: the parts are chosen from what is left free of this many bytes, as on a GPU.
    """
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Peak() as memory:
        patch.setattr(torch.nn.Module, "_apply", applied)
        patch.setattr(augment, "_channels", augment._channels.__wrapped__)
        patch.setattr(backbone, "hash_tensors", lambda tensors: "no values")
        phase = step_of(kind, model, batch, *flags)
        if gpu:
            phase.learner.parts.free = lambda: gpu - memory.live
        if phase.steps > 1:
            phase.step(0)  # makes the state of the optimiser
        memory.peak = memory.live
        phase.step(min(1, phase.steps - 1))
        return memory.peak


def test_peak_is_that_of_live_tensors():
    with FakeTensorMode(), Peak() as memory:
        x = torch.zeros(1000)
        y = x[10:] + 1
        assert (memory.live, memory.peak) == (4000 + 3960, 4000 + 3960)
        del x, y
        assert (memory.live, memory.peak) == (0, 4000 + 3960)


@pytest.mark.parametrize("kind", ["train", pytest.param("search", marks=pytest.mark.slow)])
def test_parts_bound_the_memory_of_a_step(kind, monkeypatch):
    monkeypatch.setitem(models.MODELS, "untrained", "tiny")  # fake tensors cannot be loaded from a file
    whole, parts = peak(kind, "untrained", 512), peak(kind, "untrained", 512, "--micro-batch=128")
    assert parts < whole / 2, (parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "search", "tangent", "fisher"])
def test_a_step_of_the_main_job_fits_one_gpu(kind):
    """ViT-B/16, batch 128, in parts that are chosen on an 80 GB card: below 60 GiB."""
    found = peak(kind, "86M", 128, gpu=80 * 10**9)
    assert 1 * GIB < found < 60 * GIB, f"{found / GIB:.1f} GiB"
