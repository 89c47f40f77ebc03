"""timm models as backbones without a text tower: any name, a tag, a local checkpoint, or random weights."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastmerge.errors import UserError, nearest
from fastmerge.models.backbone import Backbone
from fastmerge.models.hub import from_hub_cache, missing_weights
from fastmerge.models.normalisation import Normalisation, Numbers, choose
from fastmerge.models.weights import ARCHIVE, check_finite, fit, read, reason, refused, some

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

    def __init__(self, name: str, model: Any, *, weights: str, normalisation: Normalisation | None = None):
        config = model.pretrained_cfg
        height, width = config["input_size"][1:]
        if height != width:
            raise UserError(f"model {name} takes {height} x {width} images; only square ones are supported")
        about = normalisation or Normalisation(config["mean"], config["std"], f"default of {name}")
        width_out = getattr(model, "head_hidden_size", None) or model.num_features  # of a layer behind the pooling
        super().__init__(name, model, weights=weights, image_size=height, feature_dim=width_out, **about._asdict())
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


def load_file(model: nn.Module, path: Path, name: str, content: Mapping[str, Tensor] | None = None) -> str:
    """Load a local checkpoint without its classifier; return what was unwrapped and left out, in words. content: tensors in
    memory, in place of the file's.

    Raises:
        UserError: the file is not a checkpoint of this model. (timm itself accepts files that lack tensors.)
    """
    if path.suffix in (".npz", ".npy"):
        try:
            timm.models.load_checkpoint(model, str(path))
        except Exception as error:  # numpy, key and shape errors share no base class
            raise refused(path, reason(error), name) from None
        check_finite(model.state_dict(), f"--pretrained {path}")
        return ""
    state, found = read(path, model.state_dict(), content)
    # such as resizing position embeddings
    mend = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if mend is not None:
        with contextlib.suppress(Exception):  # a file of another model: `fit` says what does not fit
            state = mend(dict(state), model)
    left = fit(model, state, path, extra=True, name=name)
    found += [f"without {some(left)}"] if left else []
    return f" ({', '.join(found)})" if found else ""


def load(
    name: str,
    pretrained: str,
    *,
    download: bool = False,
    tag: str | None = None,
    normalisation: Normalisation | None = None,
) -> tuple[Backbone, None]:
    """A timm model by name (see `timm.list_models()`), without a text tower. tag: of the weights in the file `pretrained`.
    normalisation: in place of the one that belongs to the weights."""
    if pretrained == "none" or Path(pretrained).is_file():
        file = None if pretrained == "none" else pretrained
        default = pair_of(timm.get_pretrained_cfg(name))
        about = choose(name, tags := tag_normalisations(name), default, tag=tag, file=None if normalisation else file)
        model = timm.create_model(f"{name}.{tag}" if tag in tags else name, num_classes=0)
        weights = "random weights"
        if file is not None:
            words = load_file(model, Path(file), name)
            twin = name.replace("_clip_", "_clip_quickgelu_")
            if ARCHIVE in words and twin != name and timm.is_model(twin):
                raise UserError(
                    f"--model {name} --pretrained {file}: the file is {ARCHIVE}, trained with QuickGELU, and the model uses "
                    f"GELU, which silently costs several points of accuracy. Use --model {twin}"
                )
            weights = f"file {file}{words}"
        return TimmBackbone(name, model, weights=weights, normalisation=normalisation or about), None
    path, tag, looked = find_weights(name, pretrained, download)
    overlay = None if path is None else {"file": str(path)}
    try:
        model = timm.create_model(f"{name}.{tag}", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub, urllib, sockets and file formats raise unrelated types
        if path is None:
            raise missing_weights(name, tag, looked, f", and the download failed ({reason(error)})") from None
        raise UserError(f"weights {tag!r} of model {name}: {path} cannot be read ({reason(error)})") from None
    check_finite(model.state_dict(), f"weights {tag!r} of model {name}")
    about = normalisation or Normalisation(*pair_of(timm.get_pretrained_cfg(f"{name}.{tag}")), f"tag {tag}")
    return TimmBackbone(name, model, weights=f"timm tag {tag}", normalisation=about), None


def pair_of(config: Any) -> tuple[Numbers, Numbers]:
    return tuple(config.mean), tuple(config.std)


def tag_normalisations(name: str) -> dict[str, tuple[Numbers, Numbers]]:
    """tag -> (mean, std) of the tags of `name`."""
    return {
        full.partition(".")[2]: pair_of(timm.get_pretrained_cfg(full)) for full in timm.list_pretrained(f"{name}.*")
    }
