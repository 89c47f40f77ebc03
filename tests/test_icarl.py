"""Compare iCaRL with a plain loop, and herding with the loop of the released code."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy

from fastmerge.__main__ import main
from fastmerge.data.rehearsal import Joined
from fastmerge.errors import UserError
from fastmerge.evaluate import accuracies
from fastmerge.exemplars import herd
from fastmerge.methods.icarl import ICaRL
from fastmerge.report import results_rows

FLAGS = ("--clip=0", "--icarl.exemplars=13", "--epochs=1", "--weight-decay=0")


def herding(features, m):
    """The loop of PILOT, which deletes what is chosen; returns rows."""
    mean, left, rows, chosen = features.mean(0), features.copy(), list(range(len(features))), []
    total = np.zeros(features.shape[1])
    for k in range(1, min(m, len(features)) + 1):
        i = int(np.argmin(np.sqrt(((mean - (left + total) / k) ** 2).sum(1))))
        total = total + left[i]
        chosen.append(rows.pop(i))
        left = np.delete(left, i, axis=0)
    return chosen


@pytest.mark.parametrize("m", [1, 5, 12, 20])
def test_herding(m):
    x = F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert herd(x, m).tolist() == herding(x.double().numpy(), m)


class Asked(toy.TaskImages):
    """Images that note what they are asked for."""

    planned = None

    def plan(self, order):
        self.planned = [part.tolist() for part in order]

    def batch(self, index):
        assert len(index)  # images in files cannot decode none
        return super().batch(index)


def test_joined_images():
    images = Asked(
        torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4), torch.tensor([5, 6, 7]), 2
    )
    kept = torch.arange(10, 12, dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    joined = Joined(images, kept, torch.tensor([8, 9]))
    assert (len(joined), joined.skipped, joined.labels.tolist()) == (5, 2, [5, 6, 7, 8, 9])
    joined.plan([torch.tensor([4, 1]), torch.tensor([3]), torch.tensor([0, 2])])
    assert images.planned == [[1], [0, 2]]
    for index, expected in (([4, 1], {9: 11, 6: 1}), ([3, 4], {8: 10, 9: 11}), ([0, 2], {5: 0, 7: 2})):
        pixels, labels = joined.batch(torch.tensor(index))
        assert dict(zip(labels.tolist(), pixels[:, 0, 0, 0].tolist(), strict=True)) == expected


def test_three_tasks_equal_a_plain_loop():
    learner, other = toy.learner(*FLAGS), toy.learner(*FLAGS)
    method, kept = ICaRL(learner), []  # kept: (class, images) in the order of their choice
    for task, images in toy.tasks():
        t = task.index
        learner.grow_head(task, images)
        teacher = other.flat.theta.detach().clone()
        phase = method.train(task, images, method.begin(task))
        joined = Joined(
            images,
            torch.cat([torch.zeros(0, 3, 4, 4, dtype=torch.uint8), *(pixels for _, pixels in kept)]),
            torch.tensor([c for c, pixels in kept for _ in pixels], dtype=torch.int64),
        )
        assert phase.steps == -(-len(joined) // 8)
        optimiser = torch.optim.AdamW([other.flat.theta], weight_decay=0)
        for i in range(phase.steps):
            pixels, labels = joined.batch(phase.batches.rows(i))
            x = other.augmented(pixels, other.generator("augment", t, i))
            loss = 0
            if t:
                now = other.flat.theta.detach().clone()
                other.theta.copy_(teacher)
                wanted = other.head(other.backbone(x), torch.arange(2 * t)).detach()
                other.theta.copy_(now)
            logits = other.head(other.backbone(x), torch.arange(2 * t + 2))
            loss = F.cross_entropy(logits, labels)
            if t:  # PILOT's sum over the old classes
                p, q = (wanted / 2).softmax(1), (logits[:, : 2 * t] / 2).log_softmax(1)
                loss = loss - (p * q).sum() / len(q)
            other.flat.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + np.cos(np.pi * i / phase.steps))
            optimiser.step()
            phase.step(i)
        phase.finish()
        torch.testing.assert_close(learner.theta, other.theta, rtol=1e-3, atol=1e-5)
        toy.work(method.merge(task, images, {}))
        each = 13 // (2 * t + 2)
        kept = [(c, pixels[:each]) for c, pixels in kept]
        f = F.normalize(learner.backbone(learner.plain(images.images)).detach(), dim=1).double().numpy()
        for c in task.classes:
            rows = np.flatnonzero(images.labels.numpy() == c)
            kept.append((c, images.images[rows[herding(f[rows], each)]]))
        assert torch.equal(method.kept.exemplars, torch.cat([pixels for _, pixels in kept]))
        assert method.kept.labels.tolist() == [c for c, pixels in kept for _ in pixels]
        assert len(method.kept.exemplars) <= 13 and method.known.tolist() == list(range(2 * t + 2))
    # the nearest mean of the exemplars, in numpy
    (name, features), *_ = method.also_evaluated().items()
    f = F.normalize(learner.backbone(learner.plain(images.images)).detach(), dim=1).double().numpy()
    means = []
    for _, pixels in kept:
        mean = F.normalize(learner.backbone(learner.plain(pixels)).detach(), dim=1).double().numpy().mean(0)
        means.append(mean / np.linalg.norm(mean))
    nearest = ((f[:, None] - np.stack(means)) ** 2).sum(-1).argmin(1)
    wanted = 100 * (nearest == images.labels.numpy()).mean()
    assert name == "nearest mean of exemplars"
    assert accuracies(learner, [images], range(6), features=features) == [pytest.approx(wanted)]


def test_too_few_exemplars():
    learner = toy.learner("--icarl.exemplars=3", "--epochs=1")
    with pytest.raises(UserError, match="task 2: --icarl.exemplars 3 is less than one image for each of 4 pairs"):
        toy.drive(learner, ICaRL(learner))


@pytest.mark.parametrize("name", ["icarl", "proof"])
def test_too_few_exemplars_for_a_later_task_are_refused_before_training(name, tmp_path, capsys):
    flags = ["--method", f"{name}:exemplars=20", "--tasks", "3", "--device", "cpu", "--run-dir", str(tmp_path / "r")]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert re.search(rf"task 2.*: --{name}.exemplars 20 is less than one image for each of \d+ pairs", said)
    assert not (tmp_path / "r").exists()


def test_the_table_says_what_keeps_images():
    result = {"seconds": {"train": 1, "merge": 1}, "peak_memory_bytes": 1, "kept_bytes": [2**20, 2**20]}
    result |= {"final_accuracy": 1.0, "aaa": 1.0, "forgetting": 0.0, "plasticity": 1.0}
    methods = {"icarl": {"0": result | {"keeps_images": True}}, "trm": {"0": result}}
    rows = results_rows(methods, None)
    kept = rows[0].index("kept")
    assert [row[kept] for row in rows[1:]] == ["1.0 MiB with images", "1.0 MiB"]
