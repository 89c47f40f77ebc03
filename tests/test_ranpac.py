"""Compare RanPAC with numpy's least squares on all features at once, and its choice of lambda with the released loop."""

import numpy as np
import pytest
import torch
import toy

from fastmerge.errors import UserError
from fastmerge.methods.ranpac import RIDGES, RanPAC, chosen, solved
from fastmerge.models.heads import LinearHead


def made(*flags):
    learner = toy.learner(*flags, head="linear")
    return learner, RanPAC(learner)


def features(learner, method, images):
    """Random features in fp64, and one-hot targets over all classes."""
    f = learner.backbone(learner.plain(images.images)).detach().double().numpy()
    return np.maximum(f @ method.projection.double().numpy(), 0), np.eye(toy.CLASSES)[images.labels.numpy()]


def released(h, y):
    """The lambda that the released code chooses, from the features themselves."""
    n = int(0.8 * len(h))
    errors = []
    for ridge in RIDGES:
        w = np.linalg.solve(h[:n].T @ h[:n] + ridge * np.eye(h.shape[1]), h[:n].T @ y[:n])
        errors.append(((h[n:] @ w - y[n:]) ** 2).mean())
    return RIDGES[int(np.argmin(errors))]


def test_three_tasks_equal_least_squares_on_all_images():
    learner, method = made("--ranpac.projection=30")
    seen, ridges = [], []
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        phase = method.merge(task, images, {})
        order = torch.cat([phase.batches.rows(i) for i in range(phase.batches.steps)])
        h, y = features(learner, method, images)
        seen.append((h, y))
        ridges.append(released(h[order], y[order]))
        for i in range(phase.steps):
            terms = phase.step(i)
        phase.finish()
        assert float(terms["ridge"]) == pytest.approx(ridges[-1])
        every, targets = (np.concatenate(part) for part in zip(*seen, strict=True))
        # ridge regression as least squares with rows sqrt(lambda) I below
        rows = np.concatenate([every, np.sqrt(ridges[-1]) * np.eye(30)])
        wanted = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((30, toy.CLASSES))]), rcond=None)[0]
        logits = learner.head(method.features()(learner.plain(images.images)), torch.arange(2 * task.index + 2))
        np.testing.assert_allclose(logits.detach(), (h @ wanted)[:, : 2 * task.index + 2], atol=2e-4)
    assert len(set(ridges)) > 1 or ridges[0] not in (RIDGES[0], RIDGES[-1])  # a choice was made


def test_the_error_of_lambda_needs_no_features():
    """In fp64, with fewer images than features, where small lambdas fit the first part exactly."""
    g = np.random.default_rng(0)
    h = np.maximum(g.normal(size=(50, 80)), 0)
    y = np.eye(4)[np.argmax(h[:, :4] + g.normal(size=(50, 4)), axis=1)]
    gram = torch.tensor(np.stack([h[:40].T @ h[:40], h[40:].T @ h[40:]]))
    targets = torch.tensor(np.stack([y[:40].T @ h[:40], y[40:].T @ h[40:]]))
    before = gram.clone()
    assert chosen(gram, targets) == released(h, y)
    assert torch.equal(gram, before)
    assert solved(-gram[0], targets[0], 1.0) is None


def test_rows_keep_their_place_if_a_class_returns():
    """As in a domain-incremental run: the sums of the same rows go on."""
    learner, method = made()
    (task, images), _, _ = toy.tasks()
    for _ in range(2):
        learner.grow_head(task, images)
        toy.work(method.merge(task, images, {}))
    once = made()[1]
    once.learner.grow_head(task, images)
    toy.work(once.merge(task, images, {}))
    torch.testing.assert_close(method.gram, 2 * once.gram)
    torch.testing.assert_close(method.targets, 2 * once.targets)


def test_a_pass_that_is_stopped_goes_on():
    whole, parts = made()[1], made()[1]
    (task, images), *_ = toy.tasks()
    for method in (whole, parts):
        method.learner.grow_head(task, images)
    toy.work(whole.merge(task, images, {}))
    first = parts.merge(task, images, {})
    first.step(0)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    again = parts.merge(task, images, {})
    again.load(saved)
    for i in range(1, again.steps):
        again.step(i)
    assert torch.equal(parts.gram, whole.gram) and torch.equal(parts.targets, whole.targets)
    assert torch.equal(parts.learner.head.weight, whole.learner.head.weight)


def test_a_head_takes_its_width_from_its_state():
    learner, method = made("--ranpac.projection=7")
    task, images = toy.tasks()[0]
    learner.grow_head(task, images)
    toy.work(method.merge(task, images, {}))
    other = LinearHead(5, toy.CLASSES)
    other.load_state_dict(learner.head.state_dict())
    assert other.weight.shape == (2, 7) and torch.equal(other.weight, learner.head.weight)


def test_features_that_overflow():
    learner, method = made()
    task, images = toy.tasks()[0]
    learner.grow_head(task, images)
    method.projection.fill_(1e30)
    with pytest.raises(UserError, match="Gram matrix of the random features is not finite"):
        toy.work(method.merge(task, images, {}))
