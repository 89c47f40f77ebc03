"""Recognises the tree of a published data set, so that `--dataset folder` can name the flag that reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastmerge.data import wordnet
from fastmerge.data.aerial import EUROSAT, RESISC45
from fastmerge.data.benchmark import folder_in
from fastmerge.data.cars import CARS
from fastmerge.data.cub import CUB
from fastmerge.data.domainnet import DOMAINNET
from fastmerge.data.dtd import DTD
from fastmerge.data.gtsrb import GTSRB
from fastmerge.data.imagenet_a import IMAGENET_A
from fastmerge.data.imagenet_r import IMAGENET_R
from fastmerge.data.office import OFFICE31, OFFICE_HOME
from fastmerge.data.pacs import PACS
from fastmerge.data.sun import SUN397
from fastmerge.data.tiny_imagenet import TINY_IMAGENET
from fastmerge.data.tree import WNID, ClassFolder

BENCHMARKS = (
    *(IMAGENET_R, IMAGENET_A, CUB, CARS, DOMAINNET, OFFICE31, OFFICE_HOME, PACS, TINY_IMAGENET),
    *(EUROSAT, RESISC45, SUN397, DTD, GTSRB),
)

ELSEWHERE = (  # not a `Benchmark`: title, flag, and a folder that tells
    ("ImageNet-1K", "imagenet1k", "ILSVRC/Data/CLS-LOC"),
    ("CIFAR-100", "cifar100", "cifar-100-python"),
    ("CIFAR-10", "cifar10", "cifar-10-batches-py"),
)


def advice(root: str, folders: Iterable[ClassFolder] = ()) -> str:
    """A line that names the data set under `root` and its flag; empty if it is none that we know.

    folders: the class folders, if the tree could be read. A tree is known by files that only one data set has, by its usual
    name, or by its 200 wnids.
    """
    classes = {folder.name for folder in folders}
    for benchmark in BENCHMARKS:
        found = benchmark.recognised(root, deep=not classes)
        if found is None and len(classes) == benchmark.classes and all(map(WNID.fullmatch, classes)):
            found = root if benchmark.synsets and benchmark.synsets() == classes else None
        if found is not None:
            shown = f" --data-root {found}" if os.path.abspath(found) != os.path.abspath(root) else ""
            return (
                f"\nThis looks like {benchmark.title}: --dataset {benchmark.name}{shown} reads it, with its names, prompts"
                f"{', domains' if benchmark.domains else ''} and split."
            )
    for title, name, place in ELSEWHERE:
        if folder_in(root, place) is not None:
            return f"\nThis looks like {title}: --dataset {name} reads it, with its names, prompts and split."
    if len(classes) == 1000 and classes == set(wordnet.class_names()):
        return "\nThis looks like ImageNet-1K: --dataset imagenet1k reads it, with its prompts."
    return ""
