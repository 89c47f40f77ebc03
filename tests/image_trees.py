"""Writes small image folders for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Write a smooth colour image of width x height that depends on the seed; the suffix sets the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_tree(root: Path, *folders: str, images: int = 2, suffix: str = ".png") -> Path:
    """Write `images` different images into each of `folders`."""
    for number, folder in enumerate(folders):
        for k in range(images):
            write_image(root / folder / f"{k}{suffix}", 1000 * number + k)
    return root


def image_folder(root: Path, classes: int = 6, train: int = 8, test: int = 4) -> Path:
    """Write `{train,test}/colour_<c>/<k>.jpg`."""
    names = [f"colour_{c}" for c in range(classes)]
    write_tree(root / "train", *names, images=train, suffix=".jpg")
    write_tree(root / "test", *names, images=test, suffix=".jpg")
    return root


def truncate(path: Path) -> Path:
    """Cut the file in half, like an interrupted download."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path
