"""The model that a run ends with, as a file and back.

backbone, head, recipe = load_model("runs/glyphs-cil5-tiny/trm-seed0/model.safetensors")
logits = head(backbone(images), torch.arange(len(recipe["class_names"])))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastmerge.checkpoint import joined, load_tensors, select
from fastmerge.errors import UserError
from fastmerge.models import load_backbone
from fastmerge.models.backbone import Backbone
from fastmerge.models.heads import Head, LinearHead, PrototypeHead, TextHead


def model_tensors(backbone: Backbone, head: Head) -> dict[str, Tensor]:
    """What `model.safetensors` holds: the whole backbone and the head, by name."""
    return joined(backbone=backbone.state_dict(), head=head.state_dict())


def load_model(path: str | Path) -> tuple[Backbone, Head, dict[str, Any]]:
    """(backbone, head, recipe) of a finished run, on the CPU, in eval mode.

    recipe: how the model was made: method, seed, config, class_names, head, final_accuracy. The backbone takes images of
    `backbone.image_size`, normalised with `backbone.mean` and `.std`; the head gives a column per class index asked for.

    Raises:
        UserError: the file is missing, or is not the model of a finished run.
    """
    tensors, recipe = load_tensors(Path(path))
    if "head" not in recipe or "config" not in recipe:
        raise UserError(f"{path}: not the model of a finished run; expected the model.safetensors in its folder")
    backbone, _ = load_backbone(recipe["config"]["model"]["model"], "none")
    backbone.load_state_dict(select(tensors, "backbone"))
    backbone.weights = f"file {path}"
    parts, classes = select(tensors, "head"), len(recipe["class_names"])
    if recipe["head"] == "text":
        head: Head = TextHead(parts["weight"], float(parts["scale"]))
    else:
        head = {"linear": LinearHead, "prototype": PrototypeHead}[recipe["head"]](backbone.feature_dim, classes)
        head.load_state_dict(parts)
    return backbone.eval(), head.eval(), recipe
