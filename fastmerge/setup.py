"""Everything prepared before the first step: data, scenario, device, and the starting model."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastmerge.config import Config
from fastmerge.continuing import Earlier
from fastmerge.data.cache import ImageCache
from fastmerge.data.dataset import Dataset
from fastmerge.data.joined import load_datasets
from fastmerge.data.scenario import Scenario, build_scenario
from fastmerge.errors import UserError, preparing
from fastmerge.flags import DEFAULT_TASKS, settled
from fastmerge.machine import choose_device
from fastmerge.methods import METHODS
from fastmerge.models import load_backbone
from fastmerge.models.heads import Head, build_head
from fastmerge.models.normalisation import Normalisation
from fastmerge.models.precision import choose
from fastmerge.models.text_context import ClassPrompts
from fastmerge.training import Learner
from fastmerge.transfer import Retained, load_retained

if TYPE_CHECKING:
    from fastmerge.models.openclip import TextEncoder


def data_of(config: Config) -> Dataset:
    """The data of this run's own tasks, before `--validation` holds a part of it out.

    Raises:
        UserError: it is missing, or does not fit the settings.
    """
    dataset = load_datasets(
        config.data.dataset,
        config.data.data_root,
        one_domain=config.scenario.scenario == "datasets",
        download=config.data.download,
        skip_bad_images=config.data.skip_bad_images,
        split_file=config.data.split_file,
        test_part=config.data.test_part,
        template=config.data.template,
        class_names=config.data.class_names,
    )
    top = config.scenario.top_classes
    return dataset if top is None else dataset.most_populous(top)


def prepared(config: Config) -> tuple[Config, Scenario, Earlier | None]:
    """The config with the defaults that depend on the data, the scenario, and the run that it continues.

    Raises:
        UserError: the data of this run, or of one that it continues, is missing or does not fit the settings.
    """
    earlier = Earlier(config.run.continue_from) if config.run.continue_from else None
    dataset, s = data_of(config), config.scenario
    if s.validation:
        dataset = dataset.held_out(s.validation)
    config = settled(config, len(dataset.class_names))
    scenario = build_scenario(
        dataset,
        s.scenario,
        config.scenario.tasks,
        s.class_order,
        first_classes=s.first_classes,
        sizes=s.task_sizes,
        fewest_domains=1 if earlier else 2,
    )
    if earlier is not None:
        if s.scenario == "datasets":
            earlier.has_none_of(config)
        try:
            before = prepared(earlier.config)[1]
        except UserError as error:
            raise UserError(
                f"--continue-from {earlier.path}: the images of its tasks are needed, because the accuracy on them is "
                f"measured again. {error}"
            ) from None
        scenario = earlier.follow(before, scenario)
    return config, scenario, earlier


class Setup:
    """Loads data and weights at the start, so that nothing is missing later, and creates learners.

    Attributes: scenario (with its data set), device, backbone and head of the first seed (random weights: of the last
    learner's seed), cache for decoded images, text_sha256: hash of the text tower that a text head comes from (else None),
    config with the defaults that depend on the data, fewer_tasks: whether the classes are too few for the default number
    of tasks, retained: the data of `--retain`, with a head of the same seed (or None), earlier: the run that this one
    continues (or None).

    progress(done, prompts) is called while a text head is computed. Raises Unprepared if something is missing.
    """

    def __init__(self, config: Config, progress: Callable[[int, int], None] | None = None):
        # a user of this program cannot act on the warnings of libraries
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|timm|open_clip)\b")
        self.progress = progress
        self.device = choose_device(config.run.device)
        given = config.scenario.tasks
        with preparing():
            self.config, self.scenario, self.earlier = prepared(config)
        config, self.dataset, tasks = self.config, self.scenario.dataset, self.config.scenario.tasks
        self.fewer_tasks = given is None and tasks is not None and tasks < DEFAULT_TASKS
        training = dataclasses.replace(config.training, precision=choose(config.training.precision, self.device))
        if training.compile is None:
            training.compile = self.device.type == "cuda" and not training.checkpoint_gradients
        self.config = config = dataclasses.replace(config, training=training)
        with preparing():
            self._unseen = load_retained(config, self.earlier)
        self._prepare(config.training.seeds[0])
        room = None if config.data.cache_gb is None else int(config.data.cache_gb * 1e9)
        self.cache = ImageCache(self.backbone.image_size, self.device, room)

    @property
    def random_weights(self) -> bool:
        return self.config.model.pretrained == "none"

    @property
    def flip(self) -> bool:
        """Whether training images are mirrored at random."""
        return self.dataset.flip if self.config.data.flip is None else self.config.data.flip

    def _prepare(self, seed: int) -> None:
        torch.manual_seed(seed)  # --pretrained none draws weights
        model = self.config.model
        given = Normalisation(model.mean, model.std, "--mean and --std") if model.mean and model.std else None
        with preparing():
            self.backbone, encoder = load_backbone(
                model.model, model.pretrained, download=self.config.data.download, normalisation=given
            )
        self._encoder = encoder
        self.head = self._head(model.head or ("text" if encoder else "prototype"), encoder)
        if self.earlier and self.head.kind == "text" and (before := self.earlier.text_head()) is not None:
            self.head.adopt(before)  # a class keeps the templates that it was learned with
        self.text_sha256 = encoder.weights_sha256 if encoder and self.head.kind == "text" else None
        self.text: ClassPrompts | None = None
        names = [spec.partition(":")[0] for spec in self.config.training.method]
        if learns := [name for name in names if METHODS[name].needs_text]:
            if self.head.kind != "text" or encoder is None:
                raise UserError(
                    f"--method {learns[0]} uses the text tower in training, so it needs --head text and a CLIP model"
                )
            precision = self.config.training.precision or "fp32"
            self.text = ClassPrompts(encoder, self.dataset.class_names, self.device, precision)
        self.retained = self._retained(self._unseen) if self._unseen is not None else None
        self._seed = seed

    def _retained(self, dataset: Dataset) -> Retained:
        if self.head.kind != "text":
            raise UserError(
                f"--retain {dataset.name}: a {self.head.kind} head knows no class that it was not trained on; it needs "
                "--head text and a model with a text tower"
            )
        return Retained(dataset, self._head("text", self._encoder, dataset))

    def _head(self, kind: str, encoder: TextEncoder | None = None, dataset: Dataset | None = None) -> Head:
        dataset = dataset or self.dataset
        return build_head(
            kind,
            backbone=self.backbone,
            encoder=encoder,
            class_names=dataset.class_names,
            templates=dataset.templates,
            device=self.device,
            progress=self.progress,
        )

    def learner(
        self, seed: int, head: str | None = None, config: Config | None = None, frozen: bool = False
    ) -> Learner:
        """The starting model for one run, with the text tower where a method of the command needs it. head: a kind that
        replaces the command's and needs no text tower. config: the run's config if it differs from the command's. frozen:
        the method does not change the backbone."""
        if self.random_weights and seed != self._seed:
            self._prepare(seed)
        made = self._head(head) if head else copy.deepcopy(self.head)
        config = config or self.config
        learner = Learner(copy.deepcopy(self.backbone), made, config, seed, self.device, self.dataset.flip, frozen)
        learner.text = self.text
        return learner
