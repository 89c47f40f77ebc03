"""The accuracy of merged tensors on images, by the evaluation of the trainer.

Models of runs know their backbone, head and classes. Other state dicts are loaded into `--model`, as `--pretrained` loads a
file: with a text tower among the tensors the head is its embeddings of the class names, else the mean features of every class
in the training images, of the merged model itself.

The images are a held-out part of the training images, so that choosing by them leaves the test images untouched.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmerge.commands.evaluate import data_set, evaluate
from fastmerge.data.cache import ImageCache
from fastmerge.data.dataset import Dataset, Split
from fastmerge.errors import UserError
from fastmerge.files.about import difference, recipe_of
from fastmerge.files.inputs import Input
from fastmerge.machine import choose_device
from fastmerge.models import load_backbone, openclip, timm_vit
from fastmerge.models.heads import build_head
from fastmerge.models.saved import Model, built
from fastmerge.wording import counted

SHARE = 0.2  # of the training images
MERGED = Path("the merged tensors")  # in messages of the loaders


class Scorer:
    """score(tensors): percent of the images that the merged model classifies rightly. images: which ones, in words."""

    def __init__(self, inputs: Sequence[Input], given: argparse.Namespace):
        """inputs: opened ones, the one that gives the names of the merged tensors first. given: the flags of the command.

        Raises:
            UserError: models that cannot be scored, or no images for it.
        """
        if given.batch_size is not None and given.batch_size < 1:
            raise UserError(f"--batch-size {given.batch_size}: expected at least 1")
        device = choose_device(given.device)
        self.recipes = [recipe for one in inputs if (recipe := recipe_of(one)) is not None]
        asked = argparse.Namespace(**{**vars(given), "dataset": given.evaluate or None})
        if given.model is None:
            self._same_kind(inputs)
            config = self.recipes[0]["config"]
        elif self.recipes:
            raise UserError(f"--model {given.model}: the inputs are models of runs, which know their own; leave it out")
        elif not given.evaluate:
            raise UserError(
                f"--evaluate: name the data set; only models of runs know theirs, and --model {given.model}"
            )
        else:
            data = {"dataset": given.evaluate, "data_root": None, "split_file": None}
            config = {"data": data, "scenario": {"scenario": "cil"}, "run": {}, "training": {"batch_size": 64}}
        dataset = data_set(asked, config, held_out=True)
        self.dataset, self.images = self._held_out(dataset, given.validation, asked, config)
        self.batch_size = given.batch_size or config["training"]["batch_size"]
        of_run = given.model is None
        self.model: Callable[[dict[str, Tensor]], Model]
        self.model = self._of_run if of_run else _Loaded(given, inputs[0], self.dataset, self.batch_size, device)
        self.device = device
        self.remembered = False

    def __call__(self, tensors: dict[str, Tensor]) -> float:
        model = self.model(tensors).to(self.device)
        if not self.remembered:
            test = remembered(self.dataset.test, model.backbone.image_size, self.device)
            self.dataset, self.remembered = dataclasses.replace(self.dataset, test=test), True
        return evaluate(model, self.dataset, self.batch_size)["summary"]["accuracy"]

    def _same_kind(self, inputs: Sequence[Input]) -> None:
        if len(self.recipes) < len(inputs):
            other = next(one.label for one in inputs if recipe_of(one) is None)
            raise UserError(
                f"--evaluate: {other} is no model of a run, so its backbone and head are not known; give --model, the name "
                "of the open_clip or timm model that these tensors are of"
            )
        if why := difference(inputs, self.recipes):
            raise UserError(f"--evaluate: {why}")

    def _of_run(self, tensors: dict[str, Tensor]) -> Model:
        candidates = sorted({c for recipe in self.recipes for c in recipe["candidates"]})
        about = self.recipes[0] | {"candidates": candidates}
        return built(tensors, about, str(MERGED))

    def _held_out(
        self, dataset: Dataset, share: float | None, given: argparse.Namespace, config: dict[str, Any]
    ) -> tuple[Dataset, str]:
        """The data set whose `test` part is scored, and that part in words."""
        of_run = float(config["scenario"].get("validation") or 0)
        if share is not None and not 0 <= share < 1:
            raise UserError(f"--validation {share}: expected at least 0 and below 1")
        if config["run"].get("continue_from") and given.dataset is None and given.data_root is None and of_run:
            if share not in (None, of_run):
                raise UserError(f"--validation {share}: the run holds out {of_run}; leave the flag away")
            return dataset, f"{counted(len(dataset.test), 'held-out training image')} of {dataset.name}"
        share = (of_run or SHARE) if share is None else share
        if not share:
            return dataset, f"{counted(len(dataset.test), 'test image')} of {dataset.name} (--validation 0)"
        held = dataset.held_out(share)
        if not len(held.test):
            raise UserError(
                f"--evaluate: {counted(len(dataset.train), 'training image')} of {dataset.name} are too few to hold out "
                f"{share:g} of every class; pass --validation 0 to choose by the test images"
            )
        seen = (
            "which no model has seen in training"
            if self._unseen(share, given, config)
            else "which models may have seen"
        )
        return held, f"{counted(len(held.test), 'held-out training image')} of {dataset.name}, {seen}"

    def _unseen(self, share: float, given: argparse.Namespace, config: dict[str, Any]) -> bool:
        """Whether every model is of a run that held out the same images."""

        def data(config: dict[str, Any]) -> Any:
            names = ("dataset", "data_root", "split_file", "test_part")
            return [config["data"].get(n) for n in names], config["scenario"].get("top_classes")

        own = [recipe["config"] for recipe in self.recipes]
        its = given.dataset in (None, config["data"]["dataset"]) and given.data_root in (
            None,
            config["data"]["data_root"],
        )
        free = given.split_file is None and given.test_part is None
        same = all(data(one) == data(config) and one["scenario"].get("validation") == share for one in own)
        return bool(own) and its and free and same and not any(one["run"].get("continue_from") for one in own)


class _Loaded:
    """Merged tensors in the model that `--model` names."""

    def __init__(
        self, given: argparse.Namespace, first: Input, dataset: Dataset, batch_size: int, device: torch.device
    ):
        files = [file for file in first.files if file.suffix != ".json"]
        start = str(files[0]) if len(files) == 1 else "none"
        self.name, self.dataset, self.batch_size, self.device = given.model, dataset, batch_size, device
        self.backbone, encoder = load_backbone(given.model, start, download=given.download)
        if encoder is None and self.backbone.family == "open_clip":  # the file had the image tower alone
            encoder = load_backbone(given.model, "none")[1]
        if encoder is not None:
            self.clip, self.tokenize = encoder.clip, encoder.tokenize

    def __call__(self, tensors: dict[str, Tensor]) -> Model:
        encoder, names = self._load(tensors), list(self.dataset.class_names)
        head = build_head(
            "text" if encoder else "prototype",
            backbone=self.backbone,
            encoder=encoder,
            class_names=names,
            templates=self.dataset.templates,
            device=self.device,
        )
        every = list(range(len(names)))
        recipe = {"class_names": names, "candidates": every, "features": "backbone", "scenario": "cil", "tasks": []}
        model = Model(self.backbone, head, {}, recipe).to(self.device)
        if encoder is None:
            self._observe(model)
        return model

    def _load(self, tensors: dict[str, Tensor]) -> openclip.TextEncoder | None:
        """Fill the backbone; returns the text tower, if there is one among the tensors."""
        try:
            if self.backbone.family == "timm":
                timm_vit.load_file(self.backbone.tower, MERGED, self.name, tensors)
                return None
            self.clip.visual = self.backbone.tower
            text = openclip.load_file(self.clip, MERGED, self.name, tensors)[1]
        except UserError as error:
            raise UserError(str(error).replace("--pretrained ", f"--model {self.name}: ", 1)) from None
        encoder = openclip.TextEncoder(self.clip, self.tokenize)
        return encoder if text else None

    @torch.no_grad()
    def _observe(self, model: Model) -> None:
        """Class means of the merged model's own features on the training images."""
        train = self.dataset.train
        if not len(train):
            raise UserError(
                f"--model {self.name} has no text tower, and {self.dataset.name} no training images for means"
            )
        if not isinstance(train.read, _Remembered):
            train = remembered(train, self.backbone.image_size, self.device)
            self.dataset = dataclasses.replace(self.dataset, train=train)
        for rows in np.array_split(np.arange(len(train)), max(1, -(-len(train) // self.batch_size))):
            pixels, good = train.read(rows, self.backbone.image_size, self.device)
            labels = torch.from_numpy(train.labels[rows])[good].to(self.device)
            model.head.observe(model.features(model.normalised(pixels[good.to(self.device)])), labels)


class _Remembered:
    """`read` of a split that decodes every batch once."""

    def __init__(self, read: Callable):
        self.read, self.kept = read, dict[bytes, tuple[Tensor, Tensor]]()

    def __call__(self, indices: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = indices.tobytes()
        if key not in self.kept:
            self.kept[key] = self.read(indices, size, device)
        return self.kept[key]


def remembered(split: Split, size: int, device: torch.device) -> Split:
    """The split with its pixels kept in memory, if they fit the room that a run gives them."""
    fits = 3 * size * size * len(split) <= ImageCache(size, device).budget_bytes
    return dataclasses.replace(split, read=_Remembered(split.read)) if fits else split
