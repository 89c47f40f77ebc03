"""Images at once from free memory, which is injected, and from out-of-memory errors, which are raised by a hook."""

import dataclasses

import fastmerge_kernels as fk
import pytest
import torch
import torch.nn.functional as F
import toy
from image_trees import image_folder
from safetensors.torch import load_file
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef

from fastmerge.__main__ import main
from fastmerge.flat import FlatModel
from fastmerge.methods.cmm import MergeAndAlign
from fastmerge.methods.trm import Search
from fastmerge.models import load_backbone
from fastmerge.models.attention import differentiable_attention
from fastmerge.models.backbone import Backbone
from fastmerge.models.linearised import Linearised
from fastmerge.models.per_image import SquaredGradients
from fastmerge.models.trainable import AllWeights
from fastmerge.parts import FACTOR, MODELS, SHARE, OutOfMemory, Parts, saved_bytes
from fastmerge.training import Train

MIB = 1 << 20


def parts(free, batch=100, micro_batch=0):
    return Parts(batch, micro_batch, None if free is None else lambda: free, lambda kind: MIB, MIB)


def needs(images, kind):
    """Free bytes that are just enough."""
    return int((images * FACTOR[kind] + MODELS) * MIB / SHARE) + 1


@pytest.mark.parametrize("kind", FACTOR)
def test_the_largest_fraction_of_the_batch_that_fits(kind):
    for free, size in ((100, 100), (99, 50), (50, 50), (49, 25), (24, 13), (12, 7), (1, 1), (0, 1)):
        its = parts(needs(free, kind))
        cut = its.of(100, kind)
        assert its.sizes == {kind: size} and cut[0][0] == slice(0, size)
        assert sum(share for _, share in cut) == pytest.approx(1)
        assert torch.cat([torch.arange(100)[part] for part, _ in cut]).tolist() == list(range(100))
    assert parts(0).of(0, kind) == []


def test_a_size_stays_and_micro_batch_is_stronger():
    its = parts(needs(50, "train"))
    assert its.of(3, "train") == [(slice(0, 3), 1.0)]  # a short batch does not decide for the others
    its.free = lambda: 0
    assert len(its.of(100, "train")) == 2
    assert len(parts(0, micro_batch=30).of(100, "train")) == 4
    whole = parts(None)  # a CPU
    assert whole.of(100, "curvature") == [(slice(0, 100), 1.0)] and not whole.sizes


def test_attempts():
    its, said, calls = parts(None), [], []
    its.say = said.append

    def work(limits):
        for kind, limit in limits.items():
            (part, _), *_ = its.of(100, kind)
            calls.append((kind, part.stop))
            if part.stop > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return "done"

    assert its.attempt(lambda: work({"search": 60, "curvature": 50})) == "done"
    assert calls == [("search", 100), ("search", 50), ("curvature", 100), ("search", 50), ("curvature", 50)]
    assert said == [
        "out of memory (search, 100 images at once): from now on 50 at once",
        "out of memory (curvature, 100 images at once): from now on 50 at once",
    ]
    with pytest.raises(
        OutOfMemory, match=r"search, 50 images at once\): CUDA out of memory. Tried to allocate 2 GiB. Fre"
    ):
        its.attempt(lambda: work({"search": 40}))
    calls.clear()  # a step that other processes have taken part in
    with pytest.raises(OutOfMemory, match=r"evaluate, 100 images at once\): CUDA .* a smaller --micro-batch"):
        its.attempt(lambda: work({"evaluate": 60}), again=False)
    assert calls == [("evaluate", 100)]
    one = parts(0)
    with pytest.raises(OutOfMemory, match="train, 1 image at once"):
        one.attempt(lambda: [one.of(1, "train"), (_ for _ in ()).throw(torch.OutOfMemoryError("full"))][1].__next__())


def test_a_step_that_has_begun_to_change_something_is_not_repeated():
    its, calls = parts(None), []
    its.say = print

    def work(inner):
        calls.append(inner)
        its.of(100, "train")
        if inner == "before":
            its.attempt(lambda: its.changes())
        else:
            its.changes()
            its.attempt(lambda: None)
        if len(calls) < 3:
            raise torch.OutOfMemoryError("full")
        return "done"

    with pytest.raises(OutOfMemory) as caught:
        its.attempt(lambda: work("after"))
    assert calls == ["after"] and caught.value.changed
    assert its.attempt(lambda: work("before")) == "done" and len(calls) == 3  # a part of a step that was finished


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of tensors that are made in this context."""

    def __enter__(self):
        self.now, self.peak, self.alive = 0, 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                key = WeakIdRef(tensor.untyped_storage(), self.released)
                if key not in self.alive:
                    self.alive[key] = tensor.untyped_storage().nbytes()
                    self.now += self.alive[key]
                    self.peak = max(self.peak, self.now)
        return result

    def released(self, key):
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize("kind", FACTOR)
def test_the_factors_are_the_peaks_of_live_tensors(kind):
    backbone, _ = load_backbone("tiny", "glyphs")
    flat = FlatModel(backbone.eval())
    theta, head = flat.theta.detach(), torch.randn(128, 10)
    tangent = Linearised(flat, theta.clone())

    def loss(features):
        return F.cross_entropy(features @ head, torch.zeros(len(features), dtype=torch.long), reduction="sum")

    def step(x):
        if kind == "evaluate":
            with torch.no_grad():
                backbone(x)
        if kind == "train":
            loss(backbone(x)).backward()
        if kind == "search":
            features, tokens = backbone.class_tokens(x)
            loss(features).backward(retain_graph=True)
            tokens.square().mean().backward()
        if kind == "tangent":
            loss(tangent(x)).backward()
        if kind == "curvature":
            with differentiable_attention():
                features, tokens = backbone.class_tokens(x)
            graph = torch.autograd.grad(loss(features), flat.parameters, create_graph=True)
            along = [g.detach() for g in graph]
            torch.autograd.backward([*graph, tokens.mean()], [*along, torch.ones(())], inputs=flat.parameters)
        if kind == "fisher":
            named, squares = flat.as_dict(theta), torch.zeros_like(theta)
            with SquaredGradients(named, AllWeights(flat).parts(squares)) as mode:
                features = functional_call(backbone, named, (x,))
            mode.backward(loss(features))

    peaks = []
    for n in (32, 64):
        x = torch.randn(n, 3, 32, 32)
        with LiveBytes() as live:
            step(x)
        peaks.append(live.peak)
    per_image = (peaks[1] - peaks[0]) / 32
    assert 0.75 * FACTOR[kind] < per_image / saved_bytes(flat, 32) < 1.1 * FACTOR[kind]


def flags(root, run, merge_epochs=1):
    return [
        *"--dataset folder --model tiny --pretrained none --tasks 2 --epochs 2 --batch-size 8".split(),
        *"--method trm --head prototype --device cpu --quiet --no-nearest-mean --save-every 1000 --lr 1e-3".split(),
        f"--data-root={root}", f"--run-dir={run}", f"--merge-epochs={merge_epochs}",
    ]  # fmt: skip


def test_a_run_that_is_short_of_memory_is_saved(tmp_path, monkeypatch, capfd):
    """The command halves once and says so, then it stops; the same command continues to the result of another run."""
    image_folder(tmp_path / "images")
    assert main(flags(tmp_path / "images", tmp_path / "whole", 3)) == 0
    capfd.readouterr()
    forward, limit, calls = Backbone.class_tokens, [100], [0]

    def refuse(self, images):
        calls[0] += 1
        if len(images) > limit[0] or limit[0] < 100 and calls[0] > 24:
            raise torch.OutOfMemoryError("the GPU is full")
        return forward(self, images)

    monkeypatch.setattr(Backbone, "class_tokens", refuse)  # of the teacher and the search
    limit[0] = 4
    assert main([f for f in flags(tmp_path / "images", tmp_path / "short", 3) if f != "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert "out of memory (evaluate, 8 images at once): from now on 4 at once" in out
    assert "error: out of memory (" in err and "the GPU is full. Free memory" in err
    assert list((tmp_path / "short" / "trm-seed0").glob("checkpoint*"))
    limit[0] = 100
    assert main(flags(tmp_path / "images", tmp_path / "short", 3)) == 0
    found, want = (load_file(tmp_path / run / "trm-seed0" / "model.safetensors") for run in ("short", "whole"))
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-5)


ONCE = {  # the step that fails, and how
    "trm, teacher": ("--method trm", Backbone, "class_tokens", 8),  # at theta_{t-1}
    "trm, first step": ("--method trm", Backbone, "class_tokens", 14),
    "trm, report": ("--method trm", Search, "report", 1),
    "cmm, first step": ("--method cmm --cmm.align-epochs 1 --cmm.no-tangent", MergeAndAlign, "features", 2),
    "cmm, average": ("--method cmm --cmm.align-epochs 1 --cmm.merge average", MergeAndAlign, "features", 1),
    "pam": ("--method pam --pam.rank 0", fk, "lerp", 2),
    "became": ("--method became", fk, "lerp", 1),
    "first training step": ("--method average --protocol running --init-rule last", Train, "loss", None),
}


SIBLINGS = ("trm, first step", "cmm, average", "became")  # each takes seconds, and its neighbour fails with it


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SIBLINGS)) for c in ONCE])
def test_a_step_without_memory_leaves_what_the_same_command_continues(case, tmp_path, monkeypatch):
    """Wherever memory runs out, also twice in a row, the result is that of a run that had it."""
    words, owner, name, at = ONCE[case]
    image_folder(tmp_path / "images")

    def command(run):
        return [*flags(tmp_path / "images", tmp_path / run), *words.split(), "--micro-batch=4"]

    before, calls, failing = getattr(owner, name), [0], [None]

    def refuse(*args, **kwargs):
        calls[0] += 1
        if failing[0] is not None and failing[0] <= calls[0] < failing[0] + 2:
            raise torch.OutOfMemoryError("the GPU is full")
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, refuse)
    assert main(command("whole")) == 0
    steps = calls[0]
    calls[0], failing[0] = 0, at or steps // 2 + 1  # the second task
    assert main(command("short")) == 2
    failing[0] = None
    assert main(command("short")) == 0
    (found,), (want,) = ((tmp_path / run).glob("*-seed0/model.safetensors") for run in ("short", "whole"))
    found, want = load_file(found), load_file(want)
    for key in want:
        torch.testing.assert_close(found[key], want[key], rtol=1e-4, atol=1e-5)


def test_the_sizes_are_in_a_checkpoint():
    from fastmerge.runfolder import State

    state = State()
    learner = toy.learner()
    learner.parts.sizes = state.parts
    learner.parts.micro_batch = 3
    learner.parts.of(8, "train")
    assert dataclasses.asdict(state)["parts"] == {"train": 3}


def test_of_a_shared_batch_a_process_takes_its_share():
    second = Parts(10, 0, lambda: 700, lambda kind: 100, 0, own=lambda n: slice(n // 3, 2 * n // 3))
    assert second.share == 3 and second.usual(3) and second.usual(10) and not second.usual(4)
    assert second.of(10, "train") == [(slice(3, 6), 0.3)]
    assert second.of(10, "curvature") == [(slice(3, 5), 0.2), (slice(5, 6), 0.1)] and second.usual(2)
