"""Backbones by name: `tiny` (embedded), open_clip models, timm models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.errors import UserError, nearest

if TYPE_CHECKING:
    from fastmerge.models.backbone import Backbone
    from fastmerge.models.normalisation import Normalisation
    from fastmerge.models.openclip import TextEncoder


def load_backbone(
    name: str, pretrained: str, *, download: bool = False, normalisation: Normalisation | None = None
) -> tuple[Backbone, TextEncoder | None]:
    """Load image tower `name` with weights `pretrained` (a tag, a file, a
    finished run, or 'none'), and its text tower if it has one.

    name: with a file also NAME.TAG, where the tag says how the weights in the file were trained. normalisation: in place
    of the one that belongs to the weights. Random weights come from torch's global generator. Nothing is downloaded
    without `download`.

    Raises:
        UserError: unknown name or tag (with the nearest ones), missing weights, or a file of another model.
    """
    import open_clip
    import timm

    from fastmerge.models import openclip, saved, timm_vit

    if pretrained != "none" and saved.is_run_model(pretrained):
        return saved.starting_model(pretrained, name, download, normalisation)

    loaders = {n: timm_vit.load for n in timm.list_models()} | {
        n: openclip.load for n in ("tiny", *open_clip.list_models())
    }
    tagged, _, tag = name.partition(".")
    if name in loaders:
        return loaders[name](name, pretrained, download=download, normalisation=normalisation)
    if tagged in loaders and tagged != "tiny":
        if pretrained == "none" or Path(pretrained).is_file():
            return loaders[tagged](tagged, pretrained, download=download, tag=tag, normalisation=normalisation)
        raise UserError(f"unknown model {name!r}: give the tag by itself, --model {tagged} --pretrained {tag}")
    raise UserError(
        f"unknown model {name!r}: it is not tiny, an open_clip model or a timm model.{nearest(name, loaders)} "
        "open_clip.list_models() and timm.list_models() list them"
    )
