"""Compare RAPF with a plain loop, and its fusion with numpy's."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import toy

from fastmerge.config import Config
from fastmerge.errors import UserError
from fastmerge.methods.rapf import RAPF, fused

FLAGS = ("--clip=0", "--epochs=3", "--rapf.lr=0.05", "--rapf.samples=4", "--rapf.threshold=1.3")


def made(*flags):
    learner = toy.learner(*FLAGS, *flags)
    return learner, RAPF(learner)


def fusion(new, old, bias):
    """The released code's steps, in fp64."""
    u, s, vh = np.linalg.svd(old)
    p = u.T @ new
    q = np.diag(s) @ vh
    distance = np.abs(p - q)
    mask = np.minimum(distance / distance.max() + bias, 1)
    return u @ (p * mask + q * (1 - mask))


def test_the_fusion():
    g = np.random.default_rng(0)
    new, old = g.normal(size=(2, 6, 6))
    found = fused(torch.tensor(new), torch.tensor(old), 0.3)
    np.testing.assert_allclose(found, fusion(new, old, 0.3), atol=1e-12)
    torch.testing.assert_close(fused(torch.tensor(old), torch.tensor(old), 0.3), torch.tensor(old))


@pytest.mark.parametrize("shrink", [False, True])
def test_three_tasks_equal_a_plain_loop(shrink):
    learner, method = made(*["--rapf.shrink"] * shrink)
    texts = F.normalize(learner.head.weight, dim=1)
    a, stored, pairs_seen = method.adapter.weight.detach().clone(), [], 0
    for task, images in toy.tasks():
        t, k = task.index, len(stored)
        learner.grow_head(task, images)
        phase = method.train(task, images, during := method.begin(task))
        pairs = [(c, n) for c in range(k) for n in task.classes if (texts[c] - texts[n]).norm() < 1.3]
        pairs_seen += len(pairs)
        before = a.clone()
        a.requires_grad_()
        optimiser = torch.optim.Adam([a])
        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            f = learner.backbone(learner.augmented(pixels, learner.generator("augment", t, i))).detach()
            epoch, place = divmod(i, 3)
            x, y = [f], [labels]
            order = torch.randperm(k, generator=learner.generator("old classes", t, epoch)).tolist()
            if k:
                noise = torch.randn(2, 4, 5, generator=learner.generator("drawn", t, i))
                for j in range(2):  # two of at most four old classes
                    c = order[(2 * place + j) % k]
                    x.append(stored[c][0] + noise[j] @ stored[c][1])
                    y.append(torch.full((4,), c))
            x, y = torch.cat(x), torch.cat(y)
            logits = 3.0 * F.normalize(x @ a.T, dim=1) @ learner.head.weight[: 2 * t + 2].T
            loss = F.cross_entropy(logits, y)
            if pairs:
                noise = torch.randn(len(pairs), 8, 5, generator=learner.generator("near", t, i))
                hinges = []
                for j, (c, n) in enumerate(pairs):
                    z = F.normalize((stored[c][0] + noise[j] @ stored[c][1]) @ a.T, dim=1)
                    hinges += [torch.relu(z @ texts[n] - z @ texts[c] + 0.1)]
                loss = loss + torch.cat(hinges).mean()
            optimiser.param_groups[0]["lr"] = 0.05 * 0.1 ** ((epoch >= 0.8) + (epoch >= 2))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert float(phase.step(i)["loss"]) == pytest.approx(float(loss.detach()), rel=1e-3)
        phase.finish()
        torch.testing.assert_close(method.adapter.weight, a, rtol=1e-3, atol=1e-5)
        toy.work(method.merge(task, images, during))
        a = a.detach()
        if t:
            a = torch.tensor(fusion(a.double().numpy(), before.double().numpy(), 0.6)).float()
        torch.testing.assert_close(method.adapter.weight, a, rtol=1e-3, atol=1e-4)
        f = learner.backbone(learner.plain(images.images)).detach().double().numpy()
        for c in task.classes:
            own = f[images.labels.numpy() == c]
            covariance = np.cov(own.T) + 1e-4 * np.eye(5)
            if shrink:
                on, off = np.diag(covariance).mean(), covariance[~np.eye(5, dtype=bool)].mean()
                covariance = covariance + on * np.eye(5) + off * (1 - np.eye(5))
            stored.append((torch.tensor(own.mean(0)).float(), torch.tensor(scipy.linalg.sqrtm(covariance)).float()))
    assert pairs_seen > 1


def test_parts_of_a_batch_add_up():
    ends = []
    for flags in ((), ("--micro-batch=3",)):
        learner, method = made(*flags)
        toy.drive(learner, method)
        ends.append(method.adapter.weight.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)


def test_it_needs_texts():
    backbone = toy.Backbone()
    RAPF.check(Config(), backbone)
    config = Config()
    config.model.head = "linear"
    with pytest.raises(UserError, match="given: --head linear"):
        RAPF.check(config, backbone)
    backbone.family = "timm"
    with pytest.raises(UserError, match="a model with a text tower"):
        RAPF.check(Config(), backbone)
