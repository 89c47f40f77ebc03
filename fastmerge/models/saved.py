"""The final model of a run: its tensors, and how to load it.

features, head, recipe = load_model("runs/glyphs-cil5-tiny/trm-seed0/model.safetensors")
logits = head(features(images), torch.arange(len(recipe["class_names"])))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastmerge.checkpoint import joined, load_tensors, select
from fastmerge.errors import UserError
from fastmerge.models import load_backbone
from fastmerge.models.backbone import Backbone
from fastmerge.models.features import Features, restore
from fastmerge.models.heads import Head, LinearHead, PrototypeHead, TextHead


def model_tensors(backbone: Backbone, head: Head, features: Features) -> dict[str, Tensor]:
    """The contents of `model.safetensors` by name: backbone, head, and the extra tensors of the method's features."""
    return joined(backbone=backbone.state_dict(), head=head.state_dict(), features=features.tensors)


def load_model(path: str | Path) -> tuple[Features, Head, dict[str, Any]]:
    """Load (features, head, recipe) of a finished run on the CPU in eval mode: the function that the run evaluated.

    recipe says how the model was made: method, seed, config, class_names, head, features, final_accuracy. `features`
    takes images of `features.backbone.image_size`, normalised with the backbone's `mean` and `std`. The head returns
    one column per requested class index.

    Raises:
        UserError: the file is missing, or is not the model of a finished run.
    """
    tensors, recipe = load_tensors(Path(path))
    if not {"head", "config", "features"} <= recipe.keys():
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
    return restore(recipe["features"], backbone.eval(), select(tensors, "features")), head.eval(), recipe
