"""Stanford Cars (Krause et al. 2013): 196 models of cars, 8,144 / 8,041 images, official split.

The official files are read with scipy. Class names keep the year last, as in torchvision; CoOp moves it to the front. One
name has a slash, `Ram C/V Cargo Van Minivan 2012`, which folders cannot have: the ways in which copies write it are all read
as that name.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastmerge.data import split_file
from fastmerge.data.benchmark import Benchmark, Images, Layout, Place, Published
from fastmerge.data.files import listing
from fastmerge.data.layouts import PARTS, only_test
from fastmerge.data.prompts import CARS as TEMPLATES
from fastmerge.data.tree import ClassFolder, find_parts
from fastmerge.errors import UserError

SLASH = "Ram C/V Cargo Van Minivan 2012"
MATS = (
    "devkit/cars_meta.mat",
    "devkit/cars_train_annos.mat",
    "cars_test_annos_withlabels.mat",
    "cars_train",
    "cars_test",
)


def official(place: Place) -> Images:
    """The images in `cars_train` and `cars_test` with the labels of the .mat files, in the order of the devkit."""

    def mat(name: str, key: str) -> Any:
        try:
            from scipy.io import loadmat  # type: ignore[import-untyped]

            return np.atleast_1d(loadmat(os.path.join(place.base, place.at(name)), squeeze_me=True)[key])
        except ImportError:
            raise UserError(
                "the .mat files of Stanford Cars need scipy: pip install scipy, or use a copy by class."
            ) from None
        except Exception as error:  # scipy raises several kinds for a damaged file
            raise UserError(
                f"{os.path.join(place.base, name)} cannot be read ({error}); expected it as published."
            ) from error

    only_test(place)
    classes = tuple(str(name) for name in mat(MATS[0], "class_names"))
    train, test = (
        _grouped(place, ((f"{folder}/{a['fname']}", classes[a["class"] - 1]) for a in mat(name, "annotations")))
        for name, folder in zip(MATS[1:3], MATS[3:], strict=True)
    )
    return Images(train, test, "official", "official (cars_train, cars_test)", classes)


def coop(place: Place) -> Images:
    """The images that CoOp's JSON lists; its validation images belong to the official training images."""
    only_test(place)
    file = os.path.join(place.base, place.at("split_zhou_StanfordCars.json"))
    form, entries = split_file.read_one(file)
    labels = {e.label or 0: year_last(e.name or "") for e in entries}
    train, test = (
        _grouped(
            place,
            ((e.path, labels[e.label or 0]) for e in entries if (e.part == "test") == is_test),
        )
        for is_test in (False, True)
    )
    return Images(
        train,
        test,
        "official",
        f"{form}, train and val joined (the official split)",
        tuple(labels[k] for k in sorted(labels)),
    )


def by_class(place: Place) -> Images:
    """`{train,test}/<class>/`, with the class that has a slash in its name written in any way."""
    found = find_parts(place.base, [], place.notes, test_part=place.test_part)
    assert found  # the layout needs them
    train, test = ([f._replace(name=spelt(f.name)) for f in _classes(place.base, part)] for part in found)
    return Images(train, test, "folders", f"the {found[0]} and {found[1]} folders")


def spelt(name: str) -> str:
    """The class of a folder: `Ram C-V ...`, `Ram C V ...` and `Ram CV ...` are the class with the slash."""
    return SLASH if re.fullmatch(r"ram c\W?_?v cargo van minivan 2012", name.replace("_", " ").lower()) else name


def year_last(name: str) -> str:
    """`2012 Acura RL Sedan` (CoOp) -> `Acura RL Sedan 2012`."""
    return re.sub(r"^(\d{4}) (.+)$", r"\2 \1", name)


def names(classes: Iterable[str]) -> dict[str, str]:
    return {name: name.replace("_", " ") for name in classes}


def _classes(base: str, part: str) -> list[ClassFolder]:
    found = []
    for name in listing(os.path.join(base, part))[1]:
        images, below = listing(os.path.join(base, part, name))
        if images:
            found.append(ClassFolder("", name, f"{part}/{name}", images))
        for inner in below:  # a copy that took the slash for a folder
            if inside := listing(os.path.join(base, part, name, inner))[0]:
                found.append(ClassFolder("", f"{name}/{inner}", f"{part}/{name}/{inner}", inside))
    if not found:
        raise UserError(f"{os.path.join(base, part)}: no folder in it has images. Expected <class>/<image>.")
    return found


def _grouped(place: Place, samples: Iterable[tuple[str, str]]) -> list[ClassFolder]:
    """Class folders of (path relative to the data set, class). Raises UserError for an image that is not on disk."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, name in samples:
        where, _, image = path.rpartition("/")
        found[place.at(where), name].append(image)
    for where in {where for where, _ in found}:
        on_disk = frozenset(os.listdir(full)) if os.path.isdir(full := os.path.join(place.base, where)) else frozenset()
        if lack := sorted({i for (w, _), images in found.items() if w == where for i in images} - on_disk):
            raise UserError(
                f"{os.path.join(full, lack[0])} does not exist; {len(lack)} listed images are missing in {full}."
            )
    return [ClassFolder("", name, where, sorted(images)) for (where, name), images in found.items()]


CARS = Benchmark(
    "cars",
    "Stanford Cars",
    196,
    (
        Layout(
            "official",
            "stanford_cars/{devkit/*.mat, cars_test_annos_withlabels.mat, cars_train/, cars_test/}",
            ("stanford_cars", "cars", "merging/stanford_cars"),
            MATS,
            official,
            tells=MATS[0],
        ),
        Layout(
            "CoOp tree",
            "stanford_cars/{split_zhou_StanfordCars.json, cars_train/, cars_test/}",
            ("stanford_cars",),
            ("split_zhou_stanfordcars.json", "cars_train|cars_test"),
            coop,
            tells="split_zhou_stanfordcars.json",
        ),
        Layout(
            "copy by class",
            "{car_data,cars196,cars,merging/stanford_cars}/{train,test}/<class>/<image>",
            ("car_data", "car_data/car_data", "cars196", "cars", "merging/stanford_cars", "stanford_cars"),
            PARTS,
            by_class,
        ),
    ),
    TEMPLATES,
    (
        Published(
            8_144, 8_041, "TRM, CMM, MagMax and RanPAC (the official split); not with C3Box and PROOF (100 classes)"
        ),
        Published(8_041, 8_144, "CoFiMA, whose script seems to exchange the official train and test images"),
    ),
    "the official split has 8,144 train and 8,041 test images; C3Box and PROOF use 100 of the classes",
    names=names,
)
