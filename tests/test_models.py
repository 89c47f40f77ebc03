"""Backbones against the libraries' own encoders, block outputs read by hooks, and a numerical Hessian-vector product."""

import copy
import socket

import open_clip
import pytest
import timm
import torch
from torch.func import functional_call, grad, jvp

from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.models import load_backbone, openclip, tiny
from fastmerge.models.backbone import differentiable_attention, hash_tensors
from fastmerge.models.timm_vit import TimmBackbone


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Opening any connection fails the test; caches are empty."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)


def small(family):
    """A tiny model of each family, without weights from anywhere."""
    if family == "open_clip":
        return load_backbone("tiny", "none")[0]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=3)
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 32)}
    return TimmBackbone("vit_tiny_patch16_224", model, weights="random")


FAMILIES = ["open_clip", "timm"]


def test_features_equal_the_librarys_own():
    clip = tiny.create_tiny().eval()
    backbone = openclip.OpenClipBackbone(
        "tiny", copy.deepcopy(clip.visual), weights="", image_size=32, mean=(0,) * 3, std=(1,) * 3, feature_dim=128
    )
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(backbone(x), clip.encode_image(x), rtol=0, atol=1e-6)
    vit = small("timm").eval()
    torch.testing.assert_close(vit(x), vit.tower.forward_head(vit.tower.forward_features(x)), rtol=0, atol=1e-6)
    assert vit(x).shape == (3, vit.feature_dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_class_tokens_are_the_blocks_outputs(family):
    backbone = small(family).eval()
    blocks = backbone.tower.transformer.resblocks if family == "open_clip" else backbone.tower.blocks
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 0]))
    x = torch.randn(3, 3, 32, 32)
    features, tokens = backbone.class_tokens(x)
    assert tokens.shape == (backbone.layers, 3, backbone.width) == (len(seen), 3, backbone.width)
    torch.testing.assert_close(tokens, torch.stack(seen[: backbone.layers]))
    torch.testing.assert_close(features, backbone(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", [False, True])
def test_forward_over_reverse_equals_a_difference_of_gradients(family, train):
    flat = FlatModel(small(family).train(train).double(), dtype=torch.float64)
    x, theta = torch.randn(2, 3, 32, 32, dtype=torch.float64), flat.theta.detach()

    def loss(theta):
        features, tokens = functional_call(TokensOf(flat.module), prefixed(flat.as_dict(theta)), (x,))
        return features.square().mean() + tokens.square().mean()

    v = torch.randn_like(theta) * (theta != 0)
    with differentiable_attention():
        _, h = jvp(grad(loss), (theta,), (v,))
        step = 1e-5
        expected = (grad(loss)(theta + step * v) - grad(loss)(theta - step * v)) / (2 * step)
    assert h.norm() > 1e-3
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-6 * float(h.abs().max()))
    assert torch.backends.mha.get_fastpath_enabled()


class TokensOf(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.class_tokens(x)


def prefixed(tensors):
    return {f"module.{name}": t for name, t in tensors.items()}


def test_no_class_token():
    backbone, encoder = load_backbone("resnet18", "none")
    assert encoder is None and backbone(torch.randn(1, 3, 64, 64)).shape == (1, 512)
    with pytest.raises(UserError, match="resnet18 has no class token"):
        backbone.class_tokens(torch.randn(1, 3, 64, 64))


def test_random_weights_follow_the_seed():
    torch.manual_seed(1)
    a = load_backbone("tiny", "none")[0]
    torch.manual_seed(1)
    b = load_backbone("tiny", "none")[0]
    c = load_backbone("tiny", "none")[0]
    assert a.weights_sha256 == b.weights_sha256 != c.weights_sha256 and a.weights == "random weights"
    assert all(p.requires_grad and p.dtype == torch.float32 for p in a.parameters())
    assert hash_tensors({"x": torch.ones(2)}) != hash_tensors({"x": torch.ones(2), "y": torch.ones(0)})


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_local_checkpoint(tmp_path, suffix):
    from safetensors.torch import save_file

    clip = tiny.create_tiny()
    path = tmp_path / f"weights.{suffix}"
    state = {k: v.clone() for k, v in clip.state_dict().items()}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    backbone, encoder = load_backbone("tiny", str(path))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone.eval()(x), clip.eval().encode_image(x))
    assert str(path) in backbone.weights and encoder.logit_scale > 0
    assert encoder.encode(["a", "b"]).norm(dim=1).allclose(torch.ones(2))
    with pytest.raises(UserError, match=r"cannot be loaded into this model"):
        torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
        load_backbone("tiny", str(tmp_path / "other.pt"))


def test_local_checkpoint_of_timm(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    backbone, _ = load_backbone("vit_tiny_patch16_224", str(tmp_path / "vit.pt"))
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(backbone.eval()(x), model.eval()(x))
    with pytest.raises(UserError, match="cannot be loaded into this model.*lacks"):
        torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
        load_backbone("vit_tiny_patch16_224", str(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("ViT-B-16", "openai", ["--model ViT-B-16-quickgelu", "QuickGELU"]),
        ("ViT-B-16-quickgelu", "openai", ["timm/vit_base_patch16_clip_224.openai", "--download", "--pretrained FILE"]),
        ("ViT-B-32", "laion2b_s34b_b79", ["no such tag", "Did you mean: laion2b_s34b_b79k"]),
        ("ViT-B-61", "openai", ["unknown model", "ViT-B-16"]),
        ("vit_base_patch16_224", "default", ["vit_base_patch16_224", "model.safetensors", "--download"]),
        ("vit_base_patch16_224", "augreg_in21", ["no such tag", "augreg_in21k"]),
        ("vit_base_patch16_224.augreg_in21k", "default", ["--pretrained augreg_in21k"]),
        ("tiny", "openai", ["the tag glyphs"]),
    ],
)
def test_errors_come_before_any_download(model, pretrained, words):
    with pytest.raises(UserError) as error:
        load_backbone(model, pretrained)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_failed_download_says_what_was_wanted():
    with pytest.raises(UserError, match=r"download failed.*\n.*vit_base_patch16_clip_224\.openai"):
        load_backbone("ViT-B-16-quickgelu", "openai", download=True)


def test_backbones_can_be_copied():
    backbone = small("open_clip")
    other = copy.deepcopy(backbone)
    assert hash_tensors(other.state_dict()) == backbone.weights_sha256


def test_default_mean_and_size_come_from_the_model():
    assert load_backbone("tiny", "none")[0].mean == tiny.IMAGE_MEAN
    vit = load_backbone("vit_tiny_patch16_224", "none")[0]
    assert (vit.mean, vit.std, vit.image_size) == ((0.5,) * 3, (0.5,) * 3, 224)
    assert open_clip.get_pretrained_cfg("ViT-B-16-quickgelu", "openai")["mean"] == open_clip.OPENAI_DATASET_MEAN
