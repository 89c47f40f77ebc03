"""AttriCLIP: compared with a loop over the images, and its head with a search by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import toy

from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.methods.attriclip import AttriCLIP, distinct
from fastmerge.models.heads import AttributeHead, TextHead
from fastmerge.models.text_context import NAMELESS

FLAGS = ("--attriclip.bank=4", "--attriclip.top=2", "--attriclip.tokens=3", "--attriclip.lr=0.1", "--clip=0")


def chosen(feature, keys):
    """The two nearest keys, in the order of the bank."""
    near = torch.stack([feature @ key / key.norm() for key in keys])
    return sorted(near.argsort(descending=True)[:2].tolist())


def image_rows(text, prompts, own, classes):
    return text.rows(torch.cat([prompts[j] for j in own]), classes)


def by_hand(learner, feature, label, classes, keys, prompts):
    """The loss of one image with normalised features."""
    own = chosen(feature, keys.detach())
    logits = 3.0 * image_rows(learner.text, prompts, own, classes) @ feature
    main = -logits.log_softmax(0)[(classes == label).nonzero().item()]
    distance = sum(1 - feature @ keys[j] / keys[j].norm() for j in own) / 2
    nameless = [learner.text.rows(p, torch.tensor([NAMELESS]))[0] for p in prompts]
    pairs = [(a @ b).abs() for a, b in itertools.permutations(nameless, 2)]
    return main + 0.7 * distance + 0.3 * sum(pairs) / len(pairs)


@pytest.mark.parametrize("flags", [(), ("--micro-batch=3",)])
def test_two_tasks_equal_a_loop_over_the_images(flags):
    learner = toy.learner(*FLAGS, *flags)
    method = AttriCLIP(learner)
    keys, prompts = (p.detach().clone().requires_grad_() for p in (method.context.keys, method.context.prompts))
    start, sets = prompts.detach().clone(), set()
    for task, images in toy.tasks()[:2]:
        learner.grow_head(task, images)
        phase = method.train(task, images, method.begin(task))
        classes = torch.tensor(task.classes)
        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            x = learner.augmented(pixels, learner.generator("augment", task.index, i))
            features = F.normalize(learner.backbone(x).detach(), dim=1)
            sets |= {tuple(chosen(f, keys.detach())) for f in features}
            losses = [by_hand(learner, f, y, classes, keys, prompts) for f, y in zip(features, labels, strict=True)]
            gradients = torch.autograd.grad(sum(losses) / len(losses), (keys, prompts))
            rate = 0.1 * 8 / 20 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / phase.steps)))
            with torch.no_grad():
                for p, g in zip((keys, prompts), gradients, strict=True):
                    p.sub_(rate * g)
            phase.step(i)
        phase.finish()
        torch.testing.assert_close(method.context.keys.detach(), keys.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(method.context.prompts.detach(), prompts.detach(), rtol=1e-3, atol=1e-5)
    assert len(sets) > 1 and (prompts - start).abs().max() > 1e-3
    images = learner.plain(toy.tasks()[0][1].images)
    features, classes = learner.backbone(images).detach(), torch.tensor([3, 0, 1])
    expected = torch.stack(
        [
            3.0 * image_rows(learner.text, prompts, chosen(f, keys.detach()), classes) @ f
            for f in F.normalize(features, dim=1)
        ]
    )
    found = learner.head(features, classes)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4)
    alone = torch.cat([learner.head(f[None], classes) for f in features])  # no image depends on another
    torch.testing.assert_close(alone, found)


def test_distinct_values():
    numbers = torch.tensor([5, 2, 2, 0, 5])
    wanted = torch.unique(numbers, return_inverse=True)
    assert all(torch.equal(a, b) for a, b in zip(distinct(numbers, 7), wanted, strict=True))


def test_the_head_comes_back_from_its_state():
    torch.manual_seed(0)
    head = AttributeHead(torch.randn(6, 5), 3.0, 4, 2)
    assert head.table.shape == (6, 6, 5) and head.members.sum(1).tolist() == [2] * 6
    for tensor in (head.keys, head.table):
        tensor.normal_()
    features, classes = torch.randn(7, 5), torch.tensor([5, 2])
    again = AttributeHead.of({name: t.clone() for name, t in head.state_dict().items()})
    assert torch.equal(again(features, classes), head(features, classes))
    wider = AttributeHead(torch.randn(8, 5), 3.0, 4, 2)
    wider.adopt(head.state_dict())  # as in a run that continues another
    assert torch.equal(wider(features, classes), head(features, classes))
    assert not torch.equal(TextHead(head.weight, 3.0)(features, classes), head(features, classes))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attriclip.top=11"], "--attriclip.top 11: the bank has 10 attributes"),
        (["--attriclip.bank=20", "--attriclip.top=5"], "15504 sets of attributes.*at most 1000"),
    ],
)
def test_what_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        AttriCLIP.check(parse(["--method", "attriclip", *flags]), toy.Backbone())
