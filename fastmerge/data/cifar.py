"""CIFAR-100 and CIFAR-10 (Krizhevsky 2009): torchvision reads the published pickles, and downloads them on request.

The pickles are expected in `root/cifar-100-python` (`root/cifar-10-batches-py`), where torchvision puts them, or in
`root` itself. Images are 32x32; torch's bicubic resize with antialias makes other sizes on the host, so that every
device gets the same pixels. Prompts: the 18 that OpenAI's CLIP uses for both data sets.
"""

from __future__ import annotations

import os
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from fastmerge.data.archives import archives
from fastmerge.data.dataset import Dataset, Origin, Split
from fastmerge.data.files import data_root
from fastmerge.errors import UserError

_KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
TEMPLATES = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {kind}photo of {article} {{}}." for kind in _KINDS),
        *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
    )
)


def load_cifar100(root: str | None, *, download: bool = False) -> Dataset:
    """CIFAR-100: 50,000 train and 10,000 test images of 100 fine classes, in alphabetical order."""
    return _load("cifar100", CIFAR100, root, download)


def load_cifar10(root: str | None, *, download: bool = False) -> Dataset:
    """CIFAR-10: 50,000 train and 10,000 test images of 10 classes, in alphabetical order."""
    return _load("cifar10", CIFAR10, root, download)


def _load(name: str, source: type[CIFAR10], root: str | None, download: bool) -> Dataset:
    """Raises UserError for missing files (the message lists the paths tried), damaged files, or a failed download."""
    if download and root is not None:
        try:
            os.makedirs(os.path.expanduser(root), exist_ok=True)
        except OSError as error:
            raise UserError(f"data set {name!r}: cannot create --data-root {root}: {error}.") from error
    root = data_root(name, root)
    files = [file for file, _ in (*source.train_list, *source.test_list)] + [source.meta["filename"]]
    usual = os.path.join(root, source.base_folder)
    folder = next((f for f in (usual, root) if any(os.path.exists(os.path.join(f, file)) for file in files)), None)
    if folder is None and not download:
        raise UserError(
            f"data set {name!r} not found: looked for the files {', '.join(files)} in {usual} and in {root}. "
            f"Pass --download to fetch it, or --data-root DIR, the folder that contains it.{archives([root])}"
        )
    # torchvision joins root, base_folder and file name, so a parent and a folder name select any folder.
    parent, own = os.path.split(os.path.abspath(folder or usual))
    located = type(source.__name__, (source,), {"base_folder": own})
    try:
        train, test = (located(parent, train=part, download=download) for part in (True, False))
    except URLError as error:
        raise UserError(
            f"data set {name!r}: download from {source.url} failed: {error.reason}. Fetch and unpack it by hand into "
            f"{usual}, or try again."
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(
            f"data set {name!r}: the files in {folder or usual} are incomplete or damaged ({error}). Expected "
            f"{', '.join(files)} with the published checksums. Replace them, or pass --download to fetch them again."
        ) from error
    names = tuple(class_name.replace("_", " ") for class_name in train.classes)
    origin = Origin(f"the published files, in {folder or usual}", "official, 50,000 / 10,000", "the usual results")
    return Dataset(
        name, names, (name,), _split("train", train), _split("test", test), TEMPLATES, flip=True, origin=origin
    )


def _split(part: str, data: CIFAR10) -> Split:
    labels = np.array(data.targets, np.int64)
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # [n, 3, 32, 32] uint8
    ids = [f"{part}/{i:05d}" for i in range(len(labels))]
    return Split(labels, np.zeros_like(labels), ids, PixelReader(pixels))


class PixelReader:
    """`Split.read` for images that are in memory."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __call__(self, indices: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images = self.pixels[torch.from_numpy(indices)]
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        return images.to(device), torch.ones(len(indices), dtype=torch.bool)
