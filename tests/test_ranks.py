"""Several processes that share every batch end where one process ends, and all with the same bits."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import toy
from image_trees import image_folder
from test_methods import CASES, FLAGS, build, one_task

from fastmerge.checkpoint import load_tensors
from fastmerge.errors import UserError
from fastmerge.evaluate import accuracies, zero_shot
from fastmerge.merging import RULES
from fastmerge.methods import METHODS
from fastmerge.methods.trm import TRM, Search
from fastmerge.ranks import Ranks
from fastmerge.setup import Setup


class Threads:
    """Ranks as threads of one process: a sum waits until all have brought their tensor. Only one computes at a time, because
    forward-mode autograd has one level for the whole process."""

    def __init__(self, size):
        self.size, self.barrier, self.brought = size, threading.Barrier(size, timeout=120), [None] * size
        self.computes = threading.Lock()

    def run(self, work):
        """Call work(ranks) in every thread; return the results in the order of the ranks."""
        results, errors = [None] * self.size, []

        def call(rank):
            try:
                with self.computes:
                    results[rank] = work(Member(self, rank))
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        assert not errors
        return results


class Member(Ranks):
    def __init__(self, group, rank):
        self.group, self.rank, self.size = group, rank, group.size

    def _exchange(self, value):
        self.group.brought[self.rank] = value
        self._wait()
        everything = list(self.group.brought)
        self._wait()
        return everything

    def _wait(self):
        self.group.computes.release()
        try:
            self.group.barrier.wait()
        finally:
            self.group.computes.acquire()

    def add_(self, *tensors):
        for tensor in tensors:
            everything = self._exchange(tensor.clone())
            assert len({value.shape for value in everything}) == 1
            tensor.copy_(sum(everything))

    def agree(self, number):
        return self._exchange(number)[0]


def test_what_fails_in_the_first_process_is_tried_in_the_others():
    """All find out that data is missing; nobody waits for one that has left."""
    found = []

    def work(ranks):
        with pytest.raises(UserError), ranks.first():
            found.append(ranks.rank)
            raise UserError("no data")

    Threads(2).run(work)
    assert found == [0, 1]


@pytest.mark.parametrize("size", [2, 9])  # with 9, some of a batch of 8 images get none
def test_every_method(size, tmp_path):
    """Two tasks of every method and protocol; the weights of all ranks have the same bits."""
    if size == 9:
        cases = [case for case in CASES if case[0] in ("trm", "cmm", "pam", "ewc", "lwf", "fisher")]
    else:
        cases = CASES
    for name, protocol in cases:
        alone = build(name, protocol, tmp_path)
        members = [build(name, protocol, tmp_path) for _ in range(size)]

        def work(ranks, members=members):
            learner, method = members[ranks.rank]
            learner.ranks = ranks
            for task, images in toy.tasks()[:2]:
                learner.grow_head(task, images)
                one_task(learner, method, task, images)
            return {"theta": learner.theta} | learner.head.state_dict() | method.state_dict()

        for task, images in toy.tasks()[:2]:
            alone[0].grow_head(task, images)
            one_task(*alone, task, images)
        wanted = {"theta": alone[0].theta} | alone[0].head.state_dict() | alone[1].state_dict()
        results = Threads(size).run(work)
        for key, value in wanted.items():
            for result in results[1:]:
                torch.testing.assert_close(result[key], results[0][key], rtol=0, atol=0, msg=f"{name} {key}")
            if key != "rule.trials" and value.numel():  # nothing may be left of a space
                scale = float(value.float().abs().max())
                torch.testing.assert_close(
                    results[0][key].float(), value.float(), rtol=2e-2, atol=2e-3 * scale, msg=f"{name} {protocol} {key}"
                )


@pytest.mark.parametrize(
    "flags", [[], ["--trm.curvature", "difference"], ["--micro-batch", "3"], ["--trm.lambda2", "0"]]
)
def test_the_search_on_a_vit(flags):
    """The slopes of three ranks add up to those of one."""
    flags = ["--batch-size", "16", *FLAGS[:2], *flags]
    setup = Setup(toy.parse(flags))
    task = setup.scenario.tasks[1]
    images = setup.cache.get(setup.dataset.train, task.train[:32])

    def make():
        learner = setup.learner(0, config=toy.parse(flags))
        previous = learner.theta.clone()
        noise = torch.randn(previous.shape, generator=torch.Generator().manual_seed(1))
        learner.theta.add_(1e-3 * noise * (previous != 0))
        return learner, Search(TRM(learner), task, images, previous)

    def step(learner, search):
        return search.step(0), search.coefficients.grad

    terms, slopes = step(*make())
    made = [make() for _ in range(3)]

    def work(ranks):
        made[ranks.rank][0].ranks = ranks
        return step(*made[ranks.rank])

    for its_terms, its_slopes in Threads(3).run(work):
        for key in terms:
            torch.testing.assert_close(its_terms[key], terms[key], rtol=1e-4, atol=1e-6, msg=key)
        rtol = 0.03 if "difference" in flags else 1e-3  # its step is chosen on other images
        torch.testing.assert_close(its_slopes, slopes, rtol=rtol, atol=1e-3 * float(slopes.abs().max()))


def test_evaluation():
    learner = toy.learner()
    tests = [images for _, images in toy.tasks()]
    rows = [range(2), range(6)]

    def results(learner):
        return accuracies(learner, tests, range(6)), zero_shot(learner, tests, rows)

    def work(ranks):
        own = toy.learner()
        own.ranks = ranks
        return results(own)

    assert Threads(3).run(work) == [results(learner)] * 3


# -- real processes -------------------------------------------------------------------------------------------------


QUICK = (
    "--epochs 1 --merge-epochs 1 --batch-size 16 --lr 1e-4 --device cpu --dataset folder --model tiny --tasks 2 "
    "--head linear --no-nearest-mean --seeds 0"
).split()


def free_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(processes, *flags, **about):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--master-port={free_port()}", "-m", "fastmerge", *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **about
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), classes=4, train=6, test=2)


@pytest.mark.parametrize(
    "methods",
    [("trm", "average", "magmax"), pytest.param(tuple(m for m in METHODS if m not in RULES), marks=pytest.mark.slow)],
)
def test_torchrun(methods, data, tmp_path):
    """Two gloo processes give the models of one, and one set of files and tables."""
    from fastmerge.__main__ import main

    flags = [*QUICK, "--data-root", data, "--method", *methods, "--protocol", "full", "--head", "text"]
    flags += ["--clg-cbm.concepts", toy.CONCEPTS]
    process = torchrun(2, *flags, "--run-dir", tmp_path / "two")
    text, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, text
    assert text.count("forgetting") == 1 and "Traceback" not in text  # rank 0 alone prints the table
    assert main([*map(str, flags), "--run-dir", str(tmp_path / "one"), "--quiet"]) == 0
    one, two = (json.loads((tmp_path / r / "results.json").read_text())["methods"] for r in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == len(methods)
    apart = []
    for name in (f"{label}-seed0" for label in one):
        a, b = (load_tensors(tmp_path / r / name / "model.safetensors")[0] for r in ("one", "two"))
        assert a.keys() == b.keys()
        for key, value in a.items():
            try:
                torch.testing.assert_close(
                    b[key], value, rtol=1e-2, atol=2e-4, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
                )
            except AssertionError as error:
                apart.append(str(error))
        lines = [(tmp_path / r / name / "metrics.jsonl").read_text().count("\n") for r in ("one", "two")]
        assert lines[0] == lines[1] >= 2
    assert not apart, "\n".join(apart)


def test_a_sweep_of_two_processes(data, tmp_path):
    """Its two stages are runs of one command, in which the processes meet once. Rank 0 alone writes and prints."""
    flags = [
        *QUICK,
        "--data-root",
        data,
        "--method",
        "finetune",
        "--sweep",
        "lr=1e-4,1e-3",
        "--run-dir",
        tmp_path / "run",
    ]
    process = torchrun(2, *flags)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert text.count("held-out acc") == 1 and "Traceback" not in text
    chosen = [row["chosen"] for row in csv.DictReader((tmp_path / "run" / "sweep.csv").open())]
    assert sorted(chosen) == ["", "best"]
    names = sorted(str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("result.json"))
    best = f"finetune(lr={['1e-4', '1e-3'][chosen.index('best')]})-seed0"
    assert names == [f"run/{best}", *(f"run/validation/finetune(lr={lr})-seed0" for lr in ("1e-3", "1e-4"))]


@pytest.mark.slow
def test_a_lost_process_stops_all_and_the_run_goes_on_with_another_number(data, tmp_path):
    flags = [*QUICK, "--data-root", data, "--run-dir", tmp_path / "r", "--method", "finetune", "--epochs", 200]
    flags += ["--save-every", 0.5]
    process = torchrun(2, *flags, start_new_session=True)
    checkpoint = tmp_path / "r" / "finetune-seed0" / "checkpoint-before.safetensors"
    for _ in range(600):
        if checkpoint.exists():
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this command ended" in text or "SIGTERM" in text
    process = torchrun(3, *flags)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "continues at task" in text
