"""Files of weights: what is unwrapped, what is refused and in which words, and the normalisation that goes with them."""

import argparse

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.models import load_backbone, openclip, tiny
from fastmerge.models.backbone import hash_tensors
from fastmerge.models.normalisation import Normalisation
from fastmerge.setup import Setup

MODELS = ["tiny", "test_vit"]


def state_of(model):
    made = tiny.create_tiny() if model == "tiny" else timm.create_model(model, num_classes=0)
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}


def saved(path, content):
    torch.save(content, path)
    return str(path)


def image_tower(model, state):
    """The hash of the image tower in a state dict."""
    mine = {n.removeprefix("visual."): t for n, t in state.items() if model != "tiny" or n.startswith("visual.")}
    return hash_tensors({f"tower.{name}": tensor for name, tensor in mine.items()})


WRAPS = {
    "entry state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "entry model": lambda s: {"model": s, "args": argparse.Namespace(lr=1.0)},
    "prefix module.": lambda s: {f"module.{n}": t for n, t in s.items()},
    "prefix model.": lambda s: {f"model.{n}": t for n, t in s.items()},
    "entry state_dict, prefix module., prefix _orig_mod.": lambda s: {
        "state_dict": {f"module._orig_mod.{n}": t for n, t in s.items()}
    },
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("said", WRAPS)
def test_wrapped_weights_are_understood_and_said(model, said, tmp_path):
    state = state_of(model)
    path = saved(tmp_path / "w.pt", WRAPS[said](state))
    backbone, encoder = load_backbone(model, path)
    assert backbone.weights == f"file {path} ({said})"
    assert backbone.weights_sha256 == image_tower(model, state) and (encoder is not None) == (model == "tiny")


@pytest.mark.parametrize("form", ["visual.", ""])
def test_an_image_tower_alone(form, tmp_path):
    state = state_of("tiny")
    tower = {form + n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    path = saved(tmp_path / "w.pt", tower)
    backbone, encoder = load_backbone("tiny", path)
    assert encoder is None and backbone.weights == f"file {path} (image tower alone)"
    assert backbone.weights_sha256 == image_tower("tiny", state)
    assert Setup(parse(["--pretrained", path])).head.kind == "prototype"
    with pytest.raises(UserError, match=r"--head text: .*no text tower; use --head prototype"):
        Setup(parse(["--pretrained", path, "--head", "text"]))


def test_a_timm_file_with_other_tensors_says_what_it_leaves_out(tmp_path):
    path = saved(tmp_path / "w.pt", timm.create_model("test_vit", num_classes=7).state_dict())
    assert load_backbone("test_vit", path)[0].weights == f"file {path} (without head.weight, head.bias)"


@pytest.mark.parametrize("model", MODELS)
def test_fp16_with_another_position_table(model, tmp_path):
    if model == "tiny":
        config = tiny.CONFIG | {"vision_cfg": tiny.CONFIG["vision_cfg"] | {"image_size": 48}}
        made, name = open_clip.CLIP(**config), "positional_embedding"
    else:
        made, name = timm.create_model(model, num_classes=0, img_size=96), "pos_embed"
    path = tmp_path / "w.safetensors"
    save_file({n: t.half().contiguous() for n, t in made.state_dict().items()}, path)
    tower = load_backbone(model, str(path))[0].tower
    table = getattr(tower, name)
    assert table.dtype == torch.float32 and bool(table.isfinite().all())
    assert table.shape == (17, 128) if model == "tiny" else table.shape[1] == 101
    other = (made.visual if model == "tiny" else made).state_dict()
    torch.testing.assert_close(table[..., :1, :], other[name][..., :1, :].half().float())  # the class token's row


def last(state):
    return list(state)[-1]


BROKEN = {
    "missing: 1 of": lambda s: {n: t for n, t in s.items() if n != last(s)},
    "of another shape: 1, ": lambda s: s | {last(s): torch.zeros(3, 5, 7)},
    " values that are not finite: ": lambda s: s | {last(s): s[last(s)] * torch.nan},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("says", BROKEN)
def test_what_does_not_fit_is_named(model, says, tmp_path):
    state = state_of(model)
    path = saved(tmp_path / "w.pt", BROKEN[says](state))
    with pytest.raises(UserError) as caught:
        load_backbone(model, path)
    assert all(part in str(caught.value) for part in (f"--pretrained {path}", says, last(state))), caught.value


def test_names_that_open_clip_does_not_know_are_an_error(tmp_path):
    path = saved(tmp_path / "w.pt", state_of("tiny") | {f"new.{i}": torch.ones(1) for i in range(9)})
    with pytest.raises(UserError, match=r"not in the model: 9, new.0, new.1, new.2 and 6 more"):
        load_backbone("tiny", path)


class Thing:
    """Any class: unpickling it needs the code that defines it."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": {"x": torch.ones(1)}, "trainer": Thing()}, "it holds other Python objects than tensors"),
        ({"epoch": 3}, "it holds the entries epoch, not tensors by name"),
        ([torch.ones(1)], "it holds a list, not tensors by name"),
    ],
)
def test_no_advice_to_switch_safety_off(model, content, says, tmp_path):
    with pytest.raises(UserError, match=says) as caught:
        load_backbone(model, saved(tmp_path / "w.pt", content))
    assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("w.pt", b"text"), ("w.safetensors", b"text"), ("w.npz", b"text")])
@pytest.mark.parametrize("model", MODELS)
def test_damaged_files(model, name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded into this model") as caught:
        load_backbone(model, str(tmp_path / name))
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_the_weights_of_a_timm_tag_are_checked(monkeypatch):
    def loaded(*args, **kwargs):
        model = made(*args, **kwargs | {"pretrained": False})
        model.norm.weight.data[0] = torch.inf
        return model

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", loaded)
    with pytest.raises(
        UserError, match=r"weights 'r160_in1k' of model test_vit: 1 tensor holds .* not finite: norm.weight"
    ):
        load_backbone("test_vit", "r160_in1k", download=True)


# -- normalisation -----------------------------------------------------------------------------------------------------

HALF = (0.5, 0.5, 0.5)


def small_file(name, path, monkeypatch):
    """A file of model `name`, which is made small: its tags and settings stay as they are."""
    made = timm.create_model
    small = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32}
    monkeypatch.setattr(timm, "create_model", lambda n, **k: made(n, **k | small))
    return saved(path, timm.create_model(name, num_classes=0).state_dict())


def test_a_file_takes_what_all_tags_agree_on(tmp_path, monkeypatch):
    path = small_file("vit_small_patch14_dinov2", tmp_path / "w.pt", monkeypatch)
    backbone, _ = load_backbone("vit_small_patch14_dinov2", path)
    config = timm.get_pretrained_cfg("vit_small_patch14_dinov2.lvd142m")
    assert (backbone.mean, backbone.std) == (config.mean, config.std) != (HALF, HALF)
    assert backbone.normalisation.source == "all tags of vit_small_patch14_dinov2 agree"


def test_tags_that_differ_have_to_be_named(tmp_path, monkeypatch):
    name = "vit_base_patch16_224"
    path = small_file(name, tmp_path / "w.pt", monkeypatch)
    with pytest.raises(UserError) as caught:
        load_backbone(name, path)
    words = ("mean 0.5 0.5 0.5", "mean 0.485 0.456 0.406", "mae", f"--model {name}.TAG", "--mean and --std")
    assert all(word in str(caught.value) for word in words), caught.value
    mae, _ = load_backbone(f"{name}.mae", path)
    assert mae.mean == (0.485, 0.456, 0.406) and mae.normalisation.source == "tag mae"
    assert load_backbone(f"{name}.augreg_in21k", path)[0].mean == HALF
    given, _ = load_backbone(name, path, normalisation=Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "given"))
    assert (given.mean, given.normalisation.source) == ((0.1, 0.2, 0.3), "given")
    with pytest.raises(UserError, match=r"has no tag 'ma'. Did you mean: mae"):
        load_backbone(f"{name}.ma", path)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "MobileCLIP-S1", "ViT-B-16-quickgelu"])
def test_a_file_of_open_clip_takes_what_its_tags_say(name, tmp_path, monkeypatch):
    def small(*args):
        clip = tiny.create_tiny()
        clip.visual.image_mean = clip.visual.image_std = None  # create_model sets them
        return clip

    monkeypatch.setattr(openclip, "create", small)
    backbone, _ = load_backbone(name, saved(tmp_path / "w.pt", state_of("tiny")))
    tag = open_clip.list_pretrained_tags_by_model(name)[0]
    config = open_clip.get_pretrained_cfg(name, tag)
    assert (backbone.mean, backbone.std) == (tuple(config["mean"]), tuple(config["std"]))
    assert load_backbone(f"{name}.{tag}", saved(tmp_path / "w.pt", state_of("tiny")))[0].mean == backbone.mean


def test_an_archive_of_openai_in_a_timm_model_needs_quickgelu(tmp_path, monkeypatch):
    name, twin = "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"
    small_file(name, tmp_path / "unused.pt", monkeypatch)
    vision = {"image_size": 32, "patch_size": 16, "width": 24, "head_width": 8, "layers": 1}
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    state = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).state_dict()
    extra = {n: torch.tensor(1) for n in ("input_resolution", "context_length", "vocab_size")}
    path = saved(tmp_path / "archive.pt", state | extra)
    given = Normalisation(HALF, HALF, "given")
    with pytest.raises(UserError, match=rf"--model {name} .*archive.pt: .*QuickGELU.*Use --model {twin}$"):
        load_backbone(name, path, normalisation=given)
    assert "OpenAI's archive" in load_backbone(twin, path, normalisation=given)[0].weights


def test_mean_and_std_of_the_command_line():
    backbone = Setup(parse("--mean 0.1 0.2 0.3 --std 0.4 0.5 0.6 --head linear".split())).backbone
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert str(backbone.normalisation) == "mean 0.1 0.2 0.3, std 0.4 0.5 0.6 (--mean and --std)"


def test_the_default_of_the_embedded_model():
    assert (
        str(load_backbone("tiny", "glyphs")[0].normalisation) == "mean 0.5 0.5 0.5, std 0.3 0.3 0.3 (of the tiny model)"
    )
