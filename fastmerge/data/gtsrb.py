"""GTSRB, German traffic signs (Stallkamp et al. 2011): 43 signs, official split, 26,640 / 12,630 images in torchvision's
download (39,209 training images in the later edition).

The folders are numbers. The names here say what a sign means; those of OpenAI's CLIP, which the papers on merging use,
describe how it looks: --class-names FILE takes them.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterable

from fastmerge.data.benchmark import Images, Layout, Place, Published
from fastmerge.data.fetch import Downloadable
from fastmerge.data.layouts import PARTS, only_test, parts
from fastmerge.data.tree import ClassFolder, class_folders
from fastmerge.errors import UserError

SIGNS = (
    *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for heavy vehicles",
    "right of way at the next intersection",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no heavy vehicles",
    "no entry",
    "general danger",
    "curve to the left",
    "curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "ice or snow",
    "wild animals crossing",
    "end of all speed and passing limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "straight or right",
    "straight or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for heavy vehicles",
)


NEEDS = (
    "GTSRB/Training|GTSRB/Final_Training/Images|Final_Training/Images",
    "GTSRB/Final_Test/Images|Final_Test/Images",
    "GT-final_test.csv",
)


def names(folders: Iterable[str]) -> dict[str, str]:
    """The sign of a number; other folder names stay as they are."""
    return {f: SIGNS[int(f)] if f.isdecimal() and int(f) < len(SIGNS) else f.replace("_", " ") for f in folders}


def official(place: Place) -> Images:
    """`Training/<number>/` and `Final_Test/Images/` with the labels in `GT-final_test.csv`."""
    only_test(place)
    train, test, labels = map(place.at, NEEDS)
    path = os.path.join(place.base, labels)
    there = set(os.listdir(os.path.join(place.base, test)))
    images: dict[str, list[str]] = defaultdict(list)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter=";", skipinitialspace=True):
            if not row.get("ClassId") or not row.get("Filename"):
                raise UserError(f"{path}: expected the columns Filename and ClassId, separated by semicolons.")
            if row["Filename"] not in there:
                raise UserError(f"{path} lists {row['Filename']}, which is not in {os.path.join(place.base, test)}.")
            images[f"{int(row['ClassId']):05d}"].append(row["Filename"])
    found = [ClassFolder("", name, test, sorted(own)) for name, own in images.items()]
    return Images(class_folders(place.base, train, notes=place.notes), found, "official", "official")


GTSRB = Downloadable(
    "gtsrb",
    "GTSRB",
    43,
    (
        Layout(
            "official",
            "gtsrb/{GTSRB/Training/<number>/, GTSRB/Final_Test/Images/, GT-final_test.csv}",
            ("gtsrb", "GTSRB"),
            NEEDS,
            official,
            tells="GT-final_test.csv",
        ),
        Layout("train and test folders", "gtsrb/{train,test}/<number>/<image>", ("gtsrb",), PARTS, parts),
    ),
    tuple(f'a {kind} photo of a "{{}}" traffic sign.' for kind in ("zoomed in", "centered", "close up")),
    (Published(26_640, 12_630, "task_vectors and the papers on merging that use its suite", ("official", "folders")),),
    "the suite of task_vectors has 26,640 train and 12,630 test images",
    names=names,
    flip=False,  # turn left, turn right
    source="GTSRB",
    parts=({"split": "train"}, {"split": "test"}),
)
