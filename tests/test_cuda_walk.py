"""The CUDA path without a GPU: every method and rule on fake CUDA tensors; no blocking copy in steady steps."""

import on_fake_cuda
import pytest
import torch
import toy
from on_fake_cuda import fake_cuda, needs_cuda_build
from test_methods import CASES, FLAGS

from fastmerge.methods import METHODS

pytestmark = needs_cuda_build


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_all_tensors_meet_on_one_device(name, protocol, tmp_path):
    """Fake tensors raise as CUDA does where an operation gets tensors of different devices."""
    with fake_cuda():
        learner = on_fake_cuda.learner(name, *FLAGS, "--batch-size=20")
        method = METHODS[name].build(learner, toy.nowhere(tmp_path), protocol)
        for task, images in on_fake_cuda.tasks(2):
            learner.grow_head(task, images)
            during = method.begin(task)
            toy.work(method.train(task, images, during))
            if name == "cmm":
                break  # its merging phase is forward-mode AD of views, where torch fails with fake tensors
            toy.work(method.merge(task, images, during))
            features = method.features()(learner.plain(images.images))
            assert learner.theta.device == features.device == on_fake_cuda.CUDA


STEADY = ("trm", "finetune", "ewc", "average", "coop", "attriclip", "proof")


@pytest.mark.parametrize("name", STEADY)
def test_steady_steps_do_not_wait_for_the_device(name, tmp_path):
    """The first steps of a phase may copy tables to the device; later ones read and copy nothing that makes the host wait."""
    with fake_cuda() as transfers:
        learner = on_fake_cuda.learner(name, *FLAGS, "--epochs=3", "--merge-epochs=3")
        method = METHODS[name].build(learner, toy.nowhere(tmp_path), METHODS[name].protocols(learner.config)[0])
        for task, images in on_fake_cuda.tasks(2):
            learner.grow_head(task, images)
            during = method.begin(task)
            for phase in (method.train(task, images, during), method.merge(task, images, during)):
                for i in range(phase.steps if phase is not None else 0):
                    transfers.found.clear()
                    phase.step(i)
                    assert i < 3 or not transfers.found, (phase.name, i, transfers.found)
                if phase is not None:
                    phase.finish()


def test_the_ledger_sees_what_makes_the_host_wait():
    with fake_cuda() as transfers:
        x = torch.zeros(3, device=on_fake_cuda.CUDA)
        for wait in (
            lambda: x.sum().item(),
            lambda: x.cpu(),
            lambda: torch.zeros(3).to(x.device),
            lambda: x.copy_(torch.ones(3)),
            lambda: torch.tensor([1.0, 2.0], device=x.device),
        ):
            transfers.found.clear()
            wait()
            assert transfers.found
        transfers.found.clear()
        torch.ones(3).to(x.device, non_blocking=True)
        assert not transfers.found
        with pytest.raises(RuntimeError, match="device"):  # what the walk would see
            x + torch.ones(3)
