"""Image files: lists folders, and decodes images to squares of uint8 pixels on a thread pool.

Decoding: RGB, shorter side resized to `size` (bicubic with antialias), centre crop. Two differences from torchvision's
Resize + CenterCrop: crop and resize are one step on the exact square, whereas torchvision first rounds the longer side
to whole pixels; and a JPEG with sides of at least 4 * `size` is first shrunk by 2, 4 or 8 in its DCT, which is faster.
EXIF rotation is ignored, as in torchvision.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmerge.data.archives import archives
from fastmerge.errors import UserError

HASHED_BYTES = 2_000_000_000  # seconds to read at every start; a large data set is known by the sizes of its files
BITS = 258  # TIFF's tag BitsPerSample
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow names these formats but cannot decode them by itself


@cache
def image_suffixes() -> frozenset[str]:
    """The file-name endings (lower case, with the dot) that Pillow can decode."""
    Image.init()
    return frozenset(e for e, f in Image.registered_extensions().items() if f in Image.OPEN and f not in _STUBS)


def data_root(name: str, root: str | os.PathLike[str] | None) -> str:
    """Return the path of the existing folder `root`, or raise UserError. name: the data set that needs it."""
    if root is None:
        raise UserError(f"data set {name!r} needs a folder: pass --data-root DIR.")
    path = os.path.expanduser(os.fspath(root))
    if not os.path.isdir(path):
        what = "is not a folder" if os.path.exists(path) else "does not exist"
        raise UserError(
            f"data set {name!r}: --data-root {path} {what}. Pass the folder that contains the data.{archives([path])}"
        )
    return path


def listing(folder: str) -> tuple[list[str], list[str]]:
    """Names of the images and of the sub-folders in `folder`, each sorted by code point; hidden names are left out.

    One scandir pass without a stat call per file: 1.3 M images are listed in seconds. Raises UserError.
    """
    suffixes, images, folders = image_suffixes(), [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if os.path.splitext(name)[1].lower() in suffixes:
                    images.append(name)
                elif entry.is_dir():
                    folders.append(name)
    except OSError as error:
        raise UserError(f"cannot list folder {folder}: {error.strerror}. Check that it can be read.") from error
    return sorted(images), sorted(folders)


def decode(path: str | BinaryIO, size: int) -> np.ndarray:
    """The image at `path` (or in an open file) as uint8 [size, size, 3]. Raises what Pillow and `square` raise."""
    with Image.open(path) as file:
        file.draft(None, (2 * size, 2 * size))  # a no-op for anything but JPEG
        return square(file, size)


def square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of an image as uint8 [size, size, 3], RGB on white. Raises ValueError for values of unknown range."""
    image = _rgb(image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB on a white background. Raises ValueError for values of unknown range."""
    # of the formats that Pillow reads as 32-bit integers, these two hold 16 bits
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its values are {kind} of unknown range; convert it to 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16-bit values at 255
        top = (
            4095 if getattr(image, "tag_v2", {}).get(BITS) == (12,) else 65535
        )  # Pillow keeps the values of a 12-bit TIFF
        values = np.asarray(image).astype(np.int64).clip(0, top)
        return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def host_pixels(shape: tuple[int, ...]) -> Tensor:
    """uint8 zeros on the host, outside the heap: large short-lived buffers between small long-lived ones would fragment
    the heap, and the memory of a long run would grow."""
    size = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(shape) if size else torch.zeros(shape).byte()


@cache
def _pool() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(cores, thread_name_prefix="decode")


class ImageReader:
    """`Split.read` for images that are decoded one by one, in parallel (Pillow releases the interpreter lock).

    decode_one(i, size): image i as uint8 [size, size, 3]. name(i): what it is called in an error.
    """

    def __init__(
        self, decode_one: Callable[[int, int], np.ndarray], name: Callable[[int], str], skip_bad: bool = False
    ) -> None:
        self.decode_one, self.name, self.skip_bad = decode_one, name, skip_bad

    def __call__(self, indices: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images = host_pixels((len(indices), 3, size, size))
        pixels = images.numpy()
        good = np.ones(len(indices), bool)

        def read(position: int) -> None:
            index = int(indices[position])
            try:
                pixels[position] = self.decode_one(index, size).transpose(2, 0, 1)
            except Exception as error:  # Pillow's decoders raise almost any exception for a damaged file
                if not self.skip_bad:
                    raise UserError(
                        f"cannot read image {self.name(index)}: {error}. Run the same command with --skip-bad-images to "
                        "continue without it. With the file repaired or removed it is another data set, which needs another "
                        "--run-dir if anything was learned in this one."
                    ) from error
                good[position] = False

        list(_pool().map(read, range(len(indices))))  # raises the error of the first bad image in order
        return images.to(device), torch.from_numpy(good)


class FileReader(ImageReader):
    """`Split.read` for the files `root/ids[i]`."""

    def __init__(self, root: str, ids: Sequence[str], skip_bad: bool) -> None:
        self.root, self.ids = root, ids

        def path(index: int) -> str:
            return os.path.join(root, ids[index])

        super().__init__(lambda index, size: decode(path(index), size), path, skip_bad)

    def contents(self) -> str:
        """The hash of all files; see `files_hash`."""
        return files_hash([os.path.join(self.root, name) for name in self.ids])


def files_hash(paths: Sequence[str]) -> str:
    """sha256 over the bytes of all files; where they have more than HASHED_BYTES together, over their sizes."""
    groups = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    sizes = [size for group in _pool().map(lambda g: [_size(path) for path in g], groups) for size in group]
    digest = hashlib.sha256(repr(sizes).encode())
    if sum(sizes) <= HASHED_BYTES:
        for group in _pool().map(lambda g: [_digest(path) for path in g], groups):
            digest.update(b"".join(group))
    return digest.hexdigest()


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1  # told when the image is read


def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b"unreadable"
