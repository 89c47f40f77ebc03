"""MNIST (LeCun et al. 1998) and SVHN (Netzer et al. 2011, cropped digits): torchvision reads the published files.

Official splits: 60,000 / 10,000 and 73,257 / 26,032 images, without SVHN's `extra` part. Classes are called 0 to 9, with
the prompt of OpenAI's CLIP, so the two data sets share their classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST, SVHN

from fastmerge.data.cifar import PixelReader
from fastmerge.data.dataset import Dataset, Origin, Split
from fastmerge.data.fetch import torchvision_download
from fastmerge.data.files import data_root
from fastmerge.errors import UserError

TEMPLATES = ('a photo of the number: "{}".',)
FILES = {
    "mnist": tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
}
KNOWN = {"mnist": (60_000, 10_000), "svhn": (73_257, 26_032)}


def load_mnist(root: str | None, *, download: bool = False) -> Dataset:
    """MNIST in `MNIST/raw` under the root (torchvision's layout), in `raw`, or in the root itself."""

    def read(folder: str, train: bool) -> tuple[Tensor, np.ndarray]:
        data = _located(folder)(folder, train=train)
        return data.data[:, None].expand(-1, 3, -1, -1), data.targets.numpy()

    places = ("MNIST/raw", "mnist/MNIST/raw", "raw", "mnist", "")
    return _load("mnist", root, places, read, (lambda to: MNIST(to, download=True)) if download else None)


def load_svhn(root: str | None, *, download: bool = False) -> Dataset:
    """SVHN: `{train,test}_32x32.mat` in the root or in `svhn`. Needs scipy."""

    def read(folder: str, train: bool) -> tuple[Tensor, np.ndarray]:
        data = SVHN(folder, split="train" if train else "test")
        return torch.from_numpy(data.data), np.asarray(data.labels)

    def fetch(to: str) -> None:
        for part in ("train", "test"):
            SVHN(to, split=part, download=True)

    return _load("svhn", root, ("", "svhn", "SVHN"), read, fetch if download else None)


def _load(
    name: str,
    root: str | None,
    places: tuple[str, ...],
    read: Callable[[str, bool], tuple[Tensor, np.ndarray]],
    fetch: Callable[[str], Any] | None,
) -> Dataset:
    """Raises UserError for missing files (the message lists the paths tried) and damaged ones."""
    folder = _find(name, root, places)
    if folder is None:
        if fetch is not None:
            torchvision_download(name, root, fetch)
        base = data_root(name, root)
        folder = _find(name, base, places)
        if folder is None:
            raise UserError(
                f"data set {name!r} not found: looked for the files {', '.join(FILES[name])} in "
                f"{', '.join(os.path.join(base, place) for place in places)}. Pass --download to fetch it, or --data-root "
                "DIR, the folder that contains it."
            )
    try:
        parts = [read(folder, train) for train in (True, False)]
    except ImportError as error:
        raise UserError(f"data set {name!r} needs {error.name}: pip install {error.name}.") from None
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
        raise UserError(
            f"data set {name!r}: the files in {folder} are incomplete or damaged ({error}). Expected "
            f"{', '.join(FILES[name])} as published. Replace them."
        ) from error
    train, test = (_split(part, *found) for part, found in zip(("train", "test"), parts, strict=True))
    usual = (len(train), len(test)) == KNOWN[name]
    origin = Origin(
        f"official files, in {folder}",
        "official",
        "task_vectors and the papers on merging that use its suite" if usual else "no published result that we know",
    )
    classes = tuple(map(str, range(10)))
    return Dataset(name, classes, (name,), train, test, TEMPLATES, flip=False, origin=origin)


def _find(name: str, root: str | None, places: tuple[str, ...]) -> str | None:
    base = os.path.expanduser(root or "")
    folders = [os.path.join(base, place) if place else base for place in places]
    have = (f for f in folders if all(os.path.exists(os.path.join(f, file)) for file in FILES[name]))
    return next(have, None) if root else None


def _located(folder: str) -> type[MNIST]:
    """MNIST that reads `folder` itself."""
    return type("MNIST", (MNIST,), {"raw_folder": property(lambda self: folder)})


def _split(part: str, pixels: Tensor, labels: np.ndarray) -> Split:
    labels = labels.astype(np.int64)
    ids = [f"{part}/{i:05d}" for i in range(len(labels))]

    def contents() -> str:
        return hashlib.sha256(pixels.contiguous().numpy().data).hexdigest()

    return Split(labels, np.zeros_like(labels), ids, PixelReader(pixels), contents=contents)
