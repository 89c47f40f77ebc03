"""open_clip models: any name and tag, a local checkpoint, or random weights. The image tower becomes the backbone, the text
tower only serves to make the frozen head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.errors import UserError, nearest
from fastmerge.models import tiny
from fastmerge.models.backbone import Backbone, from_hub_cache, missing_weights

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipBackbone(Backbone):
    """`clip.visual` of an open_clip model; its features equal `encode_image` before normalisation."""

    family = "open_clip"

    def __init__(self, name: str, visual: nn.Module, *, weights: str, image_size: int, mean, std, feature_dim: int):
        about = {"weights": weights, "image_size": image_size, "mean": mean, "std": std, "feature_dim": feature_dim}
        super().__init__(name, visual, **about)
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            self.has_class_token = True
            self.layers = len(visual.transformer.resblocks)
            self.width = visual.class_embedding.shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        features = self.tower(images)
        return features[0] if isinstance(features, tuple) else features  # CoCa towers also give their tokens

    def _class_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.tower.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
        return out["image_features"], torch.stack([t[:, 0] for t in out["image_intermediates_prefix"]])


class TextEncoder:
    """The text tower of a CLIP model. `logit_scale`: exp of the learned scale (100 for OpenAI's models)."""

    def __init__(self, clip: nn.Module, tokenize: Callable[[Sequence[str]], Tensor]):
        self.clip, self.tokenize = clip.eval(), tokenize
        self.logit_scale = float(clip.logit_scale.detach().exp())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 512) -> Tensor:
        """`[n, feature_dim]` fp32 on the CPU, each row L2-normalised."""
        device = next(self.clip.parameters()).device
        parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        rows = [F.normalize(self.clip.encode_text(self.tokenize(list(p)).to(device)).float(), dim=1) for p in parts]
        return torch.cat(rows).cpu()


def find_weights(name: str, tag: str, download: bool) -> Path:
    """The file with the weights `tag` of `name`; fetched only with `download`.

    Raises:
        UserError: unknown tag, QuickGELU mismatch (both before anything is fetched), file not here, download failed.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        raise UserError(
            f"--pretrained {tag}: open_clip has no such tag for {name}, and there is no such file."
            f"{nearest(tag, tags)} Tags: {', '.join(tags) or 'none'}; or a checkpoint file, or none for random weights"
        )
    wants, has = bool(config.get("quick_gelu", False)), bool(open_clip.get_model_config(name).get("quick_gelu", False))
    if wants != has:
        other = f"{name}-quickgelu" if wants else name.removesuffix("-quickgelu")
        raise UserError(
            f"--model {name} --pretrained {tag}: these weights were trained with {'QuickGELU' if wants else 'GELU'} and the "
            f"model uses {'QuickGELU' if has else 'GELU'}, which costs several points without any other sign. "
            f"Use --model {other}"
        )
    looked = []
    if hub := config.get("hf_hub", ""):
        repository, _, file = hub.rpartition("/")
        names = (file,) if file else WEIGHT_FILES
        if found := from_hub_cache(repository, names):
            return found
        looked += [f"Hugging Face cache: {repository}: {n}" for n in names]
    if url := config.get("url", ""):
        path = Path.home() / ".cache" / "clip" / Path(url).name
        if path.is_file():
            return path
        looked.append(str(path))
    if not download:
        raise missing_weights(name, tag, looked)
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # the hub, urllib and the socket each raise their own kinds
        raise missing_weights(name, tag, looked, f", and the download failed ({error})") from None


def load_file(clip: nn.Module, path: Path) -> None:
    """Load a checkpoint (.safetensors, .pt, .bin, or OpenAI's TorchScript archive) into `clip`.

    Raises:
        UserError: the file is not a checkpoint of this model.
    """
    try:
        try:
            open_clip.factory.load_checkpoint(clip, str(path))
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
            extra = ("input_resolution", "context_length", "vocab_size")
            clip.load_state_dict({k: v.float() for k, v in state.items() if k not in extra})
    except Exception as error:  # unpickling, safetensors and key errors have nothing in common
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--pretrained {path}: cannot be loaded into this model ({first}); expected its state dict"
        ) from None


def load_tiny(pretrained: str) -> tuple[Backbone, TextEncoder]:
    """The embedded CLIP: tag `glyphs`, `none`, or a file with its state dict."""
    if pretrained == "glyphs":
        clip, weights = tiny.load_tiny(), "embedded weights 'glyphs'"
    elif pretrained == "none":
        clip, weights = tiny.create_tiny(), "random weights"
    elif Path(pretrained).is_file():
        clip, weights = tiny.create_tiny(), f"file {pretrained}"
        load_file(clip, Path(pretrained))
    else:
        raise UserError(f"--pretrained {pretrained}: the tiny model has the tag glyphs; or give a file, or none")
    about = {"image_size": tiny.IMAGE_SIZE, "mean": tiny.IMAGE_MEAN, "std": tiny.IMAGE_STD}
    backbone = OpenClipBackbone("tiny", clip.visual, weights=weights, feature_dim=tiny.CONFIG["embed_dim"], **about)
    return backbone, TextEncoder(clip, tiny.tokenize)


def load(name: str, pretrained: str, *, download: bool = False) -> tuple[Backbone, TextEncoder]:
    """An open_clip model by name (see `open_clip.list_models()`)."""
    if name == "tiny":
        return load_tiny(pretrained)
    if pretrained == "none":
        path, weights, config = None, "random weights", {}
    elif Path(pretrained).is_file():
        path, weights, config = Path(pretrained), f"file {pretrained}", {}
    else:
        path, weights = find_weights(name, pretrained, download), f"open_clip tag {pretrained}"
        config = open_clip.get_pretrained_cfg(name, pretrained)
    clip = open_clip.create_model(name, load_weights=False)
    if path is not None:
        load_file(clip, path)
    size = clip.visual.image_size
    sides = size if isinstance(size, tuple | list) else (size, size)
    if sides[0] != sides[1]:
        raise UserError(f"model {name} takes {sides[0]} x {sides[1]} images; only square ones are supported")
    feature_dim = open_clip.get_model_config(name)["embed_dim"]
    mean = config.get("mean") or clip.visual.image_mean or open_clip.OPENAI_DATASET_MEAN
    std = config.get("std") or clip.visual.image_std or open_clip.OPENAI_DATASET_STD
    about = {"image_size": sides[0], "mean": mean, "std": std, "feature_dim": feature_dim}
    if not math.isfinite(float(clip.logit_scale.detach().exp())):
        raise UserError(f"--pretrained {pretrained}: its logit scale is not finite")
    return OpenClipBackbone(name, clip.visual, weights=weights, **about), TextEncoder(
        clip, open_clip.get_tokenizer(name)
    )
