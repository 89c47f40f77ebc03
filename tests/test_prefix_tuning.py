"""`--prompt-length`: prefixes are all that is trained, and merge rules merge them."""

import pytest
import torch
import torch.nn.functional as F
import toy

from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.loop import kept_bytes
from fastmerge.methods import METHODS
from fastmerge.methods.finetune import Finetune
from fastmerge.models.heads import PrototypeHead
from fastmerge.models.prompts import Prompt
from fastmerge.plan import read_method
from fastmerge.training import Train, learning_rate, positions

FLAGS = ("--prompt-length=3", "--epochs=1", "--clip=0", "--lr=0.05", "--protocol", "full")


def learner(*flags, head="text"):
    return toy.learner(*FLAGS, *flags, method="l2p", head=head)


def with_prefix(backbone, images, prefix):
    """The features, where `prefix` is `[2, 3, 5]` for each block."""
    return backbone.prompted(images, Prompt({i: (own[:1], own[1:]) for i, own in enumerate(prefix)}))


def test_averaged_prefixes_equal_a_plain_loop(tmp_path):
    made = learner()
    method = METHODS["average"].build(made, toy.nowhere(tmp_path), "full")
    weights = {k: v.clone() for k, v in made.backbone.state_dict().items() if not k.startswith("prefix")}
    prefix = [x.detach().clone().requires_grad_() for x in made.backbone.prefix]
    assert [tuple(x.shape) for x in prefix] == [(2, 3, 5)] * 4 and sum(made.flat.sizes) == 4 * 2 * 3 * 5
    seen = []
    for task, images in toy.tasks():
        made.grow_head(task, images)
        phase = method.train(task, images, method.begin(task))
        optimiser = torch.optim.AdamW(prefix, weight_decay=0.1)
        for i in range(phase.steps):
            pixels, labels = images.batch(phase.batches.rows(i))
            x = made.augmented(pixels, made.generator("augment", task.index, i))
            logits = made.head(with_prefix(made.backbone, x, prefix), phase.classes)
            optimiser.param_groups[0]["lr"] = learning_rate(0.05, i, phase.steps)
            optimiser.zero_grad()
            F.cross_entropy(logits, positions(labels, phase.classes)).backward()
            optimiser.step()
            phase.step(i)
        phase.finish()
        toy.work(method.merge(task, images, {}))
        seen.append([x.detach().clone() for x in prefix])
        merged = [torch.stack(parts).mean(0) for parts in zip(*seen, strict=True)]
        for own, expected in zip(made.backbone.prefix, merged, strict=True):
            torch.testing.assert_close(own.detach(), expected, rtol=1e-3, atol=1e-5)
        x = made.plain(images.images)
        torch.testing.assert_close(method.features()(x), with_prefix(made.backbone, x, merged), rtol=1e-3, atol=1e-4)
    assert (seen[2][0] - seen[0][0]).abs().max() > 0.01
    for name, value in weights.items():
        assert torch.equal(made.backbone.state_dict()[name], value), name
    frozen = sum(v.nbytes for v in weights.values())
    assert kept_bytes(made, method) >= frozen + made.theta.nbytes
    assert made.flat.gradient.numel() == made.theta.numel() == 1024  # no gradient of the weights


def test_the_fisher_of_a_prefix():
    """Against the squares of the gradients of single images."""
    made, (task, images) = learner("--fisher.labels=data"), toy.tasks()[0]
    made.grow_head(task, images)
    found = FisherPass(made, task, images)
    toy.work(found)
    expected = torch.zeros_like(made.theta)
    for image, label in zip(made.plain(images.images), images.labels, strict=True):
        made.flat.zero_grad()
        logits = made.head(made.backbone(image[None]), found.classes)
        F.cross_entropy(logits, positions(label[None], found.classes)).backward()
        expected += made.flat.gradient.square() / len(images)
    torch.testing.assert_close(found.result(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "name", [name for name, kind in METHODS.items() if kind.lora and kind.trains and not kind.joint]
)
def test_methods_move_prefixes_alone(name, tmp_path):
    made = learner("--pam.rank=0", "--merge-epochs=1")
    made.head = toy.head(METHODS[name].head, made.head)
    METHODS[name].check(made.config, made.backbone)
    method = METHODS[name].build(made, toy.nowhere(tmp_path), METHODS[name].protocols(made.config)[0])
    before = {k: v.clone() for k, v in made.backbone.state_dict().items()}
    toy.drive(made, method)
    moved = {name for name, value in made.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("prefix") for name in moved)


def test_the_start_depends_on_the_seed_alone():
    first, again = learner(), learner()
    assert torch.equal(first.theta, again.theta) and first.theta.any()
    other = toy.learner(*FLAGS, method="l2p", seed=1)
    assert not torch.equal(other.theta, first.theta)
    assert 0.01 < first.theta[: 4 * 32].std() < 0.03


def test_prototypes_are_of_the_start_without_a_prefix():
    """Neither the random prefix nor the trained one changes them."""
    made, plain = learner(), toy.learner(method="l2p")
    made.head, plain.head = (PrototypeHead(5, toy.CLASSES) for _ in range(2))
    for task, images in toy.tasks():
        for each in (made, plain):
            each.grow_head(task, images)
        made.theta.add_(1.0)
    assert plain.head.sum.any() and torch.equal(made.head.sum, plain.head.sum)
    assert "initial" not in made.state_dict()  # the weights stay as they are


def test_checkpointed_blocks_have_the_same_gradient(tmp_path):
    results = []
    for flags in ((), ("--checkpoint-gradients",)):
        made, (task, images) = learner(*flags), toy.tasks()[0]
        made.grow_head(task, images)
        phase = Train(made, task, images)
        phase.step(0)
        results.append(phase.gradient.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("spec", "flags", "message"),
    [
        ("cmm", ["--prompt-length=2"], "--prompt-length: cmm does not train prefixes; omit it, or remove cmm from"),
        ("average:lora_rank=2", ["--prompt-length=2"], "--prompt-length and --lora-rank: each says what is trained"),
    ],
)
def test_refused(spec, flags, message):
    with pytest.raises(UserError, match=message):
        read_method(spec, toy.parse(["--model=tiny", *flags]))
    _, config = read_method("average:prompt_length=4,lr=0.01", toy.parse(["--model=tiny"]))
    assert (config.training.prompt_length, config.training.lr) == (4, 0.01)
    with pytest.raises(UserError, match="--pam.rank 10: with --prompt-length prefixes are trained; give --pam.rank 0"):
        METHODS["pam"].check(config, toy.learner(method="l2p").backbone)
    with pytest.raises(UserError, match="has no transformer blocks with a class token, which prompts need"):
        backbone = toy.learner(method="l2p").backbone
        backbone.width = 0
        Finetune.check(config, backbone)
