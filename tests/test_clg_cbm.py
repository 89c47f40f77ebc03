"""Compare CLG-CBM with plain loops over torch's own modules, and the choice of concepts with the released loop."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn

from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.methods import clg_cbm
from fastmerge.methods.clg_cbm import CLGCBM, Bottleneck, Gate
from fastmerge.models.concepts import ConceptHead, alignment, nearest_unused
from fastmerge.parts import OutOfMemory
from fastmerge.report import results_rows

FLAGS = (
    f"--clg-cbm.concepts={toy.CONCEPTS}", "--clg-cbm.per-class=2", "--clg-cbm.gate-epochs=2", "--clg-cbm.epochs=6",
    "--clg-cbm.lr=0.05", "--clg-cbm.samples=3", "--clg-cbm.sparsity=0.1",
)  # fmt: skip


def released_choice(centres, concepts, number):
    """For every centre the nearest concept by squared distance that no earlier one took."""
    chosen = []
    for centre in centres / np.linalg.norm(centres, axis=1, keepdims=True):
        order = np.argsort(((concepts - centre) ** 2).sum(1))
        chosen.append(next(k for k in order if k not in chosen))
    return chosen[:number]


def test_the_choice_of_concepts():
    g = torch.Generator().manual_seed(0)
    centres, concepts = torch.randn(9, 4, generator=g), F.normalize(torch.randn(9, 4, generator=g), dim=1)
    wanted = released_choice(centres.numpy(), concepts.numpy(), 7)
    assert nearest_unused(centres, concepts, 7).tolist() == wanted and wanted != sorted(wanted)


def test_the_gate_is_torchs_layers():
    gate = Gate(7, 4, 3, torch.Generator().manual_seed(0))
    theirs = nn.Sequential(nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 3))
    theirs[0].weight.data, theirs[2].weight.data, theirs[2].bias.data = gate.centres, gate.weight, gate.bias
    for _ in range(3):
        x = torch.randn(6, 4)
        torch.testing.assert_close(gate(x), theirs(x))
    torch.testing.assert_close(gate.eval()(x), theirs.eval()(x))
    one = gate.train()(x[:1])  # torch's layer raises here
    torch.testing.assert_close(one, theirs(x[:1]))


def slow_distance(gate, texts):
    """The regulariser in fp64 numpy: mean squared Mahalanobis distances one by one."""
    texts, rows = texts.double().numpy(), gate.detach().double().numpy()
    inverse = np.linalg.pinv(np.cov(texts.T), hermitian=True)
    far = lambda x: (x - texts.mean(0)) @ inverse @ (x - texts.mean(0))  # noqa: E731
    wanted = np.mean([far(x) for x in texts])
    return abs(np.mean([far(x / np.linalg.norm(x)) for x in rows]) - wanted) / wanted**5


@pytest.mark.parametrize("batch", [8, 64])
def test_three_tasks_equal_plain_loops(batch):
    learner = toy.learner(*FLAGS, f"--batch-size={batch}")
    method = CLGCBM(learner)
    names, stored, layer, weight, embeddings, texts = method.names, {}, None, None, None, []
    for task, images in toy.tasks():
        t = task.index
        learner.grow_head(task, images)
        assert method.train(task, images, method.begin(task)) is None
        phase = method.merge(task, images, {})
        f = F.normalize(learner.backbone(learner.plain(images.images)).detach(), dim=1)
        rows = [i for c in task.classes for i in np.flatnonzero(images.labels.numpy() == c)]  # class by class
        f, labels = f[rows], images.labels[rows]
        own_texts = [f"class {c} part {i}" for c in task.classes for i in range(4)]
        encoded = learner.text.encode([f"A bad photo of an object with {text}" for text in own_texts])
        i = phase.batches.steps
        for j in range(i):
            phase.step(j)
        phase.open_gate()
        gate = phase.module
        slow = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
        slow[0].weight.data, slow[2].weight.data, slow[2].bias.data = (
            x.detach().clone() for x in (gate.centres, gate.weight, gate.bias)
        )
        optimiser = torch.optim.Adam(slow.parameters(), lr=0.01)
        assert float(gate.distance(*phase.spread).detach()) == pytest.approx(
            slow_distance(slow[0].weight, encoded), rel=1e-3
        )
        for epoch in range(2):
            order = torch.randperm(len(f), generator=learner.generator("gate order", t, epoch))
            for part in order.split(batch):
                if len(part) == 1:
                    slow.eval()
                loss = F.cross_entropy(slow(f[part]), labels[part] - 2 * t)
                slow.train()
                centres = slow[0].weight / slow[0].weight.detach().norm(dim=1, keepdim=True)
                covariance = torch.linalg.pinv(torch.cov(encoded.double().T), hermitian=True).float()
                far = torch.stack([(x - encoded.mean(0)) @ covariance @ (x - encoded.mean(0)) for x in centres]).mean()
                wanted = torch.stack(
                    [(x - encoded.mean(0)) @ covariance @ (x - encoded.mean(0)) for x in encoded]
                ).mean()
                loss = loss + (far - wanted).abs() / wanted**5
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                assert float(phase.step(i)["loss"]) == pytest.approx(float(loss.detach()), rel=1e-3)
                i += 1
        chosen = released_choice(slow[0].weight.detach().numpy(), encoded.numpy(), 4)
        texts += [own_texts[k] for k in chosen]
        phase.open_bottleneck(phase.choose())
        assert phase.chosen.tolist() == chosen
        module, n, k = phase.module, 4 * (t + 1), 2 * (t + 1)
        if t:
            assert torch.equal(module.layer[:-4], layer) and torch.equal(module.weight[:-2, :-4], weight)
        layer, weight = (x.detach().clone().requires_grad_() for x in (module.layer, module.weight))
        assert layer.shape == (n, 5) and weight.shape == (k, n)
        embeddings = encoded[chosen] if not t else torch.cat([embeddings, encoded[chosen]])
        inputs, targets = [f], [labels]
        for c in range(2 * t):  # pseudo-features
            means = {new: f[labels == new].mean(0) for new in task.classes}
            near = max(task.classes, key=lambda new, c=c, means=means: float(names[c] @ F.normalize(means[new], dim=0)))
            own = f[labels == near]
            inputs += [(own[j % len(own)] - means[near] + stored[c][0])[None] for j in range(10)]
            targets += [torch.tensor([c])] * 10
        inputs, targets = torch.cat(inputs), torch.cat(targets)
        optimiser = torch.optim.Adam([layer, weight])
        turns = torch.randperm(2 * t, generator=learner.generator("old classes", t)).tolist()
        step = 0
        for epoch in range(6):
            order = torch.randperm(len(inputs), generator=learner.generator("concept order", t, epoch))
            for place, part in enumerate(order.split(batch)):
                x, y = [inputs[part]], [targets[part]]
                if t:
                    noise = torch.randn(2, 3, 5, generator=learner.generator("drawn", t, step))
                    for j in range(2):
                        c = turns[(2 * place + j) % (2 * t)]
                        x.append(stored[c][0] + noise[j] @ stored[c][1])
                        y.append(torch.full((3,), c))
                x, y = torch.cat(x), torch.cat(y)
                scores = F.normalize(x, dim=1) @ layer.T
                loss = F.cross_entropy(scores @ weight.T, y)
                for a, b in zip((scores**3).T, ((x @ embeddings.T) ** 3).T, strict=True):
                    loss = loss - (a / a.norm()) @ (b / b.norm()) / n
                loss = loss + 0.1 * 0.99 * weight.abs().sum() + 0.5 * 0.1 * 0.01 * (weight**2).sum()
                optimiser.param_groups[0]["lr"] = 0.05 * 0.1 ** ((epoch >= 3) + (epoch >= 4) + (epoch >= 5))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                assert float(phase.step(i)["loss"]) == pytest.approx(float(loss.detach()), rel=1e-2)
                i, step = i + 1, step + 1
        assert i == phase.steps
        phase.finish()
        layer, weight = learner.head.layer, learner.head.weight
        for c in task.classes:
            own = f[labels == c].double().numpy()
            values, vectors = np.linalg.eigh(np.cov(own.T) + 1e-4 * np.eye(5))
            root = vectors @ np.diag(values**0.5) @ vectors.T
            stored[c] = torch.tensor(own.mean(0)).float(), torch.tensor(root).float()
    assert learner.head.concepts == texts and learner.head.known.tolist() == list(range(6))
    features, classes = learner.backbone(learner.plain(images.images)).detach(), torch.tensor([5, 0])
    wanted = F.normalize(features, dim=1) @ layer.T @ weight[classes].T
    torch.testing.assert_close(learner.head(features, classes), wanted)


def test_the_alignment_ignores_size():
    g = torch.Generator().manual_seed(0)
    x, scores, texts = (torch.randn(6, n, generator=g) for n in (4, 3, 4))
    texts = texts[:3]
    one = alignment(x, scores, texts)
    assert -1 < float(one) < 1 and float(alignment(x, 1e-3 * scores, texts)) == pytest.approx(float(one), rel=1e-4)
    assert float(alignment(x, x @ texts.T, texts)) == pytest.approx(-1)


@pytest.mark.parametrize("stop", [1, 5, 9, 14, 20])
def test_it_goes_on_in_the_middle(stop):
    """Oracle: the same phase in one piece; the stops are in the pass, the gate and the bottleneck."""
    heads = []
    for cut in (False, True):
        learner = toy.learner(*FLAGS, "--clg-cbm.select=test")
        learner.test_images = lambda t: toy.tasks()[t][1]
        method = CLGCBM(learner)
        for task, images in toy.tasks()[:2]:
            phase = method.merge(task, images, {})
            for i in range(phase.steps):
                if cut and i == stop:
                    saved = {name: x.clone() for name, x in phase.tensors().items()}
                    phase = method.merge(task, images, {})
                    phase.load(saved)
                phase.step(i)
            phase.finish()
        heads.append(learner.head.state_dict())
    for name, tensor in heads[0].items():
        assert torch.equal(heads[1][name], tensor), name


@pytest.mark.parametrize("what", ["mahalanobis", "positions"])
def test_a_part_that_memory_cuts_off_while_it_opens_is_not_begun_twice(what, monkeypatch):
    """Neither the gate nor, behind it, the layer: the last checkpoint counts."""
    learner = toy.learner(*FLAGS)
    method, (task, images) = CLGCBM(learner), toy.tasks()[0]
    phase = method.merge(task, images, method.begin(task))
    first = phase.batches.steps + (phase.gate_steps if what == "positions" else 0)
    for i in range(first):
        phase.step(i)

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(clg_cbm, what, full)
    with pytest.raises(OutOfMemory) as error:
        learner.parts.attempt(partial(phase.step, first))
    assert error.value.changed


def test_epochs_are_chosen_on_test_images_only_if_asked():
    ends = {}
    for flags in ((), ("--clg-cbm.select=test",)):
        learner = toy.learner(*FLAGS, "--clg-cbm.epochs=22", "--clg-cbm.lr=0.3", *flags)
        asked = []
        learner.test_images = lambda t, asked=asked: asked.append(t) or toy.tasks()[t][1]
        method, looks = CLGCBM(learner), []
        task, images = toy.tasks()[0]
        phase = method.merge(task, images, {})
        for i in range(phase.steps):
            phase.step(i)
            if isinstance(phase.module, Bottleneck) and (i - phase.batches.steps - phase.gate_steps + 1) % 3 == 0:
                features = F.normalize(learner.backbone(learner.plain(images.images)).detach(), dim=1)
                hits = (phase.module(features)[1].argmax(1) == images.labels).double().mean()
                looks.append((float(hits), phase.module.weight.detach().clone()))
        phase.finish()
        assert len(looks) == 22 and bool(asked) == bool(flags) == method.chosen_on_test
        ends[flags] = learner.head.weight
        if flags:
            best = max((looks[e] for e in (0, 10, 20, 21)), key=lambda look: look[0])
            assert torch.equal(learner.head.weight, best[1])
        else:
            assert torch.equal(learner.head.weight, looks[-1][1])


def test_a_class_that_returns():
    learner = toy.learner(*FLAGS)
    method = CLGCBM(learner)
    task, images = toy.tasks()[0]
    toy.work(method.merge(task, images, {}))
    before = learner.head.state_dict()
    toy.work(phase := method.merge(task, images, {}))
    after = learner.head.state_dict()
    assert phase.gate_steps == 0 and after["layer"].shape == before["layer"].shape
    assert torch.equal(after["known"], before["known"]) and not torch.equal(after["layer"], before["layer"])
    assert method.gaussians.count.tolist() == [2 * int((images.labels == c).sum()) for c in task.classes]


def test_the_head_comes_back_from_its_state():
    head = ConceptHead(4)
    head.layer, head.weight = torch.randn(3, 4), torch.randn(2, 3)
    head.embeddings, head.known = torch.randn(3, 4), torch.tensor([5, 2])
    head.add_texts(["long  legs\n", "ein Schnäbelchen"])
    head.add_texts(["red"])
    again = ConceptHead(4)
    again.adopt(head.state_dict())
    x = torch.randn(6, 4)
    logits = again(x, torch.tensor([2, 3, 5]))
    torch.testing.assert_close(logits[:, [2, 0]], F.normalize(x, dim=1) @ head.layer.T @ head.weight.T)
    assert logits[:, 1].isneginf().all() and again.concepts == ["long legs", "ein Schnäbelchen", "red"]


def test_the_table_says_what_was_chosen_on_test_images():
    result = {"seconds": {"train": 1, "merge": 1}, "peak_memory_bytes": 1, "kept_bytes": [2**20, 2**20]}
    result |= {"final_accuracy": 1.0, "aaa": 1.0, "forgetting": 0.0, "plasticity": 1.0}
    rows = results_rows({"clg-cbm": {"0": result | {"chosen_on_test": True}}, "trm": {"0": result}}, None)
    column = rows[0].index("final acc")
    assert [row[column] for row in rows[1:]] == ["1.0, chosen on these images", "1.0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected a JSON object from class names to lists of texts.*got list"),
        ('{"a": []}', "class 'a': expected a list of at least one text"),
        ('{"a": ["x", 3]}', "class 'a': expected a list"),
        ('{"a": "x"}', "class 'a': expected a list"),
    ],
)
def test_bad_files(content, message, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=message):
        CLGCBM.check(parse(["--method", "clg-cbm", "--clg-cbm.concepts", str(tmp_path / "c.json")]), toy.Backbone())


def test_what_is_refused(tmp_path):
    def check(*flags):
        CLGCBM.check(parse(["--method", "clg-cbm", *flags]), toy.Backbone())

    with pytest.raises(UserError, match="needs a file of concepts: --clg-cbm.concepts FILE.json"):
        check()
    with pytest.raises(UserError, match="missing.json: cannot be read"):
        check("--clg-cbm.concepts", str(tmp_path / "missing.json"))
    given = ["--clg-cbm.concepts", str(toy.CONCEPTS)]
    with pytest.raises(UserError, match=r"--clg-cbm.prompt 'with': expected \{\} in the place"):
        check(*given, "--clg-cbm.prompt", "with")
    with pytest.raises(UserError, match="clg-cbm encodes concepts: it needs --head text"):
        check(*given, "--head", "linear")
    check(*given)
    config = parse(["--method", "clg-cbm", *given])
    CLGCBM.check_classes(config, ["class 0", "class 5"])
    with pytest.raises(UserError, match="no concepts for the classes 'x 0', .* and 2 more; add them"):
        CLGCBM.check_classes(config, ["class 0", *(f"x {i}" for i in range(7))])
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"a": ["x"]}))
    moved = tmp_path / "b.json"
    moved.write_bytes(file.read_bytes())
    config = [parse(["--clg-cbm.concepts", str(path)]) for path in (file, moved)]
    before = CLGCBM.contents(config[0])
    assert before == CLGCBM.contents(config[1])
    moved.write_text(json.dumps({"a": ["y"]}))
    assert before.keys() == CLGCBM.contents(config[1]).keys() and before != CLGCBM.contents(config[1])
