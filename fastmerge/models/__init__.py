"""Backbones by name: `tiny` (embedded), open_clip models, timm models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.errors import UserError, nearest

if TYPE_CHECKING:
    from fastmerge.models.backbone import Backbone
    from fastmerge.models.openclip import TextEncoder


def load_backbone(name: str, pretrained: str, *, download: bool = False) -> tuple[Backbone, TextEncoder | None]:
    """The image tower `name` with the weights `pretrained` (a tag, a file, or 'none'), and its text tower if it has one.

    Random weights come from torch's global generator. Nothing is fetched without `download`.

    Raises:
        UserError: unknown name or tag (with the nearest ones), weights that are not here, a file of another model.
    """
    import open_clip
    import timm

    from fastmerge.models import openclip, timm_vit

    if name == "tiny" or name in open_clip.list_models():
        return openclip.load(name, pretrained, download=download)
    if name in timm.list_models():
        return timm_vit.load(name, pretrained, download=download)
    known = ["tiny", *open_clip.list_models(), *timm.list_models()]
    tagged, _, tag = name.rpartition(".")
    if tagged in known:
        raise UserError(f"unknown model {name!r}: give the tag by itself, --model {tagged} --pretrained {tag}")
    raise UserError(
        f"unknown model {name!r}: neither tiny, nor an open_clip, nor a timm model.{nearest(name, known)} "
        "open_clip.list_models() and timm.list_models() list them"
    )
