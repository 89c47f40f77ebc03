"""L2P, DualPrompt and CODA-Prompt against plain loops over images, which share no code with them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import toy

from fastmerge.errors import UserError
from fastmerge.loop import kept_bytes
from fastmerge.methods import METHODS
from fastmerge.models.features import restore
from fastmerge.models.prompts import Prompt
from fastmerge.training import learning_rate, positions

WIDTH = 5  # of the toy's tokens, queries and features
FLAGS = {
    "l2p": "l2p.pool=4 l2p.length=2 l2p.top=2 l2p.pull=0.3 l2p.lr=1 l2p.start=uniform",
    "dualprompt": "dualprompt.general-length=2 dualprompt.general-layers 0 2 dualprompt.expert-length=3 "
    "dualprompt.expert-layers 1 2 dualprompt.pull=0.3 dualprompt.lr=1",
    "coda": "coda.components=2 coda.length=4 coda.layers 0 3 coda.ortho=0.2 coda.lr=0.03",
}


def flags(name, *more):
    words = FLAGS[name].split()
    return ("--clip=0", "--epochs=1", *(word if word.isdigit() else f"--{word}" for word in words), *more)


def build(name, *more, head="text"):
    learner = toy.learner(*flags(name, *more), method=name, head=head)
    return learner, METHODS[name](learner)


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


class L2P:
    """Section 4.1 and eq. 5."""

    lr = 8 / 256

    def __init__(self, pool):
        self.prompts, self.keys = leaf(pool.prompts), leaf(pool.keys)

    def trained(self):
        return {"prompts": self.prompts, "keys": self.keys}

    def new_task(self, pool):
        pass

    def image(self, query, training):
        near = [cosine(query, key) for key in self.keys]
        best = sorted(range(4), key=lambda m: -near[m].item())[:2]
        tokens = torch.cat([self.prompts[m] for m in best])
        return {0: tokens}, {}, -0.3 * sum(near[m] for m in best)

    def penalty(self):
        return 0.0


class DualPrompt:
    """Eq. 4, 7 and section 4.2."""

    lr = 8 / 256

    def __init__(self, pool):
        self.general, self.experts, self.keys = leaf(pool.general), [leaf(pool.expert)], [leaf(pool.key)]

    def trained(self):
        return {"general": self.general, "expert": self.experts[-1], "key": self.keys[-1]}

    def new_task(self, pool):
        torch.testing.assert_close(pool.expert, self.experts[-1], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(pool.key, self.keys[-1], atol=0.1)
        self.experts.append(leaf(self.experts[-1]))
        self.keys.append(leaf(pool.key))

    def image(self, query, training):
        near = [cosine(query, key) for key in self.keys]
        task = len(near) - 1 if training else max(range(len(near)), key=lambda t: near[t].item())
        own, g = self.experts[task], self.general
        both = [torch.cat([g[1, i], own[1, i]]) for i in range(2)]
        return {}, {0: (g[0, 0], g[0, 1]), 1: (own[0, 0], own[0, 1]), 2: both}, -0.3 * near[-1]

    def penalty(self):
        return 0.0


class Coda:
    """Eq. 4 to 7."""

    lr = 0.03
    names = ("components", "keys", "attention")

    def __init__(self, pool):
        self.tasks = [[leaf(getattr(pool, name)) for name in self.names]]

    def trained(self):
        return dict(zip(self.names, self.tasks[-1], strict=True))

    def new_task(self, pool):
        self.tasks.append([leaf(getattr(pool, name)) for name in self.names])

    def image(self, query, training):
        prefix = {}
        for j, block in enumerate((0, 3)):
            prompt = 0
            for components, keys, attention in self.tasks:
                for m in range(2):
                    prompt = prompt + cosine(query * attention[j, m], keys[j, m]) * components[j, m]
            prefix[block] = (prompt[:2], prompt[2:])
        return {}, prefix, 0.0

    def penalty(self):
        total = 0.0
        for which in range(3):
            for j in range(2):
                rows = [task[which][j, m].flatten() for task in self.tasks for m in range(2)]
                entries = [(a @ b - float(a is b)) ** 2 for a in rows for b in rows]
                total = total + 0.2 * sum(entries) / len(entries)
        return total


PLAIN = {"l2p": L2P, "dualprompt": DualPrompt, "coda": Coda}


def leaf(x):
    return x.detach().clone().requires_grad_()


def forward(learner, plain, images, training):
    """Features and pool terms, image by image."""
    rows = []
    for image in images.split(1):
        tokens, prefix, term = plain.image(learner.backbone(image)[0].detach(), training)
        prompt = Prompt(
            {i: (k[None], v[None]) for i, (k, v) in prefix.items()}, {i: t[None] for i, t in tokens.items()}
        )
        rows.append((learner.backbone.prompted(image, prompt)[0], term))
    return torch.stack([features for features, _ in rows]), sum(term for _, term in rows) / len(rows)


@pytest.mark.parametrize("name", PLAIN)
def test_three_tasks_equal_a_plain_loop(name):
    learner, method = build(name)
    start = learner.theta.clone()
    plain = PLAIN[name](method.pool)
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        during = method.begin(task)
        if task.index:
            plain.new_task(method.pool)
        phase = method.train(task, images, during)
        optimiser = torch.optim.Adam(plain.trained().values())
        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            x = learner.augmented(pixels, learner.generator("augment", task.index, i))
            features, term = forward(learner, plain, x, training=True)
            loss = F.cross_entropy(learner.head(features, phase.classes), positions(labels, phase.classes)) + term
            loss = loss + plain.penalty()
            rate = learning_rate(plain.lr, i, phase.steps) if name == "coda" else plain.lr
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            torch.testing.assert_close(phase.step(i)["loss"], loss.detach(), rtol=1e-4, atol=1e-5)
        phase.finish()
        for key, value in plain.trained().items():
            torch.testing.assert_close(getattr(method.pool, key), value, rtol=1e-3, atol=1e-4, msg=key)
        x = learner.plain(images.images)
        with torch.no_grad():
            expected, _ = forward(learner, plain, x, training=False)
        torch.testing.assert_close(method.features()(x), expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(expected, learner.backbone(x), atol=1e-3)
    assert torch.equal(learner.theta, start)


@pytest.mark.parametrize("name", PLAIN)
def test_predictions_do_not_depend_on_the_batch(name):
    learner, method = build(name)
    toy.drive(learner, method)
    x = learner.plain(toy.tasks()[0][1].images)
    features = method.features()
    alone = torch.cat([features(one) for one in x.split(1)])
    torch.testing.assert_close(features(x), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(x.flip(0)), features(x).flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["l2p", "dualprompt"])
def test_the_vote_of_a_batch(name):
    """Released code: all images get what most of them choose."""
    learner, method = build(name, f"--{name}.choice=batch")
    toy.drive(learner, method)
    x, pool = learner.plain(toy.tasks()[0][1].images), method.pool
    query = learner.backbone(x).detach()
    if name == "l2p":
        pool.keys.data.copy_(query[:4])  # so that the images do not agree
    keys = pool.keys if name == "l2p" else torch.cat([pool.keys, pool.key[None]])
    near = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
    count = 2 if name == "l2p" else 1
    votes = [0] * len(keys)
    for row in near.tolist():
        for m in sorted(range(len(row)), key=lambda m: -row[m])[:count]:
            votes[m] += 1
    assert sum(v > 0 for v in votes) > count
    best = sorted(range(len(votes)), key=lambda m: -votes[m])[:count]
    if name == "l2p":
        expected = pool.at(torch.tensor([best]).expand(len(x), -1))
    else:
        expected = pool.at(torch.cat([pool.experts, pool.expert[None]])[best].expand(len(x), -1, -1, -1, -1))
    torch.testing.assert_close(method.features()(x), learner.backbone.prompted(x, expected))


@pytest.mark.parametrize("name", PLAIN)
def test_what_it_keeps_is_its_pool(name):
    learner, method = build(name, head="linear")
    toy.drive(learner, method)
    x, features = learner.plain(toy.tasks()[0][1].images), method.features()
    saved = restore(features.kind, learner.backbone, {k: v.clone() for k, v in features.tensors.items()})
    assert torch.equal(saved(x), features(x))
    assert features.tensors.keys() == method.state_dict().keys()
    size = kept_bytes(learner, method)
    vectors = {"l2p": 4 * (2 + 1), "dualprompt": 2 * 2 * 2 + 3 * (2 * 2 * 3 + 1), "coda": 2 * 3 * 2 * (4 + 2)}[name]
    assert 0 <= size - 4 * WIDTH * vectors - sum(x.nbytes for x in learner.state_dict().values()) < 100  # and numbers


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("head", ["text", "linear"])
def test_state_comes_back_in_the_middle_of_a_task(name, head):
    learner, method = build(name, head=head)
    (first, images), (task, others) = toy.tasks()[:2]
    learner.grow_head(first, images)
    toy.work(method.train(first, images, method.begin(first)))
    learner.grow_head(task, others)
    phase = method.train(task, others, method.begin(task))
    phase.step(0)
    saved = [{k: v.clone() for k, v in x.items()} for x in (method.state_dict(), learner.state_dict(), phase.tensors())]
    for i in range(1, phase.steps):
        phase.step(i)
    other, again = build(name, head=head)
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[0])
    resumed = again.train(task, others, {})
    resumed.load(saved[2])
    for i in range(1, resumed.steps):
        resumed.step(i)
    for key, value in method.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert all(torch.equal(a, b) for a, b in zip(other.head.parameters(), learner.head.parameters(), strict=True))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("more", ["--micro-batch=3", "--checkpoint-gradients"])
def test_a_step_in_parts_or_with_checkpoints(name, more):
    results = []
    for own in ((), (more,)):
        learner, method = build(name, *own)
        task, images = toy.tasks()[0]
        learner.grow_head(task, images)
        phase = method.train(task, images, {})
        phase.step(0)
        results.append(phase.gradient.clone())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_components_start_orthogonal_while_there_are_dimensions():
    learner, method = build("coda")
    for task in range(3):
        if task:
            method.begin(toy.tasks()[task][0])
        for part in method.pool.parts():
            rows = part.detach().flatten(2)
            torch.testing.assert_close(rows.norm(dim=2), torch.ones(rows.shape[:2]))
            if rows.shape[1] <= rows.shape[2]:  # 6 keys do not fit 5 dimensions
                torch.testing.assert_close(
                    rows @ rows.mT, torch.eye(rows.shape[1]).expand(2, -1, -1), atol=1e-5, rtol=0
                )


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("l2p", ["--l2p.top=5"], "--l2p.top 5: the pool has 4 prompts; expected at most as many"),
        ("coda", ["--coda.length=3"], "--coda.length 3: half are keys and half values; expected an even number"),
        ("coda", ["--coda.layers", "1", "4"], "--coda.layers 4: model toy has 4 blocks; expected 0 to 3"),
        (
            "dualprompt",
            ["--dualprompt.expert-layers", "1", "1"],
            r"--dualprompt.expert-layers \[1, 1\]: expected at least one",
        ),
    ],
)
def test_settings_that_do_not_fit(name, flag, message):
    learner = toy.learner(*flags(name), *flag, method=name)
    with pytest.raises(UserError, match=message):
        METHODS[name].check(learner.config, learner.backbone)
    METHODS[name].check(build(name)[0].config, learner.backbone)


def test_a_frozen_learner_has_no_gradient_buffer():
    """Its weights need no autograd; the prompts get the same gradient."""
    results = []
    for frozen in (False, True):
        learner, method = build("coda")
        if frozen:
            learner = type(learner)(learner.backbone, learner.head, learner.config, 0, torch.device("cpu"), frozen=True)
            method = METHODS["coda"](learner)
        task, images = toy.tasks()[0]
        learner.grow_head(task, images)
        phase = method.train(task, images, {})
        phase.step(0)
        results.append(phase.gradient.clone())
        assert learner.flat.gradient.numel() == (0 if frozen else learner.theta.numel())
        assert all(p.requires_grad != frozen and (p.grad is None) == frozen for p in learner.flat.parameters)
        phase.finish()
    assert torch.equal(*results)


def test_prompts_that_start_at_the_mean_token():
    """Once, before the first step of the first task; a phase that is loaded later leaves them."""
    learner, method = build("l2p", "--l2p.start=mean", "--l2p.lr=0")
    (task, images), (second, others), _ = toy.tasks()
    drawn, vit = method.pool.prompts.detach().clone(), learner.backbone.tower
    phase = method.train(task, images, {})
    with torch.no_grad():
        first = learner.plain(images.batch(phase.batches.rows(0))[0])
        tokens = vit._pos_embed(vit.patch_embed(first))[:, 1:]
        mean = torch.stack([token for image in tokens for token in image]).mean(0)
    assert torch.equal(method.pool.prompts, drawn)
    its, said = phase.loss, []
    learner.parts.say = said.append

    def full_once(*batch):
        if not said:
            raise torch.OutOfMemoryError("full")
        return its(*batch)

    phase.loss = full_once
    learner.parts.attempt(partial(phase.step, 0))
    assert len(said) == 1 and "4 at once" in said[0]
    torch.testing.assert_close(method.pool.prompts.detach(), mean + 0.1 * mean.std() * drawn)
    began = method.pool.prompts.detach().clone()
    phase.step(1)
    phase.finish()
    method.begin(second)
    method.train(second, others, {}).step(0)
    torch.testing.assert_close(method.pool.prompts.detach(), began, rtol=0, atol=0)
