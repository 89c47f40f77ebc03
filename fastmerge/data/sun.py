"""SUN397 (Xiao et al. 2010): scenes of 397 classes. Official partition 1: 50 train and 50 test images of every class.

The images are in `<letter>/<class>/` or `<letter>/<class>/<kind>/`, such as `c/church/indoor`; the lists are in a separate
archive (Partitions.zip), unpacked beside them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable

from fastmerge.data.benchmark import Images, Layout, Place, Published
from fastmerge.data.fetch import Downloadable
from fastmerge.data.layouts import PARTS, only_test, parts, undivided
from fastmerge.data.tree import ClassFolder, folders_with_images
from fastmerge.errors import UserError

LISTS = tuple(f"{part}_01.txt|Partitions/{part}_01.txt" for part in ("Training", "Testing"))


def names(folders: Iterable[str]) -> dict[str, str]:
    return {folder: folder.replace("_", " ").replace("/", " ") for folder in folders}


def lists(place: Place) -> Images:
    """`Training_01.txt` and `Testing_01.txt`, with lines such as `/a/abbey/sun_aaa.jpg`."""
    only_test(place)
    found = []
    for need in LISTS:
        images: dict[str, list[str]] = defaultdict(list)
        with open(path := os.path.join(place.base, place.at(need)), encoding="utf-8") as file:
            for line in filter(None, map(str.strip, file)):
                folder, _, image = line.lstrip("/").rpartition("/")
                images[place.at(folder)].append(image)
        for folder, own in images.items():
            full = os.path.join(place.base, folder)
            there = set(os.listdir(full)) if os.path.isdir(full) else set()
            if lack := [image for image in own if image not in there]:
                raise UserError(f"{path} lists {folder}/{lack[0]}, but {os.path.join(full, lack[0])} does not exist.")
        found.append([ClassFolder("", _name(f), f, sorted(own)) for f, own in sorted(images.items())])
    return Images(found[0], found[1], "official", "official, partition 1")


def undivided_images(place: Place) -> Images:
    undivided(place)
    return Images([f._replace(domain="", name=_name(f.path)) for f in folders_with_images(place.base)])


def _name(folder: str) -> str:
    """`c/church/indoor` -> `church/indoor`."""
    return folder.partition("/")[2]


SUN397 = Downloadable(
    "sun397",
    "SUN397",
    397,
    (
        Layout(
            "official",
            "SUN397/{a/abbey/<image>, ..., Training_01.txt, Testing_01.txt}",
            ("SUN397",),
            ("a", *LISTS),
            lists,
            tells=LISTS[0],
        ),
        Layout("train and test folders", "sun397/{train,test}/<class>/<image>", ("sun397",), PARTS, parts),
        Layout(
            "without the lists", "SUN397/a/abbey/<image>", ("SUN397",), ("a/abbey", "z/zen_garden"), undivided_images
        ),
    ),
    ("a photo of a {}.", "a photo of the {}."),
    (Published(19_850, 19_850, "task_vectors and the papers on merging that use its suite", ("official", "folders")),),
    "the official partition 1 has 19,850 train and 19,850 test images",
    names=names,
    source="SUN397",  # the images, not the lists
)
