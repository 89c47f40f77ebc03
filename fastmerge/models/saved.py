"""The model that a run leaves: one safetensors file, and the module that it becomes again.

    import fastmerge
    model = fastmerge.load("runs/glyphs-cil5-tiny/trm-seed0")     # a method's folder, or the file in it
    names, probabilities = model.predict(["a.png", "b.jpg"])

The file holds everything that the reported accuracy needs: the backbone, the head and the extra tensors of the method's
features as tensors; class names, normalisation, image size and the settings of the run as JSON in the metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import fastmerge
from fastmerge.checkpoint import joined, load_tensors, select
from fastmerge.config import to_dict
from fastmerge.data.augment import normalise, to_float
from fastmerge.data.files import decode, square
from fastmerge.errors import UserError
from fastmerge.flat import FlatModel
from fastmerge.models import load_backbone
from fastmerge.models.backbone import Backbone, hash_tensors
from fastmerge.models.concepts import ConceptHead
from fastmerge.models.features import Features, restore
from fastmerge.models.fusion import FusionHead
from fastmerge.models.heads import KINDS, AttributeHead, Head, LinearHead, PrototypeHead, TextHead
from fastmerge.models.normalisation import Normalisation

if TYPE_CHECKING:
    from fastmerge.data.scenario import Scenario
    from fastmerge.models.openclip import TextEncoder
    from fastmerge.training import Learner

NAME = "model.safetensors"
RESIZE = "shorter side to image_size (bicubic, antialias), centre crop"
KEYS = {"config", "class_names", "candidates", "head", "features", "input"}


def model_tensors(backbone: Backbone, head: Head, features: Features) -> dict[str, Tensor]:
    """The tensors of the file by name: backbone, head, and the extra tensors of the method's features."""
    return joined(backbone=backbone.state_dict(), head=head.state_dict(), features=features.tensors)


def recipe(learner: Learner, features: Features, scenario: Scenario, after: int, **about: Any) -> dict[str, Any]:
    """The metadata of the file, for the model after task `after`. about: method, seed, final_accuracy."""
    backbone, data, tasks = learner.backbone, scenario.dataset, scenario.tasks[: after + 1]
    every = learner.config.scenario.eval_classes == "all"
    return about | {
        "fastmerge": fastmerge.__version__,
        "config": to_dict(learner.config),
        "class_names": list(data.class_names),
        "class_order": list(scenario.class_order),
        "candidates": list(range(len(data.class_names))) if every else sorted(scenario.seen(after)),
        "scenario": scenario.kind,
        "tasks": [{"name": task.name, "classes": list(task.classes)} for task in tasks],
        "head": learner.head.kind,
        "templates": list(data.templates) if learner.head.kind == "text" else None,
        "features": features.kind,
        "input": {
            "image_size": backbone.image_size,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "resize": RESIZE,
        },
        "precision": backbone.precision,
        "starting_weights": {"source": backbone.weights, "sha256": backbone.weights_sha256},
    }


def _rebind(model: Model, keys: Any) -> None:
    model._bind()


class Model(nn.Module):
    """The function that a run evaluated, from images to logits.

    recipe: how the model was made (method, seed, config, tasks, ...). class_names: the columns of the logits.
    backbone, head, features: its parts; `features(normalised)` is what the method evaluates.
    """

    def __init__(self, backbone: Backbone, head: Head, tensors: dict[str, Tensor], recipe: dict[str, Any]):
        super().__init__()
        self.backbone, self.head, self.recipe = backbone, head, recipe
        backbone.precision = recipe.get("precision", "fp32")  # computes as the run did
        self.class_names: list[str] = recipe["class_names"]
        self.extra = nn.Module()  # tensors of the features besides the backbone
        self._names = {name.replace(".", "/"): name for name in tensors}
        for own, name in self._names.items():
            self.extra.register_buffer(own, tensors[name])
        known = torch.zeros(len(self.class_names), dtype=torch.bool)
        known[recipe["candidates"]] = True
        self.register_buffer("known", known, persistent=False)
        self._bind()
        self.register_load_state_dict_post_hook(_rebind)
        self.eval()

    def _bind(self) -> None:
        buffers = dict(self.extra.named_buffers())
        tensors = {name: buffers[own] for own, name in self._names.items()}
        self.features = restore(self.recipe["features"], self.backbone, tensors)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._bind()  # the features hold tensors, which may be on another device or of another dtype now
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which get features of their own: the functions refer to the modules of this model."""
        return {name: value for name, value in self.__dict__.items() if name != "features"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def forward(self, images: Tensor) -> Tensor:
        """Images `[b, 3, h, w]`, uint8 or floats in 0..1, of any size -> logits `[b, classes]`.

        Classes that the model has not learned have the logit -inf.

        Raises:
            ValueError: another shape or dtype.
        """
        features = self.features(self.normalised(images))
        columns = torch.arange(len(self.class_names), device=features.device)
        known: Tensor = self.get_buffer("known")
        return self.head(features, columns).masked_fill(~known, -torch.inf)

    def normalised(self, images: Tensor) -> Tensor:
        """The backbone's input `[b, 3, s, s]`: centre square, resized to `image_size`, normalised with the run's mean
        and std. Resizing tensors differs from `preprocess` by rounding."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [b, 3, h, w], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images: expected uint8 or floats in 0..1, got {images.dtype}")
        size, (height, width) = self.backbone.image_size, images.shape[2:]
        values = to_float(images) if images.dtype == torch.uint8 else images
        if (height, width) != (size, size):
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            values = values[:, :, top : top + side, left : left + side]
            values = F.interpolate(values, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        dtype = next(self.backbone.parameters()).dtype
        return normalise(values, self.backbone.mean, self.backbone.std).to(dtype)

    def preprocess(self, image: str | Path | Image.Image) -> Tensor:
        """An image file or PIL image as uint8 `[3, s, s]`, resized and cropped as in the run."""
        size = self.backbone.image_size
        pixels = square(image, size) if isinstance(image, Image.Image) else decode(str(image), size)
        return torch.tensor(pixels).permute(2, 0, 1)

    @torch.no_grad()
    def predict(
        self, images: str | Path | Image.Image | Sequence[str | Path | Image.Image], batch_size: int = 64
    ) -> tuple[list[str], Tensor]:
        """The most probable class name of every image, and the probabilities of all classes, `[n, classes]` fp32 on the
        CPU. images: image files or PIL images.

        Raises what Pillow raises for a file that is no image.
        """
        single = isinstance(images, str | Path | Image.Image)
        given: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
        device, found = next(self.backbone.parameters()).device, [torch.zeros(0, len(self.class_names))]
        for start in range(0, len(given), batch_size):
            pixels = torch.stack([self.preprocess(image) for image in given[start : start + batch_size]])
            found.append(self(pixels.to(device)).float().softmax(1).cpu())
        probabilities = torch.cat(found)
        return [self.class_names[i] for i in probabilities.argmax(1).tolist()], probabilities


def model_file(path: str | Path) -> Path:
    """The model file of a run: `path` itself, or the only one in the folder `path`.

    Raises:
        UserError: there is none, or there are several.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    found = [path / NAME] if (path / NAME).is_file() else sorted(path.glob(f"*/{NAME}"))
    if not found:
        raise UserError(
            f"{path}: no {NAME} there; expected the folder of a finished run, such as runs/NAME/METHOD-seed0, or its file"
        )
    if len(found) > 1:
        shown = ", ".join(str(file.parent) for file in found[:8]) + (", ..." if len(found) > 8 else "")
        raise UserError(f"{path} has {len(found)} models; choose one of {shown}")
    return found[0]


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and recipe of a model file.

    Raises:
        UserError: the file is missing, or is not the model of a finished run.
    """
    file = model_file(path)
    try:
        tensors, about = load_tensors(file)
    except UserError:
        about = {}
    if not (isinstance(about, dict) and about.keys() >= KEYS):
        raise UserError(
            f"{file}: not the model of a finished run; expected the {NAME} in the folder of a method and seed"
        )
    return tensors, about


def is_run_model(pretrained: str) -> bool:
    """Whether `--pretrained` names the model of a run: a folder with one, or a file with a recipe. A folder that is called
    like a tag is none."""
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return (path / NAME).is_file() or any(path.glob(f"*/{NAME}"))
    try:
        with safe_open(path, framework="pt") as file:
            return "about" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def head_of(parts: dict[str, Tensor], kind: str) -> str:
    """The head of a model file by its tensors `parts`; kind: its `head.kind`, which two heads share with the text head."""
    return "attributes" if "table" in parts else "fusion" if "contexts" in parts else kind


def beside_weights(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """What the function of a model file has besides the backbone's weights and a text, linear or prototype head, in a word;
    "" if nothing."""
    flat = "learner.theta" in tensors  # a file of --keep-trajectory
    if any(name.startswith("backbone.prefix.") for name in tensors) or (
        flat and about["config"]["training"].get("prompt_length")
    ):
        return "prefix"
    if about["features"] != "backbone":
        return about["features"]
    head = head_of(select(tensors, "learner.head" if flat else "head"), about["head"])
    return "" if head in KINDS else head


def starting_model(
    path: str, name: str, download: bool, normalisation: Normalisation | None
) -> tuple[Backbone, TextEncoder | None]:
    """The model of a finished run as the start of another: its image tower, and the text tower of its own start.

    A linearised model starts as the plain network with its weights.

    Raises:
        UserError: the run trained another model than `name`, or its method keeps the backbone and trains something else.
    """
    tensors, about = read(path)
    settings = about["config"]["model"]
    if settings["model"] != name:
        raise UserError(
            f"--pretrained {path} is a run of model {settings['model']}, not of {name}: pass --model {settings['model']}"
        )
    added = beside_weights(tensors, about)
    if added not in ("", "linearised"):
        raise UserError(
            f"--pretrained {path}: {about['method']} leaves the backbone as it was and adds {added!r}, which "
            f"cannot start another run; use its own start, --pretrained {settings['pretrained']}"
        )
    torch.manual_seed(about["seed"])  # of a run with --pretrained none, which drew its text tower from it
    numbers = tuple(about["input"]["mean"]), tuple(about["input"]["std"])
    normalisation = normalisation or Normalisation(*numbers, f"of the run {path}")
    backbone, encoder = load_backbone(name, settings["pretrained"], download=download, normalisation=normalisation)
    restore_backbone(backbone, tensors)
    backbone.weights, backbone.weights_sha256 = f"the model of {path}", hash_tensors(backbone.state_dict())
    return backbone, encoder


def restore_backbone(backbone: Backbone, tensors: dict[str, Tensor]) -> None:
    """Copy the weights of a model file, or the flat vector of a file of `--keep-trajectory`, into `backbone`."""
    if "learner.theta" in tensors:
        if tensors["learner.theta"].numel() < sum(p.numel() for p in backbone.parameters()):
            raise UserError("a file of --keep-trajectory with prefixes alone; give the run's model.safetensors instead")
        FlatModel(backbone).theta.data.copy_(tensors["learner.theta"])
        for parameter in backbone.parameters():
            parameter.grad = None
    else:
        own = select(tensors, "backbone")
        if prefix := [own[name] for name in own if name.startswith("prefix.")]:
            backbone.add_prefix(prefix)
        backbone.load_state_dict(own)


def load(path: str | Path) -> Model:
    """Load the model of a finished run on the CPU, in eval mode. path: the run's folder, a method's folder, or the file.

    Raises:
        UserError: the file is missing, or is not the model of a finished run.
    """
    return built(*read(path), str(path))


def built(tensors: dict[str, Tensor], about: dict[str, Any], path: str) -> Model:
    """The model of the tensors and the recipe of a model file, on the CPU, in eval mode; half precision, as a merge may
    write it, becomes fp32. path: what messages call it."""
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    settings, numbers = about["config"]["model"], (tuple(about["input"]["mean"]), tuple(about["input"]["std"]))
    normalisation = Normalisation(*numbers, f"of the run {path}")
    with torch.random.fork_rng(devices=[]):  # random weights are overwritten, so leave the generator as it was
        backbone, _ = load_backbone(settings["model"], "none", normalisation=normalisation)
    restore_backbone(backbone, tensors)
    backbone.weights = f"file {path}"
    parts = select(tensors, "learner.head" if "learner.theta" in tensors else "head")
    classes = len(about["class_names"])
    kind = head_of(parts, about["head"])
    if kind == "attributes":
        head: Head = AttributeHead.of(parts)
    elif kind == "fusion":
        head = FusionHead.of(parts)
    elif kind == "text":
        head = TextHead(parts["weight"], float(parts["scale"]))
    elif kind == "concepts":
        head = ConceptHead(backbone.feature_dim)
        head.load_state_dict(parts)
    else:
        head = {"linear": LinearHead, "prototype": PrototypeHead}[kind](backbone.feature_dim, classes)
        head.load_state_dict(parts)
    return Model(backbone, head, select(tensors, "features"), about)
