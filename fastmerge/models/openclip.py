"""open_clip models: any name and tag, a local checkpoint, or random weights. The image tower becomes the backbone; the
text tower only makes the frozen head."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from fastmerge.models.normalisation import Normalisation, choose
from fastmerge.models.timm_vit import reads_class_token
from fastmerge.models.weights import ARCHIVE, check_finite, fit, read, reason, refused

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

LOGITS = ("logit_scale", "logit_bias")
TWIN = "-quickgelu"  # ends the name of a model that open_clip has with GELU too


class OpenClipBackbone(Backbone):
    """`clip.visual` of an open_clip model; its features equal `encode_image` before normalisation."""

    family = "open_clip"

    def __init__(self, name: str, visual: nn.Module, **about: Any):
        super().__init__(name, visual, **about)
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            self.has_class_token = True
            self.layers = len(visual.transformer.resblocks)
            self.width = visual.class_embedding.shape[-1]
        elif (
            reads_class_token(trunk := getattr(visual, "trunk", None)) and trunk is not None
        ):  # a timm trunk, such as EVA
            self.has_class_token, self.layers, self.width = True, len(trunk.blocks), trunk.embed_dim

    def _features(self, images: Tensor) -> Tensor:
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


def check_activation(name: str, tag: str) -> None:
    """Raise UserError if the weights `tag` were trained with another activation than `name` has."""
    wants, has = quick_gelu(open_clip.get_pretrained_cfg(name, tag)), quick_gelu(open_clip.get_model_config(name))
    other = f"{name}{TWIN}" if wants else name.removesuffix(TWIN)
    if wants != has and other != name:  # roberta-ViT-B-32 has QuickGELU always, and its tag does not say so
        raise UserError(
            f"--model {name} --pretrained {tag}: these weights were trained with {'QuickGELU' if wants else 'GELU'} and the "
            f"model uses {'QuickGELU' if has else 'GELU'}, which silently costs several points of accuracy. "
            f"Use --model {other}"
        )


def quick_gelu(config: Mapping[str, Any]) -> bool:
    """Whether open_clip's entry for a model or a tag says QuickGELU."""
    return bool(config.get("quick_gelu", False))


def check_file_activation(name: str, file: str, words: str, tag: str | None) -> str:
    """Check that the file was trained with the activation that `name` has, where open_clip has this model with either.

    words: what was found in the file. tag: that the user says it comes from. A name in `-quickgelu` says the activation
    by itself. Returns what the user should know, in words. A model that no tag has with GELU is taken at its name.

    Raises:
        UserError: OpenAI's own archive for a model with GELU, or nothing says how the file was trained.
    """
    twin = f"{name}{TWIN}"
    if twin not in open_clip.list_models():
        return ""
    if ARCHIVE in words:
        raise UserError(
            f"--model {name} --pretrained {file}: the file is {ARCHIVE}, trained with QuickGELU, and the model uses "
            f"GELU, which silently costs several points of accuracy. Use --model {twin}"
        )
    if tag is not None:  # checked against its own activation
        return ""
    tags = open_clip.list_pretrained_tags_by_model(name)
    plain = [known for known in tags if not quick_gelu(open_clip.get_pretrained_cfg(name, known))]
    if not plain:
        return f" (computed with GELU; for weights trained with QuickGELU, as OpenAI's, use --model {twin})"
    raise UserError(
        f"--model {name} --pretrained {file}: nothing says whether the file was trained with GELU or QuickGELU, and the "
        "wrong one silently costs several points of accuracy. "
        f"For QuickGELU, as in OpenAI's models, use --model {twin}. For GELU name the tag that the file comes from, "
        f"--model {name}.TAG with TAG one of {', '.join(plain)}"
    )


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
    check_activation(name, tag)
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


def load_file(clip: Any, path: Path, name: str, content: Mapping[str, Tensor] | None = None) -> tuple[str, bool]:
    """Load a checkpoint into `clip`: of this model, of OpenAI, of Apple's MobileCLIP, of Big Vision (.npz), or of the image
    tower alone, which leaves the text tower random. content: tensors in memory, in place of the file's.

    Returns what was unwrapped, in words, and whether the text tower was there. Raises UserError for another file.
    """
    own = clip.state_dict()
    if path.suffix in (".npz", ".npy"):
        try:
            open_clip.convert.load_big_vision_weights(clip, str(path))
        except Exception as error:  # numpy, key and shape errors share no base class
            raise refused(path, reason(error), name) from None
        check_finite(clip.state_dict(), f"--pretrained {path}")
        return "", True
    state, found = read(path, own, content)
    if not any(key.startswith("visual.") for key in state):  # names that only the image tower has, without its prefix
        bare = not state.keys().isdisjoint(clip.visual.state_dict().keys() - own.keys())
        state = {f"visual.{key}": tensor for key, tensor in state.items()} if bare else state
    if all(key.startswith("visual.") or key in LOGITS for key in state):
        state = {key: tensor for key, tensor in state.items() if key not in LOGITS}
        _resize(state, clip)
        fit(
            clip.visual,
            {key.removeprefix("visual."): t for key, t in state.items()},
            path,
            name=f"{name}'s image tower",
        )
        return _words([*found, "image tower alone"]), False
    state = open_clip.convert.convert_state_dict(clip, state)
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    for key in LOGITS:  # a number or a vector of one
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    if "logit_bias" in own:  # a model without it, trained on as SigLIP
        state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    if (ids := "text.transformer.embeddings.position_ids") not in own:  # of older transformers
        state.pop(ids, None)
    _resize(state, clip)
    fit(clip, state, path, name=name)
    return _words(found), True


def _resize(state: dict[str, Tensor], clip: Any) -> None:
    """Interpolate the position tables to the model's size, as open_clip does."""
    with contextlib.suppress(AssertionError, AttributeError, RuntimeError):  # another width: `fit` names it
        open_clip.model.resize_pos_embed(state, clip)
    with contextlib.suppress(AssertionError, AttributeError, RuntimeError):
        open_clip.model.resize_text_pos_embed(state, clip)


def _words(found: list[str]) -> str:
    return f" ({', '.join(found)})" if found else ""


def load_tiny(pretrained: str, normalisation: Normalisation | None) -> tuple[Backbone, TextEncoder | None]:
    """The embedded CLIP: tag `glyphs`, `none`, or a file with its state dict."""
    text = True
    if pretrained == "glyphs":
        clip, weights = tiny.load_tiny(), "embedded weights 'glyphs'"
    elif pretrained == "none":
        clip, weights = tiny.create_tiny(), "random weights"
    elif Path(pretrained).is_file():
        clip = tiny.create_tiny()
        words, text = load_file(clip, Path(pretrained), "tiny")
        weights = f"file {pretrained}{words}"
    else:
        raise UserError(f"--pretrained {pretrained}: the tiny model takes the tag glyphs, a file, or none")
    dim: Any = tiny.CONFIG["embed_dim"]
    about = normalisation or Normalisation(tiny.IMAGE_MEAN, tiny.IMAGE_STD, "of the tiny model")
    backbone = OpenClipBackbone(
        "tiny", clip.visual, weights=weights, image_size=tiny.IMAGE_SIZE, feature_dim=dim, **about._asdict()
    )
    return backbone, TextEncoder(clip, tiny.tokenize) if text else None


def load(
    name: str,
    pretrained: str,
    *,
    download: bool = False,
    tag: str | None = None,
    normalisation: Normalisation | None = None,
) -> tuple[Backbone, TextEncoder | None]:
    """An open_clip model by name (see `open_clip.list_models()`). tag: of the weights in the file `pretrained`.
    normalisation: in place of the one that belongs to the weights."""
    if name == "tiny":
        return load_tiny(pretrained, normalisation)
    path: Path | None = None
    weights, file = "random weights", None
    if pretrained != "none" and Path(pretrained).is_file():
        path, weights, file = Path(pretrained), f"file {pretrained}", pretrained
        if tag is not None and open_clip.get_pretrained_cfg(name, tag):
            check_activation(name, tag)
    elif pretrained != "none":
        path, weights, tag = find_weights(name, pretrained, download), f"open_clip tag {pretrained}", pretrained
    clip = create(name, download)
    default = (
        clip.visual.image_mean or open_clip.OPENAI_DATASET_MEAN,
        clip.visual.image_std or open_clip.OPENAI_DATASET_STD,
    )
    text = True
    if path is not None:
        words, text = load_file(clip, path, name)
        weights += words
        if file is not None:
            weights += check_file_activation(name, file, words, tag)
    tags = tag_normalisations(name, default)
    about = choose(name, tags, default, tag=tag, file=None if normalisation else file)
    size = clip.visual.image_size
    sides = size if isinstance(size, tuple | list) else (size, size)
    if sides[0] != sides[1]:
        raise UserError(f"model {name} takes {sides[0]} x {sides[1]} images; only square ones are supported")
    feature_dim = open_clip.get_model_config(name)["embed_dim"]
    if not math.isfinite(float(clip.logit_scale.detach().exp())):
        raise UserError(f"--pretrained {pretrained}: its logit scale is not finite")
    backbone = OpenClipBackbone(
        name,
        clip.visual,
        weights=weights,
        image_size=sides[0],
        feature_dim=feature_dim,
        **(normalisation or about)._asdict(),
    )
    return backbone, TextEncoder(clip, tokenizer(name, download)) if text else None


def tag_normalisations(name: str, default: tuple[Any, Any]) -> dict[str, tuple[Any, Any]]:
    """tag -> (mean, std) of the tags of `name`. default: where a tag does not say."""
    configs = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    return {
        tag: (tuple(config.get("mean") or default[0]), tuple(config.get("std") or default[1]))
        for tag, config in configs.items()
    }
