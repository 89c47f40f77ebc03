"""`fastmerge merge --device cuda`: staging against the plain CPU path, bit by bit, with copies that happen as late as they
may; every rule on fake CUDA tensors; and the same files on a GPU (`pytest -m gpu`)."""

import dataclasses

import on_fake_cuda
import pytest
import torch
from on_fake_cuda import fake_cuda, needs_cuda_build
from safetensors.torch import load_file, save_file
from test_merge_files import model

import fastmerge
from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.files.plan import Options, make_plan
from fastmerge.files.rules import FILE_RULES
from fastmerge.files.staging import Lanes, Staging
from fastmerge.files.stream import CPU, Memory, Stream

BASE = model(0)
MODELS = [model(k, like=BASE) for k in (1, 2, 3)]
IDS = torch.arange(900)
RULES = [name for name, rule in FILE_RULES.items() if rule.on_gpu]
FISHERS = [{name: (one[name] - x).square() for name, x in BASE.items()} for one in MODELS]
GRAMS = [{name: x.T @ x for name, x in one.items() if x.ndim == 2 and x.numel()} for one in MODELS]
NEITHER_READS_NOR_WAITS = (
    "average",
    "task-arithmetic",
    "magmax",
    "dare",
    "randmix",
    "wise-ft",
    "coma",
    "ties",
    "dare-ties",
)


def given(name):
    rule = FILE_RULES[name]
    return MODELS[: rule.most], BASE if rule.needs_base else None


def plan(name, **options):
    models, base = given(name)
    if FILE_RULES[name].statistics is not None:
        options["statistics"] = GRAMS if name == "regmean" else FISHERS
    return make_plan(Options(name, [{**one, "ids": IDS} for one in models], base and {**base, "ids": IDS}, **options))


class Late(Lanes):
    """The CPU as a device whose copies back happen when they are waited for; then its memory is overwritten."""

    def __init__(self):
        self.pending = 0

    def memory(self, count, host):
        return torch.full((count,), 0x7F, dtype=torch.uint8)

    def up(self, pairs):
        for to, source in pairs:
            to.copy_(source)
            source.view(torch.uint8).fill_(0x55)

    def down(self, pairs):
        self.pending += 1
        done = []

        def wait():
            if not done:
                for to, source in pairs:
                    to.copy_(source)
                    source.view(torch.uint8).fill_(0x7F)
                self.pending -= 1
            done.append(1)

        return wait


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("fastmerge.files.plan.LARGEST_PART", 400)
    monkeypatch.setattr("fastmerge.files.plan.SMALLEST_PART", 1)


@pytest.mark.parametrize("name", RULES)
def test_staging_changes_no_bit(name, small_parts):
    for options in ({}, {"dtype": "bf16"}):
        streams = [Stream(plan(name, **options), measure=True) for _ in range(2)]
        streams[1].staged = Staging(lanes := Late())
        (plain, late), found = (Memory(), Memory()), []
        for stream, sink in zip(streams, (plain, late), strict=True):
            found.append(stream.run(sink))
        assert found[0] == found[1] and not lanes.pending
        assert plain.tensors.keys() == late.tensors.keys()
        for key, x in plain.tensors.items():
            assert torch.equal(x.view(-1).view(torch.uint8), late.tensors[key].view(-1).view(torch.uint8)), key


def test_a_mass_of_zero_is_decided_on_the_device_too(small_parts):
    """Whole numbers: a second pass writes the tensors with a mass of exactly zero, where the majority is negative."""
    generator = torch.Generator().manual_seed(1)
    models = [
        {n: torch.randint(-4, 3, x.shape, generator=generator).float() for n, x in BASE.items()} for _ in range(2)
    ]
    base = {name: torch.zeros_like(x) for name, x in BASE.items()}
    sinks = []
    for zero, late in (("majority", False), ("majority", True), ("positive", False)):
        made = make_plan(Options("ties", models, base, settings={"density": 0.9, "zero": zero}))
        stream, sink = Stream(made), Memory()
        stream.staged = Staging(Late()) if late else stream.staged
        assert all(about["nonfinite"] == 0 for about in stream.run(sink).values())
        sinks.append(sink.tensors)
    assert all(torch.equal(sinks[0][name], sinks[1][name]) for name in base)
    assert not all(torch.equal(sinks[0][name], sinks[2][name]) for name in base)


def test_values_that_are_not_finite_are_counted(small_parts):
    bad = {**MODELS[0], "a.weight": MODELS[0]["a.weight"].clone()}
    bad["a.weight"][3, 4] = torch.inf
    stream = Stream(make_plan(Options("average", [bad, MODELS[1]])))
    stream.staged = Staging(lanes := Late())
    with pytest.raises(UserError, match="a.weight: 1 value of the output is NaN or inf .they are in model 1"):
        stream.run(Memory())
    assert not lanes.pending


class Fake(Lanes):
    def memory(self, count, host):
        return torch.empty(count, dtype=torch.uint8, device="cpu" if host else self.device)

    def up(self, pairs):
        self.down(pairs)

    def down(self, pairs):
        for to, source in pairs:
            to.copy_(source, non_blocking=True)
        return lambda: None

    def __init__(self, device):
        self.device = device


def faked(entry):
    x = torch.empty(entry.numel, dtype=entry.dtype)
    return dataclasses.replace(entry, part=lambda start, stop: x[start:stop])


@needs_cuda_build
@pytest.mark.parametrize("name", RULES)
def test_all_tensors_meet_on_one_device(name, small_parts, monkeypatch):
    """Fake tensors raise where an op gets tensors of two devices; and parts neither wait for the device nor read from it."""
    made = plan(name)
    with fake_cuda() as transfers:
        for item in made.items:
            item.models, item.base = [faked(e) for e in item.models], item.base and faked(item.base)
            item.statistics = [faked(e) for e in item.statistics]
        stream = Stream(made, finite=False)
        stream.staged = Staging(Fake(on_fake_cuda.CUDA))
        seen, write = [], stream._write

        def watched(item, part, zero):
            transfers.found.clear()
            write(item, part, zero)
            seen.extend(transfers.found)
            assert part.out.device == on_fake_cuda.CUDA

        monkeypatch.setattr(stream, "_write", watched)
        sink = Memory()
        stream.run(sink)
        assert all(x.device == CPU for x in sink.tensors.values())
        assert name not in NEITHER_READS_NOR_WAITS or not seen, seen


def test_streams_wait_for_each_other(monkeypatch):
    """The order of the calls: copies up, then the ops wait for them; copies down behind the ops, then the host waits."""
    calls = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, call):
            return lambda *args: calls.append(f"{self.name}.{call}") or Recorded("event")

    class Inside:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            calls.append(f"in {self.stream.name}")

        def __exit__(self, *_):
            calls.append("out")

    names = iter(("up", "down"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Recorded(next(names)))
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Recorded("ops"))
    lanes = Lanes(CPU)
    x, y = torch.zeros(3), torch.ones(3)
    lanes.up([(x, y)])
    assert calls == ["in up", "out", "up.record_event", "ops.wait_event"] and torch.equal(x, y)
    calls.clear()
    wait = lanes.down([(torch.zeros(3), y)])
    assert calls == ["down.wait_stream", "in down", "out", "down.record_event"]
    wait()
    assert calls[-1] == "event.synchronize"


def test_what_has_no_gpu_is_one_line(tmp_path, capsys, monkeypatch):
    for k, one in enumerate((BASE, *MODELS[:2])):
        save_file(one, tmp_path / f"{k}.safetensors")
    words = [str(tmp_path / f"{k}.safetensors") for k in range(3)]
    command = ["--models", *words[1:], "--base", words[0], "--out", str(tmp_path / "out"), "--device", "cuda"]
    if not torch.cuda.is_available():
        assert main(["merge", "average", *command]) == 2
        assert "torch sees no CUDA device" in capsys.readouterr().err
    with pytest.raises(UserError, match="opcm on files runs on the CPU alone"):
        Stream(plan("opcm"), device=torch.device("cuda"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_the_same_files_on_a_gpu(name, small_parts, tmp_path, monkeypatch):
    """Where nothing is summed, the bits are those of the CPU; sums and products agree to their rounding. Parts change no bit,
    and the recipe repeats the merge on the GPU."""
    models, base = given(name)
    options = {} if FILE_RULES[name].statistics is None else {"statistics": GRAMS if name == "regmean" else FISHERS}
    cpu = fastmerge.merge(models, name, base=base, **options)
    for k, one in enumerate(models):
        save_file(one, tmp_path / f"m{k}.safetensors")
    files = [tmp_path / f"m{k}.safetensors" for k in range(len(models))]
    if base is not None:
        save_file(base, tmp_path / "base.safetensors")
    start = None if base is None else tmp_path / "base.safetensors"
    out = tmp_path / "out.safetensors"
    fastmerge.merge(files, name, base=start, out=out, device="cuda", **options)
    gpu = load_file(out)
    for key, x in cpu.items():
        if name in ("magmax", "randmix"):
            assert torch.equal(gpu[key], x), key
        else:
            torch.testing.assert_close(gpu[key], x, rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    whole = fastmerge.merge(files, name, base=start, device="cuda", **options)
    assert all(torch.equal(gpu[key], x) for key, x in whole.items())
    if not options:  # statistics in memory cannot be read again
        assert main(["merge", "--recipe", str(out)]) == 0
