"""MaPLe: compared with both towers written out by hand, a step at a time, and with the text of its first words."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from test_text_context import CPU, NAMES, encoder, words

from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.methods.maple import MaPLe
from fastmerge.models import load_backbone, tiny
from fastmerge.models.heads import TextHead
from fastmerge.models.text_context import ClassPrompts
from fastmerge.training import Learner

FLAGS = ("--model=tiny", "--epochs=2", "--batch-size=3", "--device=cpu", "--clip=0", "--maple.lr=0.05")


def block_by_hand(block, x, mask=None):
    attention, y = block.attn, block.ln_1(x)
    mixed = F.linear(y, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = mixed.unflatten(2, (3, attention.num_heads, -1)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    x = x + attention.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
    return x + block.mlp(block.ln_2(x))


def row_by_hand(clip, name, vectors):
    """The normalised row of one class. vectors: of the first blocks. The prompt is "a photo of a NAME."."""
    tokens = tiny.tokenize([f"a photo of a {name}."])
    x = clip.token_embedding(tokens).detach().clone()
    for i, block in enumerate(clip.transformer.resblocks):
        if i < len(vectors):
            x = torch.cat([x[:, :1], vectors[i][None], x[:, 1 + len(vectors[i]) :]], 1)
        if i == 0:
            x = x + clip.positional_embedding
        x = block_by_hand(block, x, clip.attn_mask)
    return F.normalize(clip.ln_final(x)[0, int(tokens.argmax())] @ clip.text_projection, dim=0)


def feature_by_hand(visual, image, tokens):
    """The normalised feature of one image. tokens: of the first blocks, behind the patches as in the released code."""
    patches = visual.conv1(image[None]).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(1, 1, -1), patches], 1) + visual.positional_embedding
    count = x.shape[1]
    x = visual.ln_pre(torch.cat([x, tokens[0][None]], 1))
    for i, block in enumerate(visual.transformer.resblocks):
        if 0 < i < len(tokens):
            x = torch.cat([x[:, :count], tokens[i][None]], 1)
        x = block_by_hand(block, x)
    return F.normalize(visual.ln_post(x[0, 0]) @ visual.proj, dim=0)


def built(*flags):
    backbone, its = load_backbone("tiny", "glyphs")
    names = ["cat", "large dog", "ant", "bee"]
    learner = Learner(backbone, TextHead(torch.zeros(4, 128), 10.0), parse([*FLAGS, *flags]), 0, CPU, frozen=True)
    learner.text = ClassPrompts(its, names, CPU)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
    work = TaskImages(images, torch.tensor([0, 2, 2, 0, 2]), 0)
    return learner, its.clip, names, Task(0, "one", (2, 0), np.arange(5), np.arange(0)), work


@pytest.mark.parametrize("flags", [(), ("--micro-batch=1",), ("--maple.depth=1", "--maple.tokens=3")])
def test_training_equals_both_towers_by_hand(flags):
    learner, clip, names, task, images = built(*flags)
    method = MaPLe(learner)
    named = {name: p.detach().clone().requires_grad_() for name, p in method.context.named_parameters()}
    parameters, momenta = list(named.values()), [torch.zeros_like(p) for p in named.values()]
    start = [p.detach().clone() for p in parameters]
    depth = 1 if flags[:1] == ("--maple.depth=1",) else 2  # the text tower has two blocks, the image tower four
    assert [len(p) for p in parameters] == [depth] * 3

    def loss(pixels, labels, i):
        tokens = [named["vectors"][j] @ named["weight"][j].T + named["bias"][j] for j in range(depth)]
        rows = [row_by_hand(clip, names[c], named["vectors"]) for c in task.classes]
        total = 0
        for image, label in zip(learner.augmented(pixels, learner.generator("augment", 0, i)), labels, strict=True):
            feature = feature_by_hand(learner.backbone.tower, image, tokens)
            logits = torch.stack([10.0 * feature @ row for row in rows])
            total = total - logits.log_softmax(0)[task.classes.index(int(label))]
        return total / len(labels)

    phase = method.train(task, images, method.begin(task))
    for i in range(4):
        pixels, labels = images.batch(phase.batches.rows(i))
        rate = 1e-5 if i < 2 else 0.05 * 0.5 * (1 + math.cos(math.pi * (i - 2) / 2))
        gradients = torch.autograd.grad(loss(pixels, labels, i), parameters)
        with torch.no_grad():
            for p, g, m in zip(parameters, gradients, momenta, strict=True):
                m.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(rate * m)
        phase.step(i)
    assert phase.steps == 4
    phase.finish()
    for (name, found), wanted, before in zip(method.context.named_parameters(), parameters, start, strict=True):
        moved = (wanted - before).norm().detach()
        assert moved > 1e-3 and (found - wanted).norm() < 1e-3 * moved, name
    with torch.no_grad():
        rows = torch.stack([row_by_hand(clip, name, named["vectors"]) for name in names])
        torch.testing.assert_close(learner.head.weight, rows, rtol=1e-4, atol=1e-5)  # of all names
        tokens = [named["vectors"][j] @ named["weight"][j].T + named["bias"][j] for j in range(depth)]
        x = learner.plain(images.images)
        wanted = torch.stack([feature_by_hand(learner.backbone.tower, image, tokens) for image in x])
        features = method.features()
        torch.testing.assert_close(F.normalize(features(x), dim=1), wanted, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in [*clip.parameters(), *learner.backbone.parameters()])


def test_the_first_vectors_are_words_and_the_maps_start_as_released():
    learner, clip, _, _, _ = built("--maple.tokens=3")
    method = MaPLe(learner)
    vectors, weight, bias = (p.detach() for p in method.context.parameters())
    torch.testing.assert_close(vectors[0], clip.token_embedding(torch.tensor(list(b"a p"))).detach())
    assert 0.01 < vectors[1].std() < 0.03 and vectors.shape == (2, 3, 96) and weight.shape == (2, 128, 96)
    assert weight.abs().max() <= 96**-0.5 and bias.abs().max() <= 96**-0.5
    deep = MaPLe(toy.learner(method="maple")).context  # three blocks
    assert torch.equal(deep.weight[1], deep.weight[2]) and not torch.equal(deep.weight[0], deep.weight[1])
    many, *_ = built("--maple.tokens=13")  # "a photo of a" has 12 bytes
    drawn = MaPLe(many)
    assert drawn.text is many.text and 0.01 < drawn.context.vectors[0].std() < 0.03


@pytest.mark.parametrize("kind", ["tiny", "plain", "custom"])
def test_words_in_place_of_the_context_give_the_embedding_of_the_text(kind):
    its = encoder(kind)
    expected = its.encode([f"a photo of a {name}." for name in NAMES])
    prompts, first = ClassPrompts(its, NAMES, CPU).starting("a photo of a", 2)
    torch.testing.assert_close(first, words(its, "a photo of a")[:2])
    found = prompts.rows(first, torch.arange(3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    deep = torch.randn(1, 2, prompts.width)
    changed = prompts.rows(first, torch.arange(3), deep=deep)
    assert (changed - found).abs().max() > 1e-2
    assert torch.equal(prompts.rows(first, torch.arange(3)), found)  # no hook stays
    assert ClassPrompts(its, NAMES, CPU).starting("a photo of a", 99) is None


def test_refusals():
    with pytest.raises(UserError, match="no transformer blocks with a class token"):
        MaPLe.check(parse(["--method", "maple"]), load_backbone("test_resnet", "none")[0])
    its = encoder("tiny")
    prompts = ClassPrompts(its, NAMES, CPU)
    del its.clip.transformer
    with pytest.raises(UserError, match="text tower has no transformer blocks of open_clip's form"):
        prompts.blocks  # noqa: B018
