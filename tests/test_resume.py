"""A run that is killed at any point and continued ends with the same bits as an undisturbed run, the oracle.

A server imports everything once and forks the children. Every child runs the command line. The killed ones send
themselves SIGKILL at a given place, or receive it at a random time.
"""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from image_trees import image_folder
from safetensors.torch import load_file

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fastmerge.loop", "fastmerge.methods", "open_clip", "timm", "matplotlib.figure"])

FLAGS = (
    "--dataset folder --model tiny --pretrained none --tasks 3 --epochs 2 --merge-epochs 2 --batch-size 8 --lr 1e-3"
    " --device cpu --quiet --no-nearest-mean"
    " --method trm --save-every 0 --trm.direction epoch --head prototype"
).split()


def kill_at(place):
    """Make this process kill itself with SIGKILL at `place`."""
    from fastmerge import checkpoint, evaluate, runfolder

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    kind, *where = place
    if kind == "step":  # after the step is computed and before it is saved
        original = runfolder.Record.log

        def log(self, about, terms):
            if (about["phase"], about["task"], about["step"]) == tuple(where):
                self.flush()  # writes log lines beyond the checkpoint
                self._log.flush()
                die()
            original(self, about, terms)

        runfolder.Record.log = log
    elif kind == "Ctrl-C twice":
        original = runfolder.Record.log

        def log(self, about, terms):
            if (about["phase"], about["task"], about["step"]) == tuple(where):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            original(self, about, terms)

        runfolder.Record.log = log
    elif kind == "checkpoint":  # half of the new file is on the disk
        original, count = checkpoint.save_file, [0]

        def save_file(tensors, path, metadata):
            original(tensors, path, metadata=metadata)
            count[0] += 1
            if count[0] == where[0]:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        checkpoint.save_file = save_file
    elif kind == "evaluate":
        original, count = evaluate.positions, [0]

        def positions(labels, classes):
            count[0] += 1
            return die() if count[0] == where[0] else original(labels, classes)

        evaluate.positions = positions
    elif kind == "end":  # the model is written, the result is not
        original = runfolder.save_json
        runfolder.save_json = lambda path, values: die() if path.name == "result.json" else original(path, values)


def child(flags, place, said):
    import sys

    from fastmerge import page, plots
    from fastmerge.__main__ import main

    # as in conftest.py
    plots.draw, page.figures, page.svg = lambda *_: [], lambda *_: [("accuracy", None)], lambda figure: ""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    if said is not None:
        sys.stderr = open(said, "w")
    if place is not None:
        kill_at(place)
    sys.exit(main(flags))


def start(flags, place=None, said=None):
    process = SERVER.Process(target=child, args=(flags, place, said))
    process.start()
    return process


def finish(flags, place=None):
    process = start(flags, place)
    process.join(120)
    return process.exitcode


def begun(run_dir, process):
    """Wait until this process runs the training loop or ends."""
    log = run_dir / "trm-seed0" / "metrics.jsonl"
    opened = log.stat().st_mtime_ns if log.exists() else None
    while process.is_alive() and (not log.exists() or log.stat().st_mtime_ns == opened):
        time.sleep(0.01)


def outcome(run_dir, method="trm"):
    """Return everything that must not depend on interruptions."""
    folder = run_dir / f"{method}-seed0"
    result = json.loads((folder / "result.json").read_text())
    for name in ("seconds", "peak_memory_bytes", "peak_memory_bytes_per_task", "bytes_written"):
        result.pop(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tensors = load_file(folder / "model.safetensors")
    return {k: v.numpy().tobytes() for k, v in tensors.items()}, result, lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert finish([*FLAGS, "--data-root", str(data), "--run-dir", str(run_dir)]) == 0
    return outcome(run_dir)


PLACES = [
    ("step", "train", 1, 3),
    ("step", "merge", 1, 2),
    ("evaluate", 2),
    ("checkpoint", 9),
]
MORE_PLACES = [  # the same in other tasks and files, as slow tests
    ("step", "train", 0, 0),
    ("step", "merge", 2, 3),
    ("checkpoint", 1),
    ("end",),
]
EVERYWHERE = [*PLACES, *(pytest.param(place, marks=pytest.mark.slow) for place in MORE_PLACES)]


@pytest.mark.parametrize("place", EVERYWHERE, ids=lambda p: "-".join(map(str, p)))
def test_killed_at(place, data, undisturbed, tmp_path):
    flags = [*FLAGS, "--data-root", str(data), "--run-dir", str(tmp_path / "run")]
    assert finish(flags, place) == -signal.SIGKILL
    assert not (tmp_path / "run" / "trm-seed0" / "result.json").exists()
    assert finish(flags) == 0
    assert outcome(tmp_path / "run") == undisturbed


OTHERS = {  # a post-hoc rule with shared training, one with a Fisher, and other methods with their own state
    "magmax-full": ("--method magmax finetune --protocol full", [("step", "train", 1, 3), ("checkpoint", 5)]),
    "fisher-strict": ("--method fisher", [("step", "merge", 1, 1), ("step", "train", 2, 1)]),
    "ewc": ("--method ewc", [("step", "merge", 0, 1), ("step", "train", 1, 2)]),
    "cmm": ("--method cmm --cmm.align-lr 1e-2", [("step", "train", 1, 1), ("step", "merge", 1, 1)]),
    "pam": ("--method pam", [("step", "train", 1, 2), ("step", "merge", 1, 1)]),
    "lwf": ("--method lwf", [("step", "train", 1, 2), ("evaluate", 2)]),
}


OFTEN = ("magmax-full",)  # not slow tests; each method takes at least ten seconds


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in OTHERS])
def test_other_methods_are_killed_too(name, data, tmp_path):
    method, places = OTHERS[name]
    flags = [*FLAGS, *method.split(), "--data-root", str(data)]
    assert finish([*flags, "--run-dir", str(tmp_path / "whole")]) == 0
    for place in places:
        assert finish([*flags, "--run-dir", str(tmp_path / "run")], place) == -signal.SIGKILL
    assert finish([*flags, "--run-dir", str(tmp_path / "run")]) == 0
    assert outcome(tmp_path / "run", name) == outcome(tmp_path / "whole", name)
    assert not list((tmp_path / "run").glob("trajectory*"))


@pytest.mark.slow
def test_killed_again_and_again_at_random_times(data, undisturbed, tmp_path):
    flags = [*FLAGS, "--data-root", str(data), "--run-dir", str(tmp_path / "run")]
    rng, kills = random.Random(0), 0
    for _ in range(4):
        process = start(flags)
        begun(tmp_path / "run", process)
        process.join(rng.uniform(0.05, 0.8))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert finish(flags) == 0 and kills >= 2
    assert outcome(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(data, undisturbed, tmp_path, signal_number, code):
    flags = [*FLAGS, "--data-root", str(data), "--run-dir", str(tmp_path / "run"), "--save-every", "1e9"]
    process = start(flags, said=tmp_path / "said")
    begun(tmp_path / "run", process)
    os.kill(process.pid, signal_number)
    process.join(60)
    assert process.exitcode == code
    assert "same command continues" in (tmp_path / "said").read_text()
    assert finish(flags) == 0
    assert outcome(tmp_path / "run") == undisturbed


def test_a_second_signal_ends_at_once_and_without_a_traceback(data, undisturbed, tmp_path):
    flags = [*FLAGS, "--data-root", str(data), "--run-dir", str(tmp_path / "run")]
    process = start(flags, place=("Ctrl-C twice", "merge", 1, 2), said=tmp_path / "said")
    process.join(60)
    assert process.exitcode == 130
    said = (tmp_path / "said").read_text()
    assert "stopped at once" in said and "Traceback" not in said
    assert finish(flags) == 0
    assert outcome(tmp_path / "run") == undisturbed


def test_results_do_not_depend_on_how_often_it_saves(data, undisturbed, tmp_path):
    flags = [*FLAGS, "--data-root", str(data), "--run-dir", str(tmp_path / "run"), "--save-every", "1e9"]
    assert finish(flags) == 0
    assert outcome(tmp_path / "run") == undisturbed
