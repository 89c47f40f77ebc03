"""Compare InfLoRA with plain loops and numpy, and DualGPM with a memory that always stores the whole old space."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy

from fastmerge.__main__ import main
from fastmerge.loop import kept_bytes
from fastmerge.methods.dual_gpm import grown
from fastmerge.methods.inflora import InfLoRA
from fastmerge.training import learning_rate, positions

FLAGS = ("--clip=0", "--inflora.rank=2", "--inflora.lamb=0.6", "--inflora.lr=0.02", "--inflora.tasks=4")


def energy(matrix):
    return (np.linalg.svd(matrix)[1] ** 2).sum()


def whole_space(basis, moment, threshold):
    """Append directions of the moment outside the basis until the share of fourth powers inside reaches the threshold."""
    if basis is None:
        left, values, _ = np.linalg.svd(moment)
        r = max(1, int(np.sum(np.cumsum(values**2) / energy(moment) < threshold)))
        return left[:, :r]
    left, values, _ = np.linalg.svd(moment - basis @ basis.T @ moment)
    inside, r = 1 - energy(moment - basis @ basis.T @ moment) / energy(moment), 0
    while r < len(values) and inside < threshold:
        inside += values[r] ** 2 / energy(moment)
        r += 1
    return np.hstack([basis, left[:, :r]])


def test_three_tasks_equal_plain_loops():
    learner = toy.learner(*FLAGS)
    method = InfLoRA(learner)
    weight = learner.backbone.attn.qkv.weight
    basis = None
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        start = weight.detach().clone()
        x = learner.plain(images.images).flatten(1).double().numpy()
        moment = x.T @ x / len(x)
        free = moment if basis is None else moment - basis @ basis.T @ moment
        down = torch.from_numpy(np.linalg.svd(free)[0][:, :2].T / np.sqrt(3)).float()
        ups = [torch.zeros(7, 2, requires_grad=True) for _ in range(2)]  # of key and value
        phase = method.train(task, images, method.begin(task))
        optimiser = torch.optim.Adam(ups)
        assert phase.steps == 3 * 3  # the pass and two epochs
        for i in range(phase.steps):
            if i >= 3:
                pixels, labels = images.batch(phase.batches.rows(i))
                pixels = learner.augmented(pixels, learner.generator("augment", task.index, i))
                with torch.no_grad():
                    flat = pixels.flatten(1)
                moved = start + torch.cat([torch.zeros(7, 48), *(u @ down for u in ups)])
                query, key, value = (flat @ w.mT for w in moved.chunk(3))
                bias = learner.backbone.attn.qkv.bias.detach().chunk(3)
                mixed = query + bias[0] + torch.tanh(key + bias[1]) * (value + bias[2])
                features = learner.backbone.outer(torch.tanh(learner.backbone.inner(flat)) + mixed)
                optimiser.param_groups[0]["lr"] = learning_rate(0.02, i - 3, 6)
                optimiser.zero_grad()
                F.cross_entropy(learner.head(features, phase.classes), positions(labels, phase.classes)).backward()
                optimiser.step()
            phase.step(i)
        phase.finish()
        expected = start + torch.cat([torch.zeros(7, 48), *(u.detach() @ down for u in ups)])
        assert (expected - start).abs().max() > 1e-2
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-3, atol=1e-4)
        toy.work(method.merge(task, images, {}))
        basis = whole_space(basis, moment, 0.6 + 0.4 * task.index / 4)
        mine = method.memory["attn.qkv.weight"]
        projector = (mine.basis @ mine.basis.mT).double().numpy()
        assert not mine.retain and mine.basis.shape == basis.shape
        np.testing.assert_allclose(projector, basis @ basis.T, atol=1e-4)
    assert basis.shape[1] > 2


@pytest.mark.parametrize("threshold", [0.9, 0.99])
def test_the_memory_keeps_the_smaller_half(threshold):
    """Whether it holds the old space or its complement, it frees the same part of a moment."""
    generator, d = np.random.default_rng(0), 12
    memory = basis = None
    kinds = []
    for t in range(8):
        x = generator.standard_normal((5, d)) * (1 + np.arange(5))[:, None]
        moment, limit = x.T @ x, min(threshold + t / 1000, 0.9999)
        memory, basis = grown(memory, torch.from_numpy(moment), limit), whole_space(basis, moment, limit)
        assert memory.basis.shape[1] <= d / 2
        torch.testing.assert_close(memory.basis.mT @ memory.basis, torch.eye(memory.basis.shape[1]), atol=1e-5, rtol=0)
        probe = generator.standard_normal((d, d))
        expected = probe - basis @ (basis.T @ probe)
        np.testing.assert_allclose(memory.free(torch.from_numpy(probe)).numpy(), expected, atol=2e-4)
        kinds.append(memory.retain)
    assert kinds[0] is False and kinds[-1] is True  # it switched on the way


def test_state_comes_back_in_the_pass_and_in_the_training():
    for stop in (1, 4):
        learner = toy.learner(*FLAGS)
        method, (task, images) = InfLoRA(learner), toy.tasks()[0]
        learner.grow_head(task, images)
        phase = method.train(task, images, {})
        for i in range(stop):
            phase.step(i)
        saved = {k: v.clone() for k, v in phase.tensors().items()}
        other = toy.learner(*FLAGS)
        again = InfLoRA(other).train(task, images, {})
        again.load(saved)
        for i in range(stop, phase.steps):
            phase.step(i)
            again.step(i)
        phase.finish()
        again.finish()
        assert torch.equal(learner.theta, other.theta)


def test_kept_bytes_are_the_bases():
    learner = toy.learner(*FLAGS)
    method = InfLoRA(learner)
    assert method.state_dict() == {}
    before = kept_bytes(learner, method)
    toy.drive(learner, method)
    (memory,) = method.memory.values()
    assert kept_bytes(learner, method) - before == memory.basis.nbytes + 1


def test_refusals(capsys):
    for flags, says in (
        (["--inflora.rank", "200"], "--inflora.rank 200: .*at most 128"),
        (["--lora-rank", "2"], "inflora does not read it"),
    ):
        assert main(["--method", "inflora", "--dry-run", "--run-dir", "nowhere", *flags]) == 2
        assert re.search(says, " ".join(capsys.readouterr().err.split()))
