"""Prompts in a transformer against one written out in products (float64), for both families."""

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.functional import layer_norm, linear

from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.models import compiled
from fastmerge.models.openclip import OpenClipBackbone
from fastmerge.models.prompts import Prompt, check_prompts
from fastmerge.models.recompute import checkpoint_blocks
from fastmerge.models.timm_vit import TimmBackbone
from fastmerge.parts import saved_bytes

WIDTH, HEADS, BLOCKS = 8, 2, 3
ABOUT = {"weights": "random", "image_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "feature_dim": WIDTH}


def backbone(family, **changes):
    torch.manual_seed(0)
    if family == "timm":
        own = {
            "img_size": 8,
            "patch_size": 4,
            "embed_dim": WIDTH,
            "depth": BLOCKS,
            "num_heads": HEADS,
            "num_classes": 0,
        }
        model = timm.models.vision_transformer.VisionTransformer(**own | changes)
        model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        made = TimmBackbone("small", model, weights="random")
    else:
        vision = {"image_size": 8, "patch_size": 4, "width": WIDTH, "head_width": WIDTH // HEADS, "layers": BLOCKS}
        text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
        visual = open_clip.CLIP(WIDTH, vision, text).visual
        for p in visual.parameters():
            torch.nn.init.normal_(p, std=0.3)
        made = OpenClipBackbone("small", visual, **ABOUT)
    return made.eval()


def written_out(backbone, images, prefix, tokens):
    """The features of a ViT with a class token, block by block."""
    w, timm_names = dict(backbone.tower.named_parameters()), backbone.family == "timm"
    eps = 1e-6 if timm_names else 1e-5
    conv = ("patch_embed.proj.weight", "patch_embed.proj.bias") if timm_names else ("conv1.weight", None)
    patches = F.conv2d(images, w[conv[0]], w[conv[1]] if conv[1] else None, stride=4).flatten(2).mT
    cls, places = (
        (w["cls_token"][0], w["pos_embed"][0])
        if timm_names
        else (w["class_embedding"][None], w["positional_embedding"])
    )
    x = torch.cat([cls.expand(len(images), 1, -1), patches], 1) + places
    if not timm_names:
        x = layer_norm(x, (WIDTH,), w["ln_pre.weight"], w["ln_pre.bias"], eps)
    count = 0
    for i in range(BLOCKS):
        if i in tokens:
            own = tokens[i].expand(len(images), -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 1 + count :]], 1)
            count = own.shape[1]
        at = f"blocks.{i}." if timm_names else f"transformer.resblocks.{i}."
        names = "norm1 attn.qkv.weight attn.qkv.bias attn.proj norm2 mlp.fc1 mlp.fc2".split()
        if not timm_names:
            names = "ln_1 attn.in_proj_weight attn.in_proj_bias attn.out_proj ln_2 mlp.c_fc mlp.c_proj".split()
        norm1, qkv_weight, qkv_bias, out, norm2, up, down = (at + name for name in names)
        q, k, v = linear(norm(x, norm1, w, eps), w[qkv_weight], w[qkv_bias]).chunk(3, -1)
        if i in prefix:
            k, v = (torch.cat([p.expand(len(images), -1, -1), y], 1) for p, y in zip(prefix[i], (k, v), strict=True))
        heads = []
        for head in torch.arange(WIDTH).chunk(HEADS):
            scores = q[..., head] @ k[..., head].mT / len(head) ** 0.5
            heads.append(scores.softmax(-1) @ v[..., head])
        x = x + linear(torch.cat(heads, -1), w[out + ".weight"], w[out + ".bias"])
        hidden = F.gelu(linear(norm(x, norm2, w, eps), w[up + ".weight"], w[up + ".bias"]))
        x = x + linear(hidden, w[down + ".weight"], w[down + ".bias"])
    if timm_names:
        return norm(x, "norm", w, eps)[:, 0]
    return norm(x, "ln_post", w, eps)[:, 0] @ w["proj"]


def norm(x, name, w, eps):
    return layer_norm(x, (WIDTH,), w[name + ".weight"], w[name + ".bias"], eps)


def prompts(kind, dtype=torch.float64):
    """A prompt of this kind for 3 images, and its leaves."""
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(s, 2, WIDTH, dtype=dtype, generator=g).requires_grad_() for s in (3, 1, 3, 1)]
    a, b, c, d = leaves
    made = {
        "prefix": Prompt({0: (a, b), 2: (c, d)}),
        "tokens": Prompt(tokens={0: a, 1: b, 2: c}),
        "both": Prompt({1: (a, b)}, {0: c, 2: d}),
    }[kind]
    return made, [x for x in leaves if any(x is y for y in [*sum(made.prefix.values(), ()), *made.tokens.values()])]


@pytest.mark.parametrize("family", ["timm", "open_clip"])
@pytest.mark.parametrize("kind", ["prefix", "tokens", "both"])
def test_features_and_gradients_equal_written_out_attention(family, kind):
    model, images = backbone(family).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    prompt, leaves = prompts(kind)
    found, expected = model.prompted(images, prompt), written_out(model, images, prompt.prefix, prompt.tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad((x.square() * weights).sum(), leaves) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.abs().max() > 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model.prompted(images, prompt), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["timm", "open_clip"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_empty_prompt_changes_no_bit(family, grad):
    model, images, none = backbone(family), torch.randn(3, 3, 8, 8), torch.zeros(1, 0, WIDTH)
    with torch.set_grad_enabled(grad):
        for prompt in (Prompt(), Prompt({i: (none, none) for i in range(BLOCKS)}), Prompt(tokens={0: none})):
            assert torch.equal(model.prompted(images, prompt), model(images))
        prompt, _ = prompts("both", torch.float32)
        model.prompted(images, prompt)
        assert torch.equal(model.prompted(images, Prompt()), model(images))  # nothing stays behind


@pytest.mark.parametrize("family", ["timm", "open_clip"])
@pytest.mark.parametrize("kind", ["prefix", "tokens"])
def test_an_image_does_not_see_the_others_of_its_batch(family, kind):
    model, images = backbone(family).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    prompt, _ = prompts(kind)
    one = Prompt(
        {i: tuple(x[-1:] for x in pair) for i, pair in prompt.prefix.items()},
        {i: x[-1:] for i, x in prompt.tokens.items()},
    )
    torch.testing.assert_close(model.prompted(images[2:], one)[0], model.prompted(images, prompt)[2])


@pytest.mark.parametrize("family", ["timm", "open_clip"])
@pytest.mark.parametrize("kind", ["prefix", "tokens", "both"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_have_the_same_bits(family, kind, precision):
    results = []
    for again in (False, True):
        model, (prompt, leaves) = backbone(family), prompts(kind, torch.float32)
        model.precision = precision
        torch.manual_seed(3)
        images = torch.randn(3, 3, 8, 8)
        if again:
            checkpoint_blocks(model)
        features = model.prompted(images, prompt)
        results.append([features, *torch.autograd.grad(features.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["timm", "open_clip"])
@pytest.mark.parametrize("kind", ["prefix", "tokens"])
def test_bf16_is_near(family, kind):
    model, images = backbone(family), torch.randn(3, 3, 8, 8)
    prompt, leaves = prompts(kind, torch.float32)
    exact = model.prompted(images, prompt)
    model.precision = "bf16"
    rough = model.prompted(images, prompt)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.03 * exact.norm()
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (rough, exact)), strict=True):
        assert (a - b).norm() < 0.2 * b.norm() + 1e-3


def test_what_prompts_do_not_reach_is_refused():
    for family in ("timm", "open_clip"):
        check_prompts(backbone(family), [0, 2], "--x.layers")
        check_prompts(backbone(family), [0, 2], "--x.layers", tokens=True)
    with pytest.raises(UserError, match=r"--x.layers 3: model small has 3 blocks; expected 0 to 2"):
        check_prompts(backbone("timm"), [0, 3], "--x.layers")
    unfused = backbone("timm")
    for block in unfused.tower.blocks:
        block.attn.fused_attn = False  # attention in its own products
    with pytest.raises(UserError, match=r"do not reach its attention \(.*\); choose a plain ViT"):
        check_prompts(unfused, [0], "--x.layers")
    with pytest.raises(UserError, match="no transformer blocks with a class token"):
        blocks = backbone("timm")
        blocks.tower = torch.nn.Flatten()
        check_prompts(blocks, [0], "--x.layers")
    grid = backbone("timm")
    grid.tower.blocks[1].register_forward_pre_hook(lambda _, args: args[0].view(1, 5, WIDTH))
    with pytest.raises(UserError, match="do not reach its attention"):
        check_prompts(grid, [0], "--x.layers", tokens=True)


@pytest.mark.parametrize("family", ["timm", "open_clip"])
def test_a_frozen_backbone_costs_no_gradient_memory(family):
    saved, model = {}, backbone(family)
    images, (prompt, leaves) = torch.randn(3, 3, 8, 8), prompts("prefix", torch.float32)
    flat = FlatModel(model)
    needed = saved_bytes(flat, 8)
    for frozen in (False, True):
        for p in model.parameters():
            p.requires_grad_(True)
        flat = FlatModel(model, frozen=frozen)
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, int]()

        def note(x, own=own, kept=kept):
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            features = model.prompted(images, prompt)
        saved[frozen] = sum(kept.values())
        features.square().sum().backward()
        assert flat.gradient.nbytes == (0 if frozen else flat.theta.nbytes)
        assert all((p.grad is None) == frozen for p in model.parameters())
        assert all(x.grad is not None and x.grad.any() for x in leaves)
        flat.check_views()
        flat.zero_grad()
    assert saved[True] < 0.8 * saved[False]  # inputs of linear layers are not kept
    assert saved_bytes(flat, 8) == needed > 0  # the estimate of a step does not depend on who is trained


@pytest.mark.parametrize("family", ["timm", "open_clip"])
def test_a_compiled_pass_takes_prompts_as_inputs(family, monkeypatch):
    """Through dynamo's graphs, without a compiler behind them: a graph for each kind of pass, whatever the prompts are."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    model, plain, images = backbone(family), backbone(family), torch.randn(3, 3, 8, 8)
    model.compile_with(lambda n: n == 3, pytest.fail)
    for scale in (1.0, -2.0, 0.5):
        a, b = (scale * torch.randn(n, 2, WIDTH) for n in (3, 1))
        leaves = [a.requires_grad_(), b.requires_grad_()]
        results = []
        for each in (model, plain):
            features = each.prompted(images, Prompt({0: (a, a), 2: (b, b)}))
            results.append([features, *torch.autograd.grad(features.square().sum(), leaves)])
            with torch.no_grad():
                results[-1] += [each(images), each.prompted(images, Prompt({0: (a, a), 2: (b, b)}))]
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    tokens = Prompt(tokens={0: a})
    assert torch.equal(model.prompted(images, tokens), plain.prompted(images, tokens))  # uncompiled
    torch._dynamo.reset()
