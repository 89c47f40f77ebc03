"""Tiny-ImageNet-200 (Stanford CS231n): 200 classes of ImageNet at 64 x 64 pixels, 100,000 / 10,000 labelled images.

The published test images have no labels, so the validation images are for testing. Classes have their ImageNet-1K names, as
in every data set of wnids here; `--class-names words.txt` takes Tiny-ImageNet's own.
"""

from __future__ import annotations

import os
from collections import defaultdict

from fastmerge.data.benchmark import Benchmark, Images, Layout, Place, Published
from fastmerge.data.files import listing
from fastmerge.data.layouts import PARTS, only_test, parts
from fastmerge.data.tree import ClassFolder, class_folders
from fastmerge.errors import UserError
from fastmerge.wording import counted

PLACES = ("tiny-imagenet-200", "tiny-imagenet", "tiny_imagenet")


def official(place: Place) -> Images:
    """`train/<wnid>/images/`, and `val/images/` with `val_annotations.txt`."""
    only_test(place, "val")
    file, folder = os.path.join(place.base, place.at("val/val_annotations.txt")), place.at("val/images")
    images, found = frozenset(listing(os.path.join(place.base, folder))[0]), defaultdict(list)
    with open(file, encoding="utf-8", errors="surrogateescape") as opened:
        for number, line in enumerate(opened, 1):
            image, _, rest = line.rstrip("\n").partition("\t")
            wnid = rest.partition("\t")[0]
            if not wnid or image not in images:
                raise UserError(
                    f"{file}, line {number}: expected an image of {os.path.join(place.base, folder)}, a tab and its "
                    f"wnid, got {line.strip()!r}."
                )
            found[wnid].append(image)
    if rest_of := len(images) - sum(map(len, found.values())):
        place.notes.append(
            f"{counted(rest_of, 'image of val is', 'images of val are')} not in val_annotations.txt and left out"
        )
    test = [ClassFolder("", wnid, folder, sorted(names)) for wnid, names in found.items()]
    train = class_folders(place.base, place.at("train"), notes=place.notes)
    return Images(train, test, "official", "official (val_annotations.txt)")


WHO = "results on the validation images, as is usual"
TINY_IMAGENET = Benchmark(
    "tiny-imagenet",
    "Tiny-ImageNet",
    200,
    (
        Layout(
            "official",
            "tiny-imagenet-200/{train/<wnid>/images/<image>, val/images/<image>, val/val_annotations.txt}",
            PLACES,
            ("train/n????????", "val/images", "val/val_annotations.txt"),
            official,
            tells="val/val_annotations.txt",
        ),
        Layout(
            "val sorted by class",
            "tiny-imagenet-200/{train,val}/<wnid>/[images/]<image>",
            PLACES,
            (*PARTS, "train/n????????"),
            parts,
        ),
    ),
    "openai80",
    (Published(100_000, 10_000, WHO),),
    "the labelled images are 100,000 for training and 10,000 for validation",
)
