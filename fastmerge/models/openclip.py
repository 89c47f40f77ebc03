"""open_clip models: any name and tag, a local checkpoint, or random weights. The image tower becomes the backbone; the
text tower only makes the frozen head."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.errors import UserError, first_line, nearest
from fastmerge.models import tiny
from fastmerge.models.backbone import Backbone, hash_tensors
from fastmerge.models.hub import from_hub_cache, hub_access, missing_weights
from fastmerge.models.timm_vit import reads_class_token

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipBackbone(Backbone):
    """`clip.visual` of an open_clip model; its features equal `encode_image` before normalisation."""

    family = "open_clip"

    def __init__(self, name: str, visual: nn.Module, *, weights: str, image_size: int, mean, std, feature_dim: int):
        super().__init__(
            name, visual, weights=weights, image_size=image_size, mean=mean, std=std, feature_dim=feature_dim
        )
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            self.has_class_token = True
            self.layers = len(visual.transformer.resblocks)
            self.width = visual.class_embedding.shape[-1]
        elif (
            reads_class_token(trunk := getattr(visual, "trunk", None)) and trunk is not None
        ):  # a timm trunk, such as EVA
            self.has_class_token, self.layers, self.width = True, len(trunk.blocks), trunk.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        features = self.tower(images)
        return features[0] if isinstance(features, tuple) else features  # CoCa towers also return their tokens

    def _class_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.tower.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
        return out["image_features"], torch.stack([t[:, 0] for t in out["image_intermediates_prefix"]])


class TextEncoder:
    """The text tower of a CLIP model. `logit_scale`: exp of the learned scale (100 for OpenAI's models).

    It takes over `clip` and deletes its image tower, so that the two towers can be on different devices.
    """

    def __init__(self, clip: Any, tokenize: Callable[[Sequence[str]], Tensor]):
        self.clip, self.tokenize = clip.eval(), tokenize
        del clip.visual
        self.logit_scale = float(clip.logit_scale.detach().exp())

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the tower's values."""
        return hash_tensors(self.clip.state_dict())

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        batch_size: int = 512,
        *,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """`[n, feature_dim]` fp32 on the CPU, each row L2-normalised. The tower is moved to `device` and stays there;
        `progress(done, n)` is called after every batch.

        Raises:
            UserError: the model's tokenizer is not on this machine.
        """
        self.clip.to(device)
        rows = []
        for start in range(0, len(prompts), batch_size):
            tokens = self.tokenize(list(prompts[start : start + batch_size])).to(device)
            rows.append(F.normalize(self.clip.encode_text(tokens).float(), dim=1).cpu())
            if progress is not None:
                progress(min(start + batch_size, len(prompts)), len(prompts))
        return torch.cat(rows)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings: open_clip reports "No pretrained weights loaded" before fastmerge loads the weights itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def create(name: str, download: bool) -> Any:
    """Create the model with random weights.

    Raises:
        UserError: its text tower is a Hugging Face model whose configuration or package is missing.
    """
    source = open_clip.get_model_config(name)["text_cfg"].get("hf_model_name")
    try:
        with quiet(), hub_access(download):
            # pretrained_text=False keeps a Hugging Face text tower from downloading its weights
            return open_clip.create_model(name, load_weights=False, pretrained_text=False)
    except (ImportError, OSError, RuntimeError) as error:
        if source is None:
            raise
        raise UserError(
            f"model {name}: its text tower, {source} of the Hugging Face hub, cannot be created ({first_line(error)}). "
            "Install the package transformers, and allow the download of its configuration with --download"
        ) from None


def tokenizer(name: str, download: bool) -> Callable[[Sequence[str]], Tensor]:
    """The model's tokenizer. A missing one raises only when a prompt is encoded, because the image tower and the
    other heads do not need it."""
    try:
        with quiet(), hub_access(download):
            return open_clip.get_tokenizer(name)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        source = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name", "its own file")
        message = (
            f"model {name}: its tokenizer ({source}) is not here ({first_line(error)}). Install the package transformers "
            "and allow the download with --download, or use --head prototype or --head linear"
        )

    def refuse(prompts: Sequence[str]) -> Tensor:
        raise UserError(message)

    return refuse


def find_weights(name: str, tag: str, download: bool) -> Path:
    """Find the file with the weights `tag` of `name`; download it only with `download`.

    Raises:
        UserError: unknown tag or QuickGELU mismatch (both before any download), missing file, or failed download.
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
            f"model uses {'QuickGELU' if has else 'GELU'}, which silently costs several points of accuracy. "
            f"Use --model {other}"
        )
    looked = []
    if hub := config.get("hf_hub", ""):
        repository, _, file = hub.rpartition("/")
        # open_clip prefers a safetensors file of the same name
        names = (str(Path(file).with_suffix(".safetensors")), file) if file else WEIGHT_FILES
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
    except Exception as error:  # the hub, urllib and sockets raise unrelated types
        raise missing_weights(name, tag, looked, f", and the download failed ({first_line(error)})") from None


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
    except Exception as error:  # unpickling, safetensors and key errors share no base class
        raise UserError(
            f"--pretrained {path}: cannot be loaded into this model ({first_line(error)}); expected its state dict"
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
        raise UserError(f"--pretrained {pretrained}: the tiny model takes the tag glyphs, a file, or none")
    dim: Any = tiny.CONFIG["embed_dim"]
    about: dict[str, Any] = {"image_size": tiny.IMAGE_SIZE, "mean": tiny.IMAGE_MEAN, "std": tiny.IMAGE_STD}
    backbone = OpenClipBackbone("tiny", clip.visual, weights=weights, feature_dim=dim, **about)
    return backbone, TextEncoder(clip, tiny.tokenize)


def load(name: str, pretrained: str, *, download: bool = False) -> tuple[Backbone, TextEncoder]:
    """An open_clip model by name (see `open_clip.list_models()`)."""
    if name == "tiny":
        return load_tiny(pretrained)
    path: Path | None = None
    weights: str = "random weights"
    config: dict[str, Any] = {}
    if pretrained != "none" and Path(pretrained).is_file():
        path, weights = Path(pretrained), f"file {pretrained}"
    elif pretrained != "none":
        path, weights = find_weights(name, pretrained, download), f"open_clip tag {pretrained}"
        config = open_clip.get_pretrained_cfg(name, pretrained)
    clip = create(name, download)
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
    backbone = OpenClipBackbone(name, clip.visual, weights=weights, **about)
    return backbone, TextEncoder(clip, tokenizer(name, download))
