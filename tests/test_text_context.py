"""Learned contexts in front of class names: compared with the text tower itself and with towers written out by hand."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
import toy

from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.methods.coop import CoOp
from fastmerge.methods.vpt import VPT
from fastmerge.models import load_backbone, text_context
from fastmerge.models.openclip import TextEncoder
from fastmerge.models.text_context import NAMELESS, ClassPrompts
from fastmerge.models.tiny import create_tiny
from fastmerge.setup import Setup

CPU = torch.device("cpu")
NAMES = ["cat", "large dog", "ant"]
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}


def encoder(kind):
    torch.manual_seed(0)
    if kind == "tiny":
        return load_backbone("tiny", "glyphs")[1]
    made = {"plain": open_clip.CLIP, "custom": open_clip.CustomTextCLIP}[kind]
    return TextEncoder(made(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT), open_clip.SimpleTokenizer())


def words(its, text):
    """The embeddings of a text without START and END."""
    row = its.tokenize([text])[0]
    place = its.clip.token_embedding if hasattr(its.clip, "token_embedding") else its.clip.text.token_embedding
    return place(row[1 : int(row.argmax())]).detach()


@pytest.mark.parametrize("kind", ["tiny", "plain", "custom"])
def test_a_context_of_words_gives_the_embedding_of_the_text(kind):
    its = encoder(kind)
    expected = its.encode([f"a photo of a {name}." for name in NAMES])
    prompts = ClassPrompts(its, NAMES, CPU)
    start = "a photo of a " if kind == "tiny" else "a photo of a"  # the tiny tokens are bytes
    context = words(its, start)
    assert context.shape[1] == prompts.width
    found = prompts.rows(context, torch.arange(3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    each = prompts.rows(torch.stack([context, 0 * context]), torch.tensor([2, 0]))  # a context for every row
    torch.testing.assert_close(each[0], expected[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(each[1], expected[0], atol=1e-2)


def by_hand(clip, tokens, context):
    """encode_text of open_clip's CLIP, written out. tokens: `[k, t]` with room; in the dtype of the tower."""
    x = clip.token_embedding(tokens).detach()
    x = torch.stack([torch.cat([row[:1], context, row[1 + len(context) :]]) for row in x]) + clip.positional_embedding
    for block in clip.transformer.resblocks:
        attention, y = block.attn, block.ln_1(x)
        q, k, v = (
            F.linear(y, attention.in_proj_weight, attention.in_proj_bias)
            .unflatten(2, (3, attention.num_heads, -1))
            .unbind(2)
        )
        weights = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5 + clip.attn_mask
        mixed = torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), v).flatten(2)
        x = x + attention.out_proj(mixed)
        x = x + block.mlp(block.ln_2(x))
    ends = tokens.argmax(1)
    return F.normalize(clip.ln_final(x)[torch.arange(len(x)), ends] @ clip.text_projection, dim=1)


@pytest.mark.parametrize("chunk", [2, 64])
def test_gradients_equal_a_tower_written_out(chunk, monkeypatch):
    """In chunks the memory is that of one chunk: a backward pass encodes each again."""
    monkeypatch.setattr(text_context, "CHUNK", chunk)
    its, saved = encoder("tiny"), []
    prompts = ClassPrompts(its, [*NAMES, "bee", "elk"], CPU)
    classes, weights = torch.tensor([4, 0, 2, 3, 1]), torch.randn(5, 128)
    found, wanted = (
        torch.randn(3, prompts.width, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab"
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        rows = prompts.rows(found, classes)
    (rows * weights).sum().backward()
    slow = by_hand(its.clip.double(), prompts.with_room(classes, 3), wanted.double())
    torch.testing.assert_close(rows.double(), slow, rtol=1e-4, atol=1e-5)
    (slow * weights).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in its.clip.parameters())
    assert (sum(saved) < 20_000) == (chunk == 2)


def test_rows_may_share_contexts_and_lack_a_name(monkeypatch):
    its = encoder("tiny")
    prompts = ClassPrompts(its, NAMES, CPU)
    contexts, classes, of = (
        torch.randn(2, 3, prompts.width),
        torch.tensor([2, NAMELESS, 0, 2]),
        torch.tensor([1, 0, 0, 0]),
    )
    expected = torch.cat([prompts.rows(contexts[j], classes[i : i + 1]) for i, j in enumerate(of)])
    for chunk in (3, 64):
        monkeypatch.setattr(text_context, "CHUNK", chunk)
        torch.testing.assert_close(prompts.rows(contexts, classes, of), expected, rtol=1e-4, atol=1e-5)
    empty = ClassPrompts(its, [""], CPU)
    torch.testing.assert_close(empty.rows(contexts[0], torch.tensor([0])), expected[1:2], rtol=1e-4, atol=1e-5)


def test_too_many_context_vectors_are_refused():
    prompts = ClassPrompts(encoder("tiny"), NAMES, CPU)
    assert prompts.rows(torch.zeros(74, prompts.width), torch.arange(3)).isfinite().all()
    with pytest.raises(UserError, match="75 context vectors before a class name: the text tower has room for 74"):
        prompts.rows(torch.zeros(75, prompts.width), torch.arange(3))


def test_a_name_that_is_too_long_keeps_its_end():
    prompts = ClassPrompts(encoder("tiny"), ["x" * 200, "y"], CPU)
    rows = prompts.with_room(torch.arange(2), 4)
    assert rows.shape == (2, 77) and (rows == prompts.end).sum(1).tolist() == [1, 1]
    assert int(rows[0].argmax()) == 76 and int(rows[1].argmax()) == 4 + 3


def test_towers_that_take_no_context():
    its = encoder("tiny")
    its.tokenize = lambda texts: torch.tensor([[i, 257] for i in range(len(texts))])
    with pytest.raises(UserError, match="tokens do not begin with one START"):
        ClassPrompts(its, NAMES, CPU)
    del its.clip.token_embedding
    with pytest.raises(UserError, match="no token embedding of open_clip's form"):
        ClassPrompts(its, NAMES, CPU)


@pytest.mark.parametrize("flags", ["--head linear", "--model test_vit --pretrained none"])
def test_other_heads_are_refused(flags, tmp_path, capsys):
    assert main(["--method", "coop", *flags.split(), "--device", "cpu", "--run-dir", str(tmp_path / "r")]) == 2
    assert "--method coop uses the text tower in training, so it needs --head text" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["proof", "rapf"])
def test_weights_without_a_text_tower_are_refused_where_texts_are_needed(name, tmp_path, capsys):
    """A file of the image tower alone has a prototype head unless --head says something else."""
    tower = {name: x for name, x in create_tiny().state_dict().items() if name.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    flags = ["--model", "tiny", "--pretrained", str(tmp_path / "tower.pt")]
    assert main(["--method", name, *flags, "--device", "cpu", "--run-dir", str(tmp_path / "r")]) == 2
    assert "needs --head text and a model with a text tower (given: --head prototype" in capsys.readouterr().err


def test_the_tower_is_kept_only_for_methods_that_need_it():
    flags = ["--device=cpu", "--epochs=1"]
    assert Setup(parse([*flags, "--method", "trm"])).learner(0).text is None
    assert Setup(parse([*flags, "--method", "trm", "coop"])).learner(0).text is not None


def frozen_features(learner, pixels, i):
    images = learner.augmented(pixels, learner.generator("augment", 0, i))
    return F.normalize(learner.backbone(images).detach(), dim=1)


def slow_training(method, task, images, loss):
    """SGD by hand on the method's own parameters, a step at a time. loss(step, features, classes, labels, parameters)."""
    learner, peak = method.learner, method.settings.lr
    parameters = [p.detach().clone().requires_grad_() for p in method.context.parameters()]
    momenta = [torch.zeros_like(p) for p in parameters]
    order, per_epoch, steps = [], 3, 6
    for epoch in range(2):
        order += torch.randperm(20, generator=learner.generator("order", 0, "train", epoch)).split(8)
    classes = torch.tensor(task.classes)
    for i, rows in enumerate(order):
        features = frozen_features(learner, images.images[rows], i)
        value = loss(i, features, classes, images.labels[rows], parameters)
        gradients = torch.autograd.grad(value, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        rate = 1e-5 if i < per_epoch else peak * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (i - 3) / (steps - 3))))
        with torch.no_grad():
            for p, g, m in zip(parameters, gradients, momenta, strict=True):
                m.mul_(0.9).add_(g * min(1.0, 1.0 / float(norm)) + 5e-4 * p)
                p.sub_(rate * m)
    return [p.detach() for p in parameters]


def test_coop_equals_training_by_hand(tmp_path):
    learner = toy.learner("--coop.lr=0.5", "--coop.tokens=3")
    method = CoOp(learner)
    task, images = toy.tasks()[0]
    before = copy.deepcopy(method.context.vectors.detach())

    def loss(i, features, classes, labels, parameters):
        logits = 3.0 * features @ learner.text.rows(parameters[0], classes).T
        return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()

    (wanted,) = slow_training(method, task, images, loss)
    toy.work(method.train(task, images, {}))
    assert (method.context.vectors - before).norm() > 1e-2
    torch.testing.assert_close(method.context.vectors.detach(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(learner.head.weight, learner.text.rows(wanted, torch.arange(6)), rtol=1e-4, atol=1e-5)


def test_vpt_equals_training_by_hand():
    learner = toy.learner("--vpt.lr=0.5", "--vpt.samples=3", "--vpt.kl=0.02")
    method = VPT(learner)
    task, images = toy.tasks()[0]

    def loss(i, features, classes, labels, parameters):
        named = dict(zip([n for n, _ in method.context.named_parameters()], parameters, strict=True))
        vectors, mean, log_variance = named["vectors"], named["mean"], named["log_variance"]
        noise = torch.randn(3, 6, generator=learner.generator("residual", 0, i))
        chances = 0
        for one in noise:
            context = vectors + mean + one * torch.sqrt(torch.exp(log_variance))
            logits = 3.0 * features @ learner.text.rows(context, classes).T
            chances = chances + logits.softmax(1)[torch.arange(len(labels)), labels] / 3
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mean, torch.exp(0.5 * log_variance)), normal(0.0, 1.0)).mean()
        return -chances.log().mean() + 0.02 * kl

    wanted = slow_training(method, task, images, loss)
    toy.work(method.train(task, images, {}))
    for found, its in zip(method.context.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.detach(), its, rtol=1e-4, atol=1e-6)
    context = method.context.vectors.detach() + method.context.mean.detach()
    torch.testing.assert_close(learner.head.weight, learner.text.rows(context, torch.arange(6)))
