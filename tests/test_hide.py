"""HiDe-Prompt against plain loops over images, which share no code with it."""

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import toy

from fastmerge.data.cache import TaskImages
from fastmerge.loop import kept_bytes
from fastmerge.methods.hide import HiDe, contrast
from fastmerge.models.features import restore
from fastmerge.models.prompts import Prompt

FLAGS = (
    "--clip=0", "--epochs=1", "--head-lr=0.1", "--hide.length=3", "--hide.layers", "0", "2", "--hide.lr=1",
    "--hide.momentum=0.2", "--hide.contrast=0.3", "--hide.identity-lr=0.05", "--hide.align-epochs=2", "--hide.align-lr=0.02",
    "--hide.samples=12",
)  # fmt: skip
N = 12


def build(*more):
    learner = toy.learner(*FLAGS, *more, method="hide", head="linear")
    return learner, HiDe(learner)


def leaf(x):
    return x.detach().clone().requires_grad_()


def under(learner, prompt, image):
    """The feature of one image `[1, 3, s, s]` with a prompt `[blocks, 2, p, width]`."""
    return learner.backbone.prompted(image, Prompt({0: tuple(prompt[0][:, None]), 2: tuple(prompt[1][:, None])}))[0]


class Plain:
    """All state in lists: prompts and images by task, heads and statistics by class (two classes a task)."""

    def __init__(self):
        self.prompts, self.plain, self.prompted = [], [], []  # statistics: mean and covariance
        self.identity, self.head = [torch.zeros(0, 5), torch.zeros(0)], [torch.zeros(0, 5), torch.zeros(0)]

    def grow(self, prompt):
        self.prompts.append(leaf(prompt))
        for pair in (self.identity, self.head):
            pair[:] = [leaf(torch.cat([x.detach(), x.new_zeros(2, *x.shape[1:])])) for x in pair]

    def effective(self):
        *old, new = self.prompts
        return 0.8 * new + 0.2 * sum(old) / len(old) if old else new

    def loss(self, learner, x, labels):
        total, t = 0.0, len(self.prompts) - 1
        own = slice(2 * t, 2 * t + 2)
        for image, label in zip(x.split(1), labels - 2 * t, strict=True):
            f, plain = under(learner, self.effective(), image), learner.backbone(image)[0].detach()
            for g, (weight, bias) in ((f, self.head), (plain, self.identity)):
                total = total + F.cross_entropy(weight[own] @ g + bias[own], label)
            if t:
                terms = [(f @ f / 0.8).exp(), *((f @ mean / 0.8).exp() for mean, _ in self.prompted)]
                total = total - 0.3 * (terms[0] / sum(terms)).log()
        return total / len(x)

    @torch.no_grad()
    def observe(self, learner, x, labels):
        t = len(self.prompts) - 1
        for c in (2 * t, 2 * t + 1):
            images = x[labels == c].split(1)
            for kept, f in (
                (self.plain, [learner.backbone(image)[0] for image in images]),
                (self.prompted, [under(learner, self.prompts[-1], image) for image in images]),
            ):
                f = torch.stack(f).double()
                kept.append((f.mean(0).float(), torch.cov(f.T)))

    def align(self, learner):
        """Both heads on drawn features, each in a loop of its own."""
        t = len(self.prompts) - 1
        k = 2 * t + 2
        for name, pair, stored in (("plain", self.identity, self.plain), ("prompted", self.head, self.prompted)):
            velocity = [torch.zeros_like(x) for x in pair]
            for epoch in range(2):
                g = learner.generator("align", name, t, epoch)
                noise, x = torch.randn(k, N, 5, generator=g), []
                for c, (mean, covariance) in enumerate(stored):
                    root = torch.tensor(scipy.linalg.sqrtm((covariance + 1e-4 * torch.eye(5)).numpy()).real).float()
                    x.append(mean + noise[c] @ root)
                x, order = torch.cat(x), torch.randperm(k * N, generator=g)
                for part in order.split(N):
                    loss = F.cross_entropy(x[part] @ pair[0].T + pair[1], part // N)
                    found = torch.autograd.grad(loss, pair)
                    with torch.no_grad():
                        for i, gradient in enumerate(found):
                            velocity[i] = 0.9 * velocity[i] + gradient + 5e-4 * pair[i]
                            pair[i] -= 0.02 * (1.0, 0.5)[epoch] * velocity[i]

    @torch.no_grad()
    def features(self, learner, x):
        rows = []
        for image in x.split(1):
            scores = self.identity[0] @ learner.backbone(image)[0] + self.identity[1]
            rows.append(under(learner, self.prompts[int(scores.argmax()) // 2], image))
        return torch.stack(rows)


def test_three_tasks_equal_a_plain_loop():
    learner, method = build()
    plain, near = Plain(), {"rtol": 2e-3, "atol": 2e-4}
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        during = method.begin(task)
        if task.index:
            torch.testing.assert_close(method.pool.prompt, plain.prompts[-1], **near)
        plain.grow(method.pool.prompt)
        phase = method.train(task, images, during)
        groups = [
            {"params": [plain.prompts[-1]], "lr": 8 / 256},
            {"params": plain.identity, "lr": 0.05},
            {"params": plain.head, "lr": 0.1},
        ]
        optimiser = torch.optim.Adam(groups)
        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            x = learner.augmented(pixels, learner.generator("augment", task.index, i))
            loss = plain.loss(learner, x, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            torch.testing.assert_close(phase.step(i)["loss"], loss.detach(), rtol=1e-3, atol=1e-4)
        phase.finish()
        plain.prompts[-1] = leaf(plain.effective())
        torch.testing.assert_close(method.pool.prompt, plain.prompts[-1], **near)
        x = learner.plain(images.images)
        plain.observe(learner, x, images.labels)
        toy.work(method.merge(task, images, during))
        if task.index:
            plain.align(learner)
        for name, stored in (("plain", plain.plain), ("prompted", plain.prompted)):
            torch.testing.assert_close(method.gaussians[name].mean, torch.stack([m for m, _ in stored]), **near)
        torch.testing.assert_close(method.pool.identity_weight, plain.identity[0], **near)
        torch.testing.assert_close(method.pool.identity_bias, plain.identity[1], **near)
        torch.testing.assert_close(learner.head.weight, plain.head[0], **near)
        torch.testing.assert_close(learner.head.bias, plain.head[1], **near)
    every = torch.cat([learner.plain(own.images[:8]) for _, own in toy.tasks()])
    torch.testing.assert_close(method.features()(every), plain.features(learner, every), **near)

    # heads that choose different prompts for these images, which random images do not teach
    queries, weight = learner.backbone(every).detach(), torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    plain.identity = [weight, -weight @ queries.mean(0)]
    method.pool.identity_weight.copy_(weight)
    method.pool.identity_bias.copy_(plain.identity[1])
    assert len(((queries @ weight.T + plain.identity[1]).argmax(1) // 2).unique()) == 3
    expected = plain.features(learner, every)
    torch.testing.assert_close(method.features()(every), expected, **near)
    alone = torch.cat([method.features()(one) for one in every.split(1)])
    torch.testing.assert_close(alone, expected, **near)  # whatever else is in the batch


def test_contrast_in_float64():
    g = torch.Generator().manual_seed(0)
    f, means = (torch.randn(n, 5, dtype=torch.float64, generator=g) for n in (4, 3))
    rows = [[(a @ b / 0.8).exp() for b in (a, *means)] for a in f]
    torch.testing.assert_close(contrast(f, means, 0.8), -sum((r[0] / sum(r)).log() for r in rows) / 4)


def test_a_class_that_returns_has_two_rows():
    """Domains: a class has a Gaussian and a row for every task; the model's head keeps one."""
    learner, method = build()
    for task, images in toy.tasks():
        object.__setattr__(task, "classes", (0, 1))
        own = TaskImages(images.images, images.labels - 2 * task.index, 0)
        learner.grow_head(task, own)
        during = method.begin(task)
        toy.work(method.train(task, own, during))
        toy.work(method.merge(task, own, during))
    assert method.pool.classes.tolist() == [0, 1] * 3 and method.pool.task.tolist() == [0, 0, 1, 1, 2, 2]
    assert method.gaussians["prompted"].known == list(range(6)) and len(learner.head.weight) == 2
    assert int(method.gaussians["plain"].count.sum()) == 3 * toy.IMAGES


def test_what_it_keeps():
    learner, method = build()
    toy.drive(learner, method)
    x, features = learner.plain(toy.tasks()[0][1].images), method.features()
    saved = restore(features.kind, learner.backbone, {k: v.clone() for k, v in features.tensors.items()})
    assert torch.equal(saved(x), features(x))
    pool, gaussians = 3 * 2 * 2 * 3 * 5 + 6 * (5 + 1), 6 * 2 * (5 + 25)
    size = kept_bytes(learner, method) - sum(x.nbytes for x in learner.state_dict().values())
    numbers = 8 * 6 * (2 + 2 * 3)  # class, task and count
    assert 0 <= size - 4 * (pool + gaussians) - numbers < 100


@pytest.mark.parametrize(("phase_name", "stop"), [("train", 2), ("merge", 1), ("merge", 3), ("merge", 6)])
def test_a_phase_that_is_stopped_goes_on(phase_name, stop):
    """In training, in the pass, right after it, and in the alignment."""
    (one, first), (two, second), _ = toy.tasks()
    ends = []
    for stopped in (False, True):
        learner, method = build()
        for task, images in ((one, first), (two, second)):
            learner.grow_head(task, images)
            method.begin(task)
            for name in ("train", "merge"):
                phase = getattr(method, name)(task, images, {})
                for i in range(phase.steps):
                    if stopped and task is two and (name, i) == (phase_name, stop):
                        parts = (learner.state_dict(), method.state_dict(), phase.tensors())
                        saved = [{k: v.clone() for k, v in x.items()} for x in parts]
                        learner, method = build()
                        learner.load_state_dict(saved[0])
                        method.load_state_dict(saved[1])
                        phase = getattr(method, name)(task, images, {})
                        phase.load(saved[2])
                    phase.step(i)
                phase.finish()
        assert phase.steps == 3 + 2 * 4
        ends.append(learner.state_dict() | method.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


@pytest.mark.parametrize("more", ["--micro-batch=3", "--checkpoint-gradients"])
def test_a_step_in_parts_or_with_checkpoints(more):
    results = []
    for own in ((), (more,)):
        learner, method = build(*own)
        for task, images in toy.tasks()[:2]:
            learner.grow_head(task, images)
            method.begin(task)
            phase = method.train(task, images, {})
            phase.step(0)
            if task.index == 0:
                phase.finish()
                toy.work(method.merge(task, images, {}))
        results.append([phase.gradient.clone(), *(p.grad for p in phase.identity)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
