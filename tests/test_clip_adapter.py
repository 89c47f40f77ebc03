"""Compare CLIP-Adapter with its formula and a plain training loop; the backbone is frozen."""

import pytest
import torch
import torch.nn.functional as F
import toy

from fastmerge.checkpoint import resident
from fastmerge.loop import kept_bytes
from fastmerge.methods.clip_adapter import CLIPAdapter
from fastmerge.models.features import restore
from fastmerge.training import learning_rate, positions

FLAGS = ("--clip=0", "--clip-adapter.lr=0.05", "--clip-adapter.ratio=0.3", "--clip-adapter.reduction=2")


def formula(f, reduce, restore):
    """Compute the visual branch of section 3.2."""
    return 0.3 * torch.relu(torch.relu(f @ reduce.T) @ restore.T) + 0.7 * f


def test_two_tasks_equal_a_plain_loop():
    learner = toy.learner(*FLAGS)
    method, start = CLIPAdapter(learner), learner.theta.clone()
    weights = [w.detach().clone().requires_grad_() for w in (method.adapter.reduce, method.adapter.restore)]
    assert weights[0].shape == (2, 5) and weights[1].shape == (5, 2)
    for task, images in toy.tasks()[:2]:
        learner.grow_head(task, images)
        phase = method.train(task, images, method.begin(task))
        optimiser = torch.optim.Adam(weights)
        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            x = learner.augmented(pixels, learner.generator("augment", task.index, i))
            logits = learner.head(formula(learner.backbone(x).detach(), *weights), phase.classes)
            optimiser.param_groups[0]["lr"] = learning_rate(0.05, i, phase.steps)
            optimiser.zero_grad()
            F.cross_entropy(logits, positions(labels, phase.classes)).backward()
            optimiser.step()
            phase.step(i)
        phase.finish()
        torch.testing.assert_close(method.adapter.reduce, weights[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(method.adapter.restore, weights[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(learner.theta, start) and not learner.flat.gradient.any()  # the backbone is frozen


def test_what_it_keeps_is_the_adapter():
    learner = toy.learner(*FLAGS)
    method = CLIPAdapter(learner)
    toy.drive(learner, method)
    assert set(method.state_dict()) == {"adapter"}
    model = resident(learner.state_dict())
    assert kept_bytes(learner, method) == model + 4 * method.beside.theta.numel() > model
    x = learner.plain(toy.tasks()[0][1].images)
    features = method.features()
    saved = restore(features.kind, learner.backbone, {k: v.clone() for k, v in features.tensors.items()})
    assert torch.equal(saved(x), features(x)) and not torch.equal(features(x), learner.backbone(x))


@pytest.mark.parametrize("head", ["text", "linear"])
def test_state_comes_back_in_the_middle_of_a_task(head):
    learner = toy.learner(*FLAGS, head=head)
    method, (task, images) = CLIPAdapter(learner), toy.tasks()[0]
    learner.grow_head(task, images)
    phase = method.train(task, images, {})
    phase.step(0)
    saved = [{k: v.clone() for k, v in x.items()} for x in (method.state_dict(), learner.state_dict(), phase.tensors())]
    for i in range(1, phase.steps):
        phase.step(i)
    other = toy.learner(*FLAGS, head=head)
    other.load_state_dict(saved[1])
    again = CLIPAdapter(other)
    again.load_state_dict(saved[0])
    resumed = again.train(task, images, {})
    resumed.load(saved[2])
    for i in range(1, resumed.steps):
        resumed.step(i)
    assert torch.equal(again.beside.theta, method.beside.theta)
    assert all(torch.equal(a, b) for a, b in zip(other.head.parameters(), learner.head.parameters(), strict=True))
