"""What training does to the model's zero-shot ability: on data that no task has, and on each task before it is trained on.

    python -m fastmerge --retain glyphs-hard                        # after every task, with the class names of that data set
    python -m fastmerge --dataset cars --data-root DIR --retain cifar100 OTHER

Retention: accuracy on the test images of `--retain` after the last task minus that of the starting model. TIME (Dziadzio et
al., CVPR 2025) and FoMo-in-Flux report it as zero-shot retention, ZSCL (Zheng et al., ICCV 2023) as the loss of transfer.
The features are the method's, and the rows are the starting text tower's for the class names of that data set.

Forward transfer (Lopez-Paz & Ranzato 2017, eq. 4, FWT): the mean over the tasks t > 1 of R[t-1][t] - b[t], the accuracy on
task t before it is trained on, minus that of a model without any training. Theirs is randomly initialised; ours is the
starting model, so FWT is 0 where training neither helps nor harms the tasks to come. Candidates of both are the classes seen
up to task t.

Both need a text head, which knows classes before they are trained; for other heads they are absent. Retention is absent also
for methods that learn prompts of the text tower: these belong to the class names of the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastmerge.config import Config, DataSettings
from fastmerge.continuing import Earlier, places
from fastmerge.data.cache import ImageCache
from fastmerge.data.dataset import Dataset
from fastmerge.data.joined import load_datasets
from fastmerge.data.scenario import Scenario, contents_hash, split_hash
from fastmerge.errors import UserError
from fastmerge.evaluate import Matrix, accuracies, mean
from fastmerge.methods.method import Method
from fastmerge.models.features import plain
from fastmerge.models.heads import Head
from fastmerge.training import Learner


def load_retained(config: Config, earlier: Earlier | None = None) -> Dataset | None:
    """The data set of `--retain`, with `--validation` the held-out part of its training images; None without the flag.
    earlier: the run that this one continues.

    Raises:
        UserError: it cannot be loaded, or tasks train on it.
    """
    if config.data.retain is None:
        return None
    name, *root = config.data.retain
    trained = dict.fromkeys(places(config.data), "") | (earlier.data_sets() if earlier else {})
    place = places(DataSettings(dataset=(name,), data_root=tuple(root) or None))[0]
    if place in trained:
        which = f"tasks of {trained[place]}" if trained[place] else "tasks"
        raise UserError(f"--retain {name}: {which} train on this data set; expected one that they do not see")
    try:
        dataset = load_datasets(
            [name], root, download=config.data.download, skip_bad_images=config.data.skip_bad_images
        )
    except UserError as error:
        raise UserError(f"--retain {' '.join(config.data.retain)}: {error}") from None
    return dataset.held_out(config.scenario.validation) if config.scenario.validation else dataset


class Retained:
    """The test images of the data set of `--retain`, and a text head for its class names."""

    def __init__(self, dataset: Dataset, head: Head):
        self.dataset, self.head = dataset, head

    def contents(self) -> list[Any]:
        """What the accuracy depends on, for a hash."""
        data = self.dataset
        return [split_hash(data.test), contents_hash(data.test), data.class_names, data.templates]

    def accuracy(
        self, learner: Learner, method: Method | None, cache: ImageCache, tick: Callable[[int], None] = lambda n: None
    ) -> float | None:
        """Accuracy in percent with the features of `method`, by default of the backbone; None if it has no meaning."""
        if method is not None and (method.needs_text or not speaks(learner, method)):
            return None
        images = cache.get(self.dataset.test, np.arange(len(self.dataset.test)), keep=True)
        features = method.features() if method is not None else plain(learner.backbone)
        classes = range(len(self.dataset.class_names))
        return accuracies(learner, [images], classes, tick, replace(features, head=self.head.to(learner.device)))[0]


def speaks(learner: Learner, method: Method) -> bool:
    """Whether the method classifies by the text of class names, and so knows classes that it was not trained on."""
    return learner.head.knows_all and method.features().head is None


def images_beside(scenario: Scenario, method: type[Method], head: Head, retained: Retained | None) -> tuple[int, ...]:
    """How many test images every task takes for the two metrics, for a forecast."""
    if not head.knows_all or method.head not in (None, "text"):
        return ()
    first = [len(task.test) * (task.index > 0 and scenario.kind != "dil") for task in scenario.tasks]
    every = 0 if retained is None or method.needs_text else len(retained.dataset.test)
    return tuple(n + every for n in first)


def forward_transfer(before: Sequence[float | None], starting: Matrix | None) -> float | None:
    """The mean over the tasks t > 1 of before[t] - starting[t][t], in points; None if nothing is known.

    before: accuracy on task t before training on it. starting: the matrix of the starting model.
    """
    if starting is None:
        return None
    pairs = [(value, starting[t][t]) for t, value in enumerate(before[: len(starting)]) if t]
    return mean([a - b for a, b in pairs if a is not None and b is not None])


def retention(after: Sequence[float | None], starting: float | None) -> float | None:
    """The last of `after` minus the starting model's accuracy, in points; None if one of them is not known."""
    last = after[-1] if after else None
    return None if last is None or starting is None else last - starting
