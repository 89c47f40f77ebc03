"""Compare SD-LoRA with plain loops over products, and its least squares with those of the whole matrices."""

import pytest
import torch
import torch.nn.functional as F
import toy
from test_methods import one_task

from fastmerge.errors import UserError
from fastmerge.methods.sdlora import SDLoRA
from fastmerge.models.directions import Directions
from fastmerge.training import positions

FLAGS = ("--clip=0", "--sdlora.rank=2", "--sdlora.lr=0.1", "--lr=1")
ROWS, COLUMNS = 7, 48  # of query, key and value in the toy model


def features(backbone, flat, weights):
    query, key, value = (
        flat @ w.mT + b for w, b in zip(weights, backbone.attn.qkv.bias.detach().chunk(3), strict=True)
    )
    return backbone.outer(torch.tanh(backbone.inner(flat)) + query + torch.tanh(key) * value)


def test_three_tasks_equal_plain_loops():
    learner = toy.learner(*FLAGS)
    method = SDLoRA(learner)
    qkv = learner.backbone.attn.qkv.weight
    start = qkv.detach().clone().chunk(3)
    old = [[], []]  # of query and of value: (direction of norm 1, magnitude)
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        phase = method.train(task, images, method.begin(task))
        drawn = [(d.detach().clone(), u.detach().clone()) for d, u, _, _ in phase.trainable.pieces()]
        downs, ups = ([x[k].requires_grad_() for x in drawn] for k in (0, 1))
        alphas = [torch.tensor(0.8, requires_grad=True) for _ in range(2)]
        magnitudes = [[m.clone().requires_grad_() for _, m in kept] for kept in old]
        optimiser = torch.optim.SGD([*downs, *ups, *alphas, *magnitudes[0], *magnitudes[1]], lr=0.1, momentum=0.9)

        def weights(k, base, downs=downs, ups=ups, alphas=alphas, magnitudes=magnitudes):
            moved = base + alphas[k] * (ups[k] @ downs[k])
            for (direction, _), m in zip(old[k], magnitudes[k], strict=True):
                moved = moved + m * direction
            return moved

        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            flat = learner.augmented(pixels, learner.generator("augment", task.index, i)).flatten(1)
            logits = learner.head(
                features(learner.backbone, flat, [weights(0, start[0]), start[1], weights(1, start[2])]), phase.classes
            )
            optimiser.zero_grad()
            F.cross_entropy(logits, positions(labels, phase.classes)).backward()
            optimiser.step()
            phase.step(i)
        phase.finish()
        expected = torch.cat([weights(0, start[0]), start[1], weights(1, start[2])]).detach()
        assert (expected - torch.cat(start)).abs().max() > 1e-2
        torch.testing.assert_close(qkv.detach(), expected, rtol=1e-3, atol=1e-4)
        for k in range(2):
            update = (ups[k] @ downs[k]).detach()
            old[k] = [(d, m.detach()) for (d, _), m in zip(old[k], magnitudes[k], strict=True)]
            old[k].append((update / update.norm(), alphas[k].detach() * update.norm()))
    for own, kept in zip(method.kept, old, strict=True):
        for (up, down), (direction, _) in zip(own.factors(), kept, strict=True):
            torch.testing.assert_close((up @ down).float(), direction, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.magnitudes, torch.stack([m for _, m in kept]), rtol=1e-3, atol=1e-4)


def test_the_model_does_not_jump_between_tasks():
    """Before the first step of a task, all magnitudes being where they were, the model is that of the last task."""
    learner = toy.learner(*FLAGS)
    method, (first, second, _) = SDLoRA(learner), toy.tasks()
    one_task(learner, method, *first)
    before = learner.theta.clone()
    learner.grow_head(*second)
    phase = method.train(*second, {})
    phase.trainable.fold()
    torch.testing.assert_close(learner.theta, before, rtol=0, atol=1e-6)
    assert not torch.equal(method.initial, phase.trainable.gather(before))


def test_rank_reduction():
    learner = toy.learner("--sdlora.variant=rr", "--sdlora.rank=5")
    method, (task, images) = SDLoRA(learner), toy.tasks()[0]
    ranks = []
    for t in range(10):
        later = type(task)(t, task.name, task.classes, task.train, task.test)
        ranks.append(method.train(later, images, {}).trainable.rank)
    assert ranks == [5] * 4 + [4] * 4 + [3] * 2


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_a_direction_that_the_old_ones_express_is_not_kept(noise):
    """Oracle: least squares of the whole matrices in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    kept = Directions(torch.zeros(0, COLUMNS), torch.zeros(ROWS, 0), torch.zeros(0))
    downs = draw(2, COLUMNS)
    ups = [draw(ROWS, 2) for _ in range(2)]
    for up in ups:
        kept.add(up, downs, 0.7, 9e-4)
    assert kept.ranks == [2, 2]  # the second is no multiple of the first
    before = [u @ d for u, d in kept.factors()]
    torch.testing.assert_close(torch.stack([d.norm() for d in before]), torch.ones(2).double())
    up = 0.5 * ups[0] - 2 * ups[1] + noise * draw(ROWS, 2)
    new = (up @ downs).double()
    basis = torch.stack([d.flatten() for d in before], 1)
    fit = torch.linalg.lstsq(basis, new.flatten()[:, None] / new.norm()).solution[:, 0]
    residual = (basis @ fit - new.flatten() / new.norm()).square().sum()
    magnitudes = kept.magnitudes.double()
    kept.add(up, downs, 1.5, 9e-4)
    if residual <= 9e-4:
        assert noise <= 0.02 and kept.ranks == [2, 2]
        torch.testing.assert_close(kept.magnitudes.double(), magnitudes + 1.5 * new.norm() * fit, rtol=1e-4, atol=1e-4)
    else:
        assert noise == 0.5 and kept.ranks == [2, 2, 2]
        torch.testing.assert_close(kept.magnitudes[-1].double(), 1.5 * new.norm(), rtol=1e-5, atol=0)
    kept.add(0 * up, downs, 1.5, 9e-4)
    assert len(kept.ranks) == len(kept.magnitudes)  # a zero update adds nothing


def test_kept_bytes_grow_with_the_tasks():
    learner = toy.learner(*FLAGS)
    method, sizes = SDLoRA(learner), []
    for task, images in toy.tasks():
        one_task(learner, method, task, images)
        sizes.append(sum(t.nbytes for t in method.state_dict().values()))
    direction = 2 * (2 * (ROWS + COLUMNS) * 4 + 4 + 8)  # factors, magnitude, rank; of query and value
    assert sizes == [2 * ROWS * COLUMNS * 4 + t * direction for t in (1, 2, 3)]


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="--sdlora.rank 8: attn.qkv.weight is 7 x 48"):
        SDLoRA.check(toy.parse(["--sdlora.rank=8"]), toy.Backbone())
