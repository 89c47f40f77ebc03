"""Backbones by name: `tiny` (embedded), open_clip models, timm models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.errors import UserError, nearest

if TYPE_CHECKING:
    from fastmerge.models.backbone import Backbone
    from fastmerge.models.openclip import TextEncoder


def load_backbone(name: str, pretrained: str, *, download: bool = False) -> tuple[Backbone, TextEncoder | None]:
    """Load image tower `name` with weights `pretrained` (a tag, a file, or 'none'), and its text tower if it has one.

    Random weights come from torch's global generator. Nothing is downloaded without `download`.

    Raises:
        UserError: unknown name or tag (with the nearest ones), missing weights, or a file of another model.
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
        f"unknown model {name!r}: it is not tiny, an open_clip model or a timm model.{nearest(name, known)} "
        "open_clip.list_models() and timm.list_models() list them"
    )
