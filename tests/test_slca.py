"""Compare SLCA with a plain loop, and the Gaussians of classes with numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import toy

from fastmerge.gaussians import Gaussians, shrink
from fastmerge.methods.slca import SLCA
from fastmerge.statistics_pass import ByClass, ClassMoments, StatisticsPass

FLAGS = (
    "--clip=0",
    "--slca.lr=0.01",
    "--head-lr=0.1",
    "--slca.samples=12",
    "--slca.align-epochs=2",
    "--slca.decay-at=0.5",
)


def made(*flags):
    learner = toy.learner(*FLAGS, *flags, head="linear")
    return learner, SLCA(learner)


def passed(learner, gaussians, task, images):
    """Run a pass over a task into `gaussians`."""
    batches = ByClass(learner, task, images)
    moments = ClassMoments(learner, task, batches)
    toy.work(StatisticsPass(learner, task, images, batches, moments))
    gaussians.update(task, moments)


def test_gaussians_equal_numpy():
    """Classes of two tasks, and the first ones again with other images: as if all images had come at once."""
    learner = toy.learner(head="linear")
    gaussians, seen = Gaussians(5, learner.device), {}
    (first, images), (second, others), (_, more) = toy.tasks()
    more.labels -= 4  # images of the first task's classes
    for task, given in ((first, images), (second, others), (first, more)):
        passed(learner, gaussians, task, given)
        f = learner.backbone(learner.plain(given.images)).detach().double().numpy()
        for c in task.classes:
            seen.setdefault(c, []).append(f[given.labels.numpy() == c])
    assert gaussians.known == [0, 1, 2, 3] and gaussians.tasks == [0, 0, 1, 1]
    for row, c in enumerate(gaussians.known):
        every = np.concatenate(seen[c])
        assert int(gaussians.count[row]) == len(every)
        np.testing.assert_allclose(gaussians.mean[row], every.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gaussians.covariance[row], np.cov(every.T), rtol=1e-4, atol=1e-6)
        root = gaussians.roots(0.01)[row].double()
        np.testing.assert_allclose(root @ root, np.cov(every.T) + 0.01 * np.eye(5), rtol=1e-4, atol=1e-5)


def test_a_class_of_one_image_and_one_of_none():
    learner = toy.learner(head="linear")
    task, images = toy.tasks()[0]
    images.images, images.labels = images.images[:1], images.labels[:1]
    gaussians = Gaussians(5, learner.device)
    passed(learner, gaussians, task, images)
    assert gaussians.known == [int(images.labels[0])] and not gaussians.covariance.any()
    root = gaussians.roots(0.25)[0]
    torch.testing.assert_close(root, 0.5 * torch.eye(5))


def test_shrinkage():
    m = np.random.default_rng(0).normal(size=(6, 4))
    covariance = np.cov(m.T)
    on, off = np.diag(covariance).mean(), covariance[~np.eye(4, dtype=bool)].mean()
    wanted = covariance + on * np.eye(4) + off * (1 - np.eye(4))
    torch.testing.assert_close(shrink(torch.tensor(covariance)), torch.tensor(wanted))


def align(learner, weight, bias, stored, t):
    """The alignment of the released code, in loops. stored: (mean, covariance, task) of each class."""
    k, n = len(stored), 12
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    weight, bias = weight.clone(), bias.clone()
    for epoch in range(2):
        g = learner.generator("align", t, epoch)
        noise, x, y = torch.randn(k, n, 5, generator=g), [], []
        for c, (mean, covariance, own) in enumerate(stored):
            root = torch.tensor(scipy.linalg.sqrtm(covariance + 1e-4 * np.eye(5))).float()
            x.append(torch.tensor(mean).float() * (0.9 + (own + 1) / (t + 1) * 0.1) + noise[c] @ root)
            y += [c] * n
        order = torch.randperm(k * n, generator=g)
        x, y = torch.cat(x)[order], torch.tensor(y)[order]
        for part in range(k):
            weight.requires_grad_(), bias.requires_grad_()
            logits = x[part * n : part * n + n] @ weight.T + bias
            norms = torch.stack([logits[:, 2 * s : 2 * s + 2].pow(2).sum(1).sqrt() + 1e-7 for s in range(t + 1)]).mean(
                0
            )
            loss = F.cross_entropy(logits / norms[:, None] / 0.1, y[part * n : part * n + n])
            found = torch.autograd.grad(loss, (weight, bias))
            lr = 0.1 * (1 + np.cos(np.pi * epoch / 2)) / 2
            with torch.no_grad():
                for i, (p, grad) in enumerate(zip((weight, bias), found, strict=True)):
                    velocity[i] = 0.9 * velocity[i] + grad + 5e-4 * p
                weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    return weight, bias


def test_three_tasks_equal_a_plain_loop():
    learner, method = made()
    other = toy.learner(*FLAGS, head="linear")
    weight, bias, stored = torch.zeros(0, 5), torch.zeros(0), []
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        during = method.begin(task)
        phase = method.train(task, images, during)
        weight, bias = (torch.cat([x.detach(), x.new_zeros(2, *x.shape[1:])]).requires_grad_() for x in (weight, bias))
        parameters = [other.flat.theta, weight, bias]
        velocity = [torch.zeros_like(p) for p in parameters]
        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            x = other.augmented(pixels, other.generator("augment", task.index, i))
            other.flat.zero_grad()
            logits = other.backbone(x) @ weight.T + bias
            loss = F.cross_entropy(logits[:, -2:], labels - 2 * task.index)
            weight.grad = bias.grad = None
            loss.backward()
            with torch.no_grad():
                for k, (p, lr, decay) in enumerate(zip(parameters, (0.01, 0.1, 0.1), (5e-4, 0, 0), strict=True)):
                    velocity[k] = 0.9 * velocity[k] + p.grad + decay * p
                    p -= (lr if i < 3 else 0.1 * lr) * velocity[k]
            phase.step(i)
        phase.finish()
        torch.testing.assert_close(learner.theta, other.theta, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(learner.head.weight, weight, rtol=1e-4, atol=1e-6)
        f = other.backbone(other.plain(images.images)).detach().double().numpy()
        for c in task.classes:
            own = f[images.labels.numpy() == c]
            stored.append((own.mean(0), np.cov(own.T), task.index))
        toy.work(method.merge(task, images, during))
        wanted = align(learner, weight.detach(), bias.detach(), stored, task.index) if task.index else (weight, bias)
        torch.testing.assert_close(learner.head.weight, wanted[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(learner.head.bias, wanted[1], rtol=1e-3, atol=1e-4)
        assert task.index == 0 or not torch.equal(learner.head.weight, method.unaligned["weight"])


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_phase_that_is_stopped_goes_on(stop):
    """In the pass, right after it, and in the alignment."""
    (one, first), (two, second), _ = toy.tasks()
    ends = []
    for stopped in (False, True):
        learner, method = made()
        for task, images in ((one, first), (two, second)):
            learner.grow_head(task, images)
            toy.work(method.train(task, images, method.begin(task)))
            phase = method.merge(task, images, {})
            for i in range(phase.steps):
                if stopped and task is two and i == stop:
                    parts = (learner.state_dict(), method.state_dict(), phase.tensors())
                    saved = [{k: v.clone() for k, v in x.items()} for x in parts]
                    learner, method = made()
                    learner.load_state_dict(saved[0])
                    method.load_state_dict(saved[1])
                    phase = method.merge(task, images, {})
                    phase.load(saved[2])
                phase.step(i)
            phase.finish()
        assert phase.steps == 3 + 2 * 4
        ends.append(learner.state_dict() | method.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name
