"""The trainer on a GPU against the same on the CPU: `pytest -m gpu`. A few cases run on the CPU too, so that the tests work.

Random choices are made on the CPU, so both see the same batches, crops and masks. Sums are added in another order, and Adam
turns a tiny gradient of either sign into a full step: weights agree to a few percent of their change.
"""

import json
import signal

import pytest
import torch
import toy
from image_trees import image_folder
from safetensors.torch import load_file
from test_methods import CASES, FLAGS

from fastmerge.__main__ import main
from fastmerge.data.cache import TaskImages
from fastmerge.methods import METHODS
from fastmerge.runfolder import Record, StopRequest
from fastmerge.training import Learner

ON_CPU = ("trm", "ewc", "ties")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EVERYWHERE = [(*case, "cpu") for case in CASES if case[0] in ON_CPU and case[1] in (None, "strict")]
EVERYWHERE += [pytest.param(*case, "cuda", marks=pytest.mark.gpu) for case in CASES]


def built(name: str, protocol: str, device: str, tmp_path, *flags: str):
    kind, made = METHODS[name], toy.learner("--precision=fp32", *flags, *FLAGS, method=name)
    learner = Learner(made.backbone, toy.head(kind.head, made.head), made.config, 0, torch.device(device))
    learner.text = toy.Text(device)
    return learner, kind.build(learner, toy.nowhere(tmp_path), protocol)


def phases(learner, method, count=2):
    """The phases of the first tasks, one after the other; each is worked on before the next is made."""
    for task, images in toy.tasks()[:count]:
        there = TaskImages(images.images.to(learner.device), images.labels.to(learner.device), 0)
        learner.grow_head(task, there)
        during = method.begin(task)
        for make in (method.train, method.merge):
            if (phase := make(task, there, during)) is not None:
                yield phase


@pytest.mark.parametrize(("name", "protocol", "device"), EVERYWHERE)
def test_every_method_trains_and_merges_as_on_the_cpu(name, protocol, device, tmp_path):
    after = {}
    for where in ("cpu", device):
        learner, method = built(name, protocol, where, tmp_path)
        start = learner.theta.cpu().clone()
        for phase in phases(learner, method):
            toy.work(phase)
        images = toy.tasks()[0][1].images.to(where)
        kept = [x.cpu().double() for x in method.state_dict().values() if x.is_floating_point()]
        after[where, len(after)] = learner.theta.cpu(), method.features()(learner.plain(images)).detach().cpu(), kept
    (expected, features, state), (theta, found, other) = after.values()
    assert (theta - expected).norm() <= 0.05 * (expected - start).norm()
    torch.testing.assert_close(found, features, rtol=0.05, atol=0.02 * float(features.abs().max()))
    for mine, theirs in zip(other, state, strict=True):
        assert (mine - theirs).norm() <= 0.05 * theirs.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["trm", "finetune", "ewc", "average"])
def test_steady_steps_do_not_wait_for_the_device(name, tmp_path):
    """CUDA itself reports what waits. The first epoch may copy tables."""
    learner, method = built(name, METHODS[name].protocols(toy.parse(list(FLAGS)))[0], "cuda", tmp_path, "--epochs=3")
    for phase in phases(learner, method):
        for i in range(phase.steps):
            torch.cuda.set_sync_debug_mode("error" if i >= 3 else "default")
            try:
                phase.step(i)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        phase.finish()


@pytest.mark.gpu
def test_a_second_device(tmp_path):
    """A learner on the second GPU, with the first one current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    weights = []
    for device in ("cuda:0", "cuda:1"):
        learner, method = built("trm", None, device, tmp_path)
        for phase in phases(learner, method):
            toy.work(phase)
        weights.append(learner.theta.cpu())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=6, train=8, test=4)


def run(data, folder, device, *flags) -> int:
    quick = "--model tiny --pretrained none --epochs 2 --merge-epochs 1 --batch-size 16 --lr 1e-3 --head prototype"
    quick += " --no-nearest-mean --precision fp32 --quiet --dataset folder --tasks 2 --method trm"
    return main([*quick.split(), f"--device={device}", f"--data-root={data}", f"--run-dir={folder}", *flags])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])  # test_resume.py is quicker
def test_a_run_that_was_stopped_goes_on_and_its_model_is_evaluated(data, tmp_path, device, monkeypatch, capsys):
    """The model of a run that stopped in a step of each phase, the undisturbed one, and that of the CPU."""
    assert run(data, tmp_path / "whole", device) == 0
    log, stops = Record.log, {("train", 1, 1), ("merge", 1, 0)}

    def stop(self, about, terms):
        log(self, about, terms)
        if (place := (about["phase"], about["task"], about["step"])) in stops:
            stops.remove(place)
            StopRequest.signal = signal.SIGINT

    monkeypatch.setattr(Record, "log", stop)
    assert [run(data, tmp_path / "parts", device) for _ in range(3)] == [130, 130, 0]
    models = [load_file(tmp_path / name / "trm-seed0" / "model.safetensors") for name in ("whole", "parts")]
    for key, whole in models[0].items():
        if device == "cpu":
            assert torch.equal(models[1][key], whole), key
        elif whole.is_floating_point():
            assert (models[1][key] - whole).norm() <= 0.02 * whole.norm() + 1e-6, key
    accuracy = json.loads((tmp_path / "parts" / "results.json").read_text())
    accuracy = accuracy["methods"]["trm"]["0"]["final_accuracy"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "parts" / "trm-seed0"), f"--data-root={data}", f"--device={device}"]) == 0
    assert f"accuracy {accuracy:.1f}" in capsys.readouterr().out
