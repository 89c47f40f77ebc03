"""timm models as backbones without a text tower: any name, a tag, a local checkpoint, or random weights."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastmerge.errors import UserError, first_line, nearest
from fastmerge.models.backbone import Backbone
from fastmerge.models.hub import from_hub_cache, missing_weights

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def reads_class_token(model: nn.Module | None) -> bool:
    """Whether `forward_intermediates` returns a class token after every block (ViT, DeiT, EVA, BEiT, ... with one). In
    CaiT, for instance, the class token enters only after the blocks."""
    read = getattr(model, "forward_intermediates", None)
    token = getattr(model, "cls_token", None) is not None and hasattr(model, "blocks")
    return token and read is not None and "return_prefix_tokens" in inspect.signature(read).parameters


class TimmBackbone(Backbone):
    """A timm model without its classifier; its features are those before the classifier (pooled and normalised)."""

    family = "timm"

    def __init__(self, name: str, model: Any, *, weights: str):
        config = model.pretrained_cfg
        height, width = config["input_size"][1:]
        if height != width:
            raise UserError(f"model {name} takes {height} x {width} images; only square ones are supported")
        about = {"image_size": height, "mean": config["mean"], "std": config["std"], "feature_dim": model.num_features}
        super().__init__(name, model, weights=weights, **about)
        if reads_class_token(model):
            self.has_class_token = True
            self.layers, self.width = len(model.blocks), model.embed_dim

    def _class_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens, blocks = self.tower.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")
        return self.tower.forward_head(tokens), torch.stack([prefix[:, 0] for _, prefix in blocks])


def find_weights(name: str, tag: str, download: bool) -> tuple[Path | None, str, list[str]]:
    """Return (weight file, tag, places searched); tag `default` is timm's own choice. The file is None if timm has to
    download it (`download`).

    Raises:
        UserError: unknown tag, or the weights are missing and `download` is False.
    """
    tags = [n.removeprefix(name + ".") for n in timm.list_pretrained(f"{name}.*")]
    config = (
        timm.get_pretrained_cfg(name if tag == "default" else f"{name}.{tag}") if tag in ("default", *tags) else None
    )
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(
            f"--pretrained {tag}: timm has no such tag for {name}, and there is no such file.{nearest(tag, tags)} "
            f"Tags: default, {', '.join(tags) or 'none'}; or a checkpoint file, or none for random weights"
        )
    looked, found_tag = [], config.tag or tag
    if config.hf_hub_id:
        if found := from_hub_cache(config.hf_hub_id, WEIGHT_FILES):
            return found, found_tag, []
        looked += [f"Hugging Face cache: {config.hf_hub_id}: {file}" for file in WEIGHT_FILES]
    if isinstance(config.url, str) and config.url.startswith("http"):
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
        if path.is_file():
            return path, found_tag, []
        looked.append(str(path))
    if not download:
        raise missing_weights(name, found_tag, looked)
    return None, found_tag, looked


def load_file(model: nn.Module, path: Path) -> None:
    """Load a local checkpoint without its classifier.

    Raises:
        UserError: the file is not a checkpoint of this model. (timm itself accepts files that lack tensors.)
    """
    # such as resizing position embeddings
    mend = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        result = timm.models.load_checkpoint(model, str(path), strict=False, filter_fn=mend)
        if result is not None and result.missing_keys:
            raise KeyError(f"it lacks {len(result.missing_keys)} tensors, such as {result.missing_keys[0]}")
    except Exception as error:  # unpickling, safetensors and key errors share no base class
        raise UserError(
            f"--pretrained {path}: cannot be loaded into this model ({first_line(error)}); expected its state dict"
        ) from None


def load(name: str, pretrained: str, *, download: bool = False) -> tuple[Backbone, None]:
    """A timm model by name (see `timm.list_models()`), without a text tower."""
    if pretrained == "none" or Path(pretrained).is_file():
        model, weights = timm.create_model(name, num_classes=0), "random weights"
        if pretrained != "none":
            load_file(model, Path(pretrained))
            weights = f"file {pretrained}"
        return TimmBackbone(name, model, weights=weights), None
    path, tag, looked = find_weights(name, pretrained, download)
    overlay = None if path is None else {"file": str(path)}
    try:
        model = timm.create_model(f"{name}.{tag}", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub, urllib, sockets and file formats raise unrelated types
        if path is None:
            raise missing_weights(name, tag, looked, f", and the download failed ({first_line(error)})") from None
        raise UserError(f"weights {tag!r} of model {name}: {path} cannot be read ({first_line(error)})") from None
    return TimmBackbone(name, model, weights=f"timm tag {tag}"), None
