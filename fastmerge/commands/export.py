"""Write a saved model as a file of another library.

    fastmerge export runs/glyphs-cil5-tiny/trm-seed0 --format open_clip --out tiny-trm

open_clip: `open_clip_model.safetensors` with both towers and the logit scale (the text tower is the starting model's), and
  `open_clip_config.json`; open_clip.create_model("local-dir:DIR") loads both.
timm: `model.safetensors` with the classifier of a linear head, and `config.json`; timm.create_model(NAME,
  checkpoint_path=FILE, num_classes=N) loads it.
hf: a folder for transformers: CLIPVisionModelWithProjection (open_clip ViT) or ViTModel (timm ViT).from_pretrained(DIR).

`head.safetensors` holds the head (of CoOp: with the class rows that it learned) and `classes.json` the class names and the
normalisation. The command prints how to load the files. Names of tensors follow open_clip 3, timm 1 and transformers 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmerge.checkpoint import save_json, write_atomically
from fastmerge.errors import UserError
from fastmerge.models import load_backbone
from fastmerge.models.saved import Model, beside_weights, built, read

FORMATS = ("open_clip", "timm", "hf")
INTERPOLATION = "bicubic"


def main(argv: Sequence[str]) -> int:
    """Run `fastmerge export`; returns the exit code.

    Raises:
        UserError: the model cannot be expressed in this format, a file to write exists, or the folder cannot be written.
    """
    parser = argparse.ArgumentParser("fastmerge export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="folder of a finished run (runs/NAME/METHOD-seed0), or its model.safetensors")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; no file in it is replaced")
    parser.add_argument("--download", action="store_true", help="allow the download of the starting model's text tower")
    given = parser.parse_args(argv)
    own, recipe = read(given.model)
    if added := beside_weights(own, recipe):
        raise UserError(
            f"{given.model}: {recipe['method']} computes {added!r} besides the weights, which no other library does. "
            "Use it with fastmerge.load, or train without (CMM: --cmm.inference plain)"
        )
    model = built(own, recipe, given.model)
    tensors, files, hint = {"open_clip": open_clip_files, "timm": timm_files, "hf": hf_files}[given.format](
        model, given.out, given.download
    )
    names = [*tensors, "head.safetensors", *files, "classes.json"]
    for path in (given.out / name for name in names):
        if path.exists() or path.is_symlink():
            raise UserError(f"--out {given.out}: {path} exists already; choose another folder, or delete it")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {given.out}: cannot write there ({error}); choose another folder") from None
    head = {name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}
    for name, content in {**tensors, "head.safetensors": head}.items():
        write_atomically(given.out / name, writer(content))
    about = {name: model.recipe[name] for name in ("class_names", "candidates", "head", "templates", "input", "method")}
    for name, values in {**files, "classes.json": about}.items():
        save_json(given.out / name, values)
    print(f"{given.out}: {', '.join(names)}")
    print(f"load it with\n  {hint}")
    return 0


def writer(tensors: dict[str, Tensor]):
    own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    return lambda path: save_file(own, path, metadata={"format": "pt"})


def wrong_family(model: Model, wanted: str, use: str) -> UserError:
    return UserError(f"model {model.backbone.name} is not {wanted}; use --format {use}")


def open_clip_files(model: Model, out: Path, download: bool) -> tuple[dict, dict, str]:
    """The whole CLIP: the text tower and the logit scale of the starting model, with this image tower."""
    import open_clip

    from fastmerge.models import tiny

    backbone, settings = model.backbone, model.recipe["config"]["model"]
    if backbone.family != "open_clip":
        raise wrong_family(model, "an open_clip model", "timm")
    torch.manual_seed(model.recipe["seed"])  # --pretrained none draws the text tower from the seed
    _, encoder = load_backbone(settings["model"], settings["pretrained"], download=download)
    assert encoder is not None
    visual = {f"visual.{name}": tensor for name, tensor in backbone.tower.state_dict().items()}
    config = tiny.CONFIG if backbone.name == "tiny" else open_clip.get_model_config(backbone.name)
    preprocess = {
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "interpolation": INTERPOLATION,
        "resize_mode": "shortest",
    }
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    hint = f'open_clip.create_model_and_transforms("local-dir:{out}")'
    if backbone.name == "tiny":
        hint += "   # its tokenizer is fastmerge.models.tiny.tokenize"
    tensors = {**encoder.clip.state_dict(), **visual}
    return {"open_clip_model.safetensors": tensors}, {"open_clip_config.json": about}, hint


def timm_files(model: Model, out: Path, download: bool) -> tuple[dict, dict, str]:
    """The image tower, with a linear head as its classifier."""
    backbone = model.backbone
    if backbone.family != "timm":
        raise wrong_family(model, "a timm model", "open_clip")
    tower: Any = backbone.tower
    tensors, classes = dict(tower.state_dict()), 0
    if model.recipe["head"] == "linear":
        classes = len(model.class_names)
        names = tower.pretrained_cfg.get("classifier")
        if not isinstance(names, str):
            raise UserError(f"model {backbone.name} has {names} as classifiers; only a single one can be exported")
        weight, bias = linear_head(model)
        tensors |= {f"{names}.weight": weight, f"{names}.bias": bias}
    own = {"num_classes": classes, "input_size": [3, backbone.image_size, backbone.image_size]}
    own |= {"mean": list(backbone.mean), "std": list(backbone.std), "interpolation": INTERPOLATION, "crop_pct": 1.0}
    about = {"architecture": backbone.name, "num_classes": classes, "pretrained_cfg": own}
    hint = f'timm.create_model("{backbone.name}", checkpoint_path="{out / "model.safetensors"}", num_classes={classes})'
    return {"model.safetensors": tensors}, {"config.json": about}, hint


def linear_head(model: Model) -> tuple[Tensor, Tensor]:
    """Weight `[classes, d]` and bias `[classes]` in the order of the class names; unknown classes have the bias -inf."""
    head: Any = model.head
    rows, known = head.row, model.get_buffer("known") & (head.row >= 0)
    weight = torch.zeros(len(rows), head.weight.shape[1]).masked_scatter(known[:, None], head.weight[rows[known]])
    bias = torch.full((len(rows),), -torch.inf).masked_scatter(known, head.bias[rows[known]])
    return weight, bias


def hf_files(model: Model, out: Path, download: bool) -> tuple[dict, dict, str]:
    """A ViT under the names of transformers.

    Raises:
        UserError: another architecture than a plain ViT.
    """
    tower: Any = model.backbone.tower
    convert = clip_vision if model.backbone.family == "open_clip" else vit
    try:
        tensors, config = convert(tower, model.backbone.image_size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model {model.backbone.name} ({type(tower).__name__}) is not a plain ViT of open_clip or timm "
            f"({error}); use --format {model.backbone.family}"
        ) from None
    processor = {
        "image_processor_type": "CLIPImageProcessor"
        if config["model_type"] == "clip_vision_model"
        else "ViTImageProcessor",
        "image_mean": list(model.backbone.mean),
        "image_std": list(model.backbone.std),
        "size": {"shortest_edge": model.backbone.image_size},
        "crop_size": {"height": model.backbone.image_size, "width": model.backbone.image_size},
        "do_center_crop": True,
        "resample": 3,
    }
    files = {"config.json": config, "preprocessor_config.json": processor}
    return {"model.safetensors": tensors}, files, f'transformers.{config["architectures"][0]}.from_pretrained("{out}")'


def clip_vision(tower: Any, image_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """open_clip's VisionTransformer as CLIPVisionModelWithProjection."""
    state, blocks = dict(tower.state_dict()), tower.transformer.resblocks
    width, patch = state["class_embedding"].numel(), state["conv1.weight"].shape[-1]
    if tower.attn_pool is not None or tower.pool_type != "tok" or "proj" not in state or "ln_pre.weight" not in state:
        raise ValueError("another pooling, or no projection")
    activation = {nn.GELU: "gelu", "QuickGELU": "quick_gelu"}
    act = type(blocks[0].mlp.gelu)
    new = {
        "vision_model.embeddings.class_embedding": state.pop("class_embedding"),
        "vision_model.embeddings.patch_embedding.weight": state.pop("conv1.weight"),
        "vision_model.embeddings.position_embedding.weight": state.pop("positional_embedding"),
        "visual_projection.weight": state.pop("proj").T,
    }
    for old, name in (
        ("ln_pre", "pre_layrnorm"),
        ("ln_post", "post_layernorm"),
    ):  # the name in transformers is misspelt
        new |= {f"vision_model.{name}.{p}": state.pop(f"{old}.{p}") for p in ("weight", "bias")}
    for i in range(len(blocks)):
        old, name = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        for p, joined in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            parts = state.pop(f"{old}.attn.{joined}").chunk(3)
            new |= {f"{name}.self_attn.{x}_proj.{p}": part for x, part in zip("qkv", parts, strict=True)}
            pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            pairs |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            new |= {f"{name}.{b}.{p}": state.pop(f"{old}.{a}.{p}") for a, b in pairs.items()}
    if state:
        raise ValueError(f"it also has {next(iter(state))}")
    config = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "projection_dim": new["visual_projection.weight"].shape[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": patch,
        "hidden_act": activation.get(act) or activation[act.__name__],
        "layer_norm_eps": blocks[0].ln_1.eps,
    }
    return new, config


def vit(tower: Any, image_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """timm's VisionTransformer as ViTModel without pooler."""
    state, blocks = dict(tower.state_dict()), tower.blocks
    if tower.global_pool != "token" or not isinstance(tower.fc_norm, nn.Identity):
        raise ValueError(f"it pools by {tower.global_pool!r}")
    new = {
        "embeddings.cls_token": state.pop("cls_token"),
        "embeddings.position_embeddings": state.pop("pos_embed"),
    }
    for p in ("weight", "bias"):
        new[f"embeddings.patch_embeddings.projection.{p}"] = state.pop(f"patch_embed.proj.{p}")
        new[f"layernorm.{p}"] = state.pop(f"norm.{p}")
    for i in range(len(blocks)):
        old, name = f"blocks.{i}", f"encoder.layer.{i}"
        for p in ("weight", "bias"):
            parts = state.pop(f"{old}.attn.qkv.{p}").chunk(3)
            places = zip(("query", "key", "value"), parts, strict=True)
            new |= {f"{name}.attention.attention.{x}.{p}": part for x, part in places}
            pairs = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
            pairs |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
            new |= {f"{name}.{b}.{p}": state.pop(f"{old}.{a}.{p}") for a, b in pairs.items()}
    if state:
        raise ValueError(f"it also has {next(iter(state))}")
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": tower.embed_dim,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": tower.patch_embed.patch_size[0],
        "hidden_act": "gelu",
        "layer_norm_eps": blocks[0].norm1.eps,
        "qkv_bias": True,
    }
    return new, config
