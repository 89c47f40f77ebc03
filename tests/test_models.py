"""Compare backbones with the libraries' encoders, block outputs in hooks and numerical Hessian-vector products."""

import copy
import json
import pathlib
import pickle
import socket

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.func import functional_call, grad, jvp

from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.models import load_backbone, openclip, tiny
from fastmerge.models.attention import differentiable_attention
from fastmerge.models.backbone import hash_tensors
from fastmerge.models.timm_vit import TimmBackbone


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Refuse all connections, return the list of attempts, and start with empty caches."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise AssertionError("a test touched the network")  # not an OSError: the hub's client would retry

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    torch.manual_seed(0)
    return tried


def hub_cache(repository, file):
    """Make the folders of the hub's cache and return the path of the file in them."""
    root = huggingface_hub.constants.HF_HUB_CACHE
    folder = pathlib.Path(root) / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40) / file


@pytest.fixture
def mini(monkeypatch, tmp_path):
    """Register a small open_clip model `mini` with the tags `hub` and `url`."""
    factory, tables = open_clip.factory, open_clip.pretrained._PRETRAINED
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
    (tmp_path / "mini.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "mini.json")
    about = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    tags = {"hub": {"hf_hub": "some/mini/weights.bin"}, "url": {"url": "https://example.org/mini-1.pt"}}
    monkeypatch.setitem(tables, "mini", {tag: about | where for tag, where in tags.items()})


def small(family):
    """Return a tiny model of the family, with random weights."""
    if family == "open_clip":
        shape = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
        visual = open_clip.transformer.VisionTransformer(**shape, output_dim=16)
        about = {"image_size": 32, "mean": (0,) * 3, "std": (1,) * 3, "feature_dim": 16}
        return openclip.OpenClipBackbone("mini", visual, weights="random", **about)
    name = {"timm": "vit_tiny_patch16_224", "eva": "eva02_tiny_patch14_224"}[family]
    model = timm.create_model(name, num_classes=0, img_size=32, patch_size=16, depth=2, embed_dim=48)
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 32)}
    return TimmBackbone(name, model, weights="random")


def towers(module):
    """Return the state dict of a backbone around `module`."""
    return {f"tower.{name}": tensor for name, tensor in module.state_dict().items()}


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


@pytest.mark.parametrize("family", [*FAMILIES, "eva"])
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
    backbone, encoder = load_backbone("test_resnet", "none")
    assert encoder is None and backbone(torch.randn(1, 3, 64, 64)).shape == (1, backbone.feature_dim)
    with pytest.raises(UserError, match="test_resnet has no class token"):
        backbone.class_tokens(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2", "test_vit"])
def test_class_tokens_of_other_vits_of_timm(name):
    """For EVA, a ViT with register tokens and a plain ViT, compare class tokens with hooks on the blocks."""
    model = timm.create_model(name, num_classes=0, img_size=112, depth=2).eval()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 0]))
    backbone, x = TimmBackbone(name, model, weights="random"), torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        features, tokens = backbone.class_tokens(x)
        assert tokens.shape == (backbone.layers, 1, backbone.width)
        torch.testing.assert_close(tokens, torch.stack(seen[:2]))
        torch.testing.assert_close(features, backbone(x), rtol=0, atol=1e-6)


def test_class_tokens_of_a_timm_model_inside_open_clip():
    visual = open_clip.timm_model.TimmModel("test_vit", embed_dim=24, image_size=160, pool="token").eval()
    about = {"image_size": 160, "mean": (0,) * 3, "std": (1,) * 3, "feature_dim": 24}
    backbone, x = openclip.OpenClipBackbone("x", visual, weights="", **about), torch.randn(2, 3, 160, 160)
    features, tokens = backbone.class_tokens(x)
    seen = []
    for block in visual.trunk.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 0]))
    torch.testing.assert_close(backbone(x), features, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens, torch.stack(seen))
    assert tokens.shape == (backbone.layers, 2, backbone.width) and features.shape == (2, 24)


def test_only_square_images():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 48), depth=1)
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 48)}
    with pytest.raises(UserError, match="model wide takes 32 x 48 images; only square ones are supported"):
        TimmBackbone("wide", model, weights="random")


@pytest.mark.parametrize("name", ["lcnet_035", "mobilenetv3_small_050", "ghostnet_050", "convnext_atto", "resnet18"])
def test_the_width_of_timms_features(name):
    backbone, _ = load_backbone(name, "none")
    size = backbone.image_size
    with torch.device("meta"):
        features = backbone.to("meta").eval()(torch.empty(1, 3, size, size))
    assert features.shape == (1, backbone.feature_dim)


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
    model = timm.create_model("test_vit", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    backbone, _ = load_backbone("test_vit", str(tmp_path / "vit.pt"))
    x = torch.randn(1, 3, 160, 160)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(backbone.eval()(x), expected)
    with pytest.raises(UserError, match="cannot be loaded into this model.*missing: 78 of 78"):
        torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
        load_backbone("test_vit", str(tmp_path / "other.pt"))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    for model in ("tiny", "test_vit"):
        with pytest.raises(UserError, match="trap.pt: cannot be loaded into this model"):
            load_backbone(model, str(tmp_path / "trap.pt"))
    assert not (tmp_path / "ran").exists()


def stand_in(*args):
    """A small CLIP in place of the model that was asked for."""
    clip = tiny.create_tiny()
    clip.visual.image_mean = clip.visual.image_std = None  # create_model sets them
    return clip


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("form", ["TorchScript", "state dict"])
def test_an_archive_like_openais(form, tmp_path, monkeypatch):
    """OpenAI published TorchScript archives in fp16 with three extra entries, of models with QuickGELU."""

    class Tree(torch.nn.Module):
        def __init__(self, tensors):
            super().__init__()
            for name in dict.fromkeys(n.partition(".")[0] for n in tensors):
                below = {n.partition(".")[2]: v for n, v in tensors.items() if n.startswith(f"{name}.")}
                self.add_module(name, Tree(below)) if below else self.register_buffer(name, tensors[name])

    clip, path = tiny.create_tiny().half(), tmp_path / "archive.pt"
    extra = {n: torch.tensor(1) for n in ("input_resolution", "context_length", "vocab_size")}
    tree = Tree(clip.state_dict() | extra)
    torch.jit.script(tree).save(str(path)) if form == "TorchScript" else torch.save(tree.state_dict(), path)
    backbone, _ = load_backbone("tiny", str(path))
    assert backbone.weights_sha256 == hash_tensors(towers(clip.float().visual))
    assert backbone.weights == f"file {path} (OpenAI's archive)"
    monkeypatch.setattr(openclip, "create", stand_in)
    for name in ("ViT-L-14", "ViT-B-16.laion2b_s34b_b88k", "RN50"):
        plain = name.partition(".")[0]
        with pytest.raises(
            UserError, match=rf"--model {plain} .*archive.pt.*QuickGELU.*Use --model {plain}-quickgelu$"
        ):
            load_backbone(name, str(path))
    assert load_backbone("ViT-L-14-quickgelu", str(path))[0].weights_sha256 == backbone.weights_sha256


def test_a_file_of_a_model_with_either_activation(tmp_path, monkeypatch):
    """A file whose activation nothing says is refused where open_clip has weights of both kinds."""
    path = tmp_path / "own.pt"
    torch.save(tiny.create_tiny().state_dict(), path)
    monkeypatch.setattr(openclip, "create", stand_in)
    with pytest.raises(UserError) as caught:
        load_backbone("ViT-B-16", str(path))
    words = (f"--model ViT-B-16 --pretrained {path}: nothing says", "--model ViT-B-16-quickgelu", "ViT-B-16.TAG")
    assert all(word in str(caught.value) for word in (*words, "laion2b_s34b_b88k")), caught.value
    assert "openai" not in str(caught.value)  # a tag with QuickGELU
    for name in ("ViT-B-16-quickgelu", "ViT-B-16.laion2b_s34b_b88k", "ViT-B-16-SigLIP"):
        assert load_backbone(name, str(path))[0].weights == f"file {path}"
    assert "--model RN50-quickgelu" in load_backbone("RN50", str(path))[0].weights  # no tag has it with GELU


def test_a_model_that_has_quickgelu_in_either_case():
    openclip.check_activation("roberta-ViT-B-32", "laion2b_s12b_b32k")


@pytest.mark.parametrize("tag", ["hub", "url"])
def test_a_tag_of_open_clip_is_found_in_the_cache(mini, tag, tmp_path, no_network, capfd):
    with pytest.raises(UserError, match=r"not here. Looked for:(\n.*)*(some/mini: weights.bin|mini-1.pt)\n"):
        load_backbone("mini", tag)
    clip = open_clip.create_model("mini", load_weights=False).eval()
    capfd.readouterr()
    if tag == "hub":  # open_clip fetches the safetensors file instead of the .bin
        save_file({k: v.clone() for k, v in clip.state_dict().items()}, hub_cache("some/mini", "weights.safetensors"))
    else:
        (tmp_path / ".cache" / "clip").mkdir(parents=True)
        torch.save(clip.state_dict(), tmp_path / ".cache" / "clip" / "mini-1.pt")
    backbone, encoder = load_backbone("mini", tag)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.eval()(x), clip.encode_image(x), rtol=0, atol=1e-6)
    text = clip.encode_text(open_clip.get_tokenizer("mini")(["a cat"]))
    torch.testing.assert_close(encoder.encode(["a cat"]), torch.nn.functional.normalize(text, dim=1))
    assert backbone.weights == f"open_clip tag {tag}" and not no_network
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "No pretrained weights" not in capfd.readouterr().err


def test_a_tag_of_timm_is_found_in_the_cache(no_network):
    config = timm.get_pretrained_cfg("test_vit")
    model, path = timm.create_model("test_vit"), hub_cache(config.hf_hub_id, "model.safetensors")
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path)
    backbone, _ = load_backbone("test_vit", "default")
    model.reset_classifier(0)
    assert backbone.weights_sha256 == hash_tensors(towers(model)) and not no_network
    assert backbone.weights == f"timm tag {config.tag}" and config.tag
    path.write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=f"weights '{config.tag}' of model test_vit: .*model.safetensors cannot be read"
    ):
        load_backbone("test_vit", "default")


def test_text_towers_of_the_hub_fetch_nothing(monkeypatch, no_network):
    def offline(name, load_weights=False, pretrained_text=False):
        assert huggingface_hub.constants.HF_HUB_OFFLINE and not load_weights and not pretrained_text
        raise OSError("not in the cache")

    monkeypatch.setattr(open_clip, "create_model", offline)
    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(UserError, match=r"roberta-base of the Hugging Face hub, cannot be created \(not in the cache"):
        load_backbone("roberta-ViT-B-32", "none")
    encode = openclip.tokenizer("ViT-B-16-SigLIP", False)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"tokenizer \(timm/ViT-B-16-SigLIP\) is not here .*--head prototype"):
        encode(["a cat"])
    assert not no_network


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
def test_errors_come_before_any_download(model, pretrained, words, no_network):
    with pytest.raises(UserError) as error:
        load_backbone(model, pretrained)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not no_network


@pytest.mark.parametrize(
    ("model", "tag", "wanted"),
    [("ViT-B-16-quickgelu", "openai", "vit_base_patch16_clip_224.openai"), ("test_vit", "default", "timm/test_vit.")],
)
def test_a_failed_download_says_what_was_wanted(model, tag, wanted, no_network):
    with pytest.raises(UserError, match=rf"download failed.*\n.*{wanted}.*(\n.*)*--pretrained FILE"):
        load_backbone(model, tag, download=True)
    assert no_network


@pytest.mark.parametrize("family", FAMILIES)
def test_backbones_can_be_copied_and_pickled(family):
    backbone = small(family)
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert hash_tensors(other.state_dict()) == backbone.weights_sha256 == other.weights_sha256
        assert (other.name, other.layers, other.width) == (backbone.name, backbone.layers, backbone.width)


def test_text_and_image_tower_share_nothing():
    backbone, encoder = load_backbone("tiny", "none")
    ours = {id(p) for p in backbone.parameters()}
    assert ours and not any(id(p) in ours for p in encoder.clip.parameters())


def test_default_mean_and_size_come_from_the_model():
    assert load_backbone("tiny", "none")[0].mean == tiny.IMAGE_MEAN
    vit = load_backbone("vit_tiny_patch16_224", "none")[0]
    assert (vit.mean, vit.std, vit.image_size) == ((0.5,) * 3, (0.5,) * 3, 224)
    assert open_clip.get_pretrained_cfg("ViT-B-16-quickgelu", "openai")["mean"] == open_clip.OPENAI_DATASET_MEAN
