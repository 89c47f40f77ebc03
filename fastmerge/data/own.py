"""Data sets of the user: a loader in a module (`--dataset package.module:loader`), and a Dataset from lists of images.

def load(root):
    train = [os.path.join(root, f"{i}.png") for i in range(100)]
    return make_dataset("mine", ("cat", "dog"), train=(train, labels), test=(test, test_labels))

fastmerge.register_dataset("mine", load)      # or: python -m fastmerge --dataset my_module:load --data-root DIR
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.files import ImageReader, decode, files_hash, square
from fastmerge.errors import UserError
from fastmerge.wording import counted


def make_dataset(
    name: str,
    class_names: Sequence[str],
    train: tuple[Sequence[Any], Sequence[int]],
    test: tuple[Sequence[Any], Sequence[int]],
    *,
    templates: Sequence[str] = ("a photo of a {}.",),
    flip: bool = False,
    skip_bad: bool = False,
) -> Dataset:
    """A data set from images and labels.

    train, test: (images, labels). images[i] is the path of a file, a PIL image, or an array uint8 [h, w] or [h, w, 3]; the
    sequence may compute it on demand, and several threads ask it. labels: indices into `class_names`. flip: whether a
    mirrored image keeps its class. skip_bad: skip and count unreadable images. A stopped run
    notices changed images only if they are files or one array. Raises UserError for lengths or labels
    that do not fit.
    """
    parts = [
        _split(f"{name} {part}", part, *given, len(class_names), skip_bad)
        for part, given in (("train", train), ("test", test))
    ]
    return Dataset(name, tuple(class_names), (name,), parts[0], parts[1], tuple(templates), flip)


def _split(what: str, part: str, images: Sequence[Any], labels: Sequence[int], classes: int, skip_bad: bool) -> Split:
    index = np.asarray(labels)
    if index.shape != (len(images),):
        raise UserError(
            f"{what}: {counted(len(images), 'image')} and labels of shape {list(index.shape)}; expected one label "
            "per image."
        )
    if len(index) and (index.dtype.kind not in "iu" or not 0 <= index.min() <= index.max() < classes):
        raise UserError(f"{what}: expected labels 0..{classes - 1}, got {index.min()}..{index.max()} ({index.dtype}).")
    paths = [os.fspath(image) for image in images] if _are_paths(images) else None
    ids = paths or [f"{part}/{i:07d}" for i in range(len(index))]
    reader = ImageReader(lambda i, size: pixels(images[i], size), ids.__getitem__, skip_bad)
    contents: Callable[[], str] | None = None
    if paths:
        contents = functools.partial(files_hash, paths)
    elif isinstance(images, np.ndarray):
        contents = functools.partial(_array_hash, images)
    index = index.astype(np.int64)
    return Split(index, np.zeros_like(index), ids, reader, skip_bad, contents=contents)


def _array_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _are_paths(images: Sequence[Any]) -> bool:
    """Whether the images are files, judged by the first one if it is one."""
    return len(images) > 0 and isinstance(images[0], str | os.PathLike)


def pixels(image: Any, size: int) -> np.ndarray:
    """An image of `make_dataset` as uint8 [size, size, 3]."""
    if isinstance(image, str | os.PathLike):
        return decode(os.fspath(image), size)
    if isinstance(image, Image.Image):
        return square(image, size)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"expected a path, a PIL image, or uint8 [h, w] or [h, w, 3]; got {array.dtype} {array.shape}")
    return square(Image.fromarray(array), size)


def imported(spec: str) -> Callable[..., Any]:
    """The loader `package.module:loader`; modules in the current folder are found, too. Raises UserError if there is none."""
    module, _, name = spec.partition(":")
    if not module or not name or not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise UserError(f"--dataset {spec}: expected package.module:loader, such as my_data:load.")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:  # the command `fastmerge` does not look there, `python -m fastmerge` does
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # the module is the user's: it may raise anything
        raise UserError(f"--dataset {spec}: cannot import {module}: {_where(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"--dataset {spec}: {module} has no {name}. Expected a function that takes the data root.")
        found = getattr(found, part)
    check_loader(spec, found)
    return found


def check_loader(name: str, loader: Any) -> None:
    """Raise UserError unless `loader` can be called with the data root."""
    if not callable(loader):
        raise UserError(f"data set {name!r}: its loader is {type(loader).__name__}; expected a function loader(root).")
    if not inspect.signature(loader).parameters:
        raise UserError(
            f"data set {name!r}: its loader takes no argument; expected loader(root), with None for no root."
        )


def called(name: str, loader: Callable[..., Any], root: str | None, options: dict[str, Any]) -> Dataset:
    """What the loader of a user returns. Raises UserError if it fails, with the line, or returns no Dataset."""
    try:
        dataset = loader(root, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data set {name!r}: its loader failed: {_where(error)}") from error
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"data set {name!r}: its loader returned {type(dataset).__name__}; expected fastmerge.data.Dataset, which "
            "fastmerge.data.make_dataset makes from lists of images."
        )
    return dataset


def _where(error: Exception) -> str:
    """The error with the last line of the user's code that it came through."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" (in {last[0].filename}, line {last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {error}{place}"
