"""Aerial and satellite images: EuroSAT (Helber et al. 2019), 27,000 images, and NWPU-RESISC45 (Cheng et al. 2017), 31,500.

EuroSAT has no official split; the papers on merging use the folders `EuroSAT_splits/{train,val,test}` that task_vectors
asks for. RESISC45 has lists by Neumann et al. 2019 (arXiv 1911.06721), `resisc45-{train,val,test}.txt`, used by task_vectors
and torchgeo: 18,900 images for training, 6,300 for testing; those for validation are left out.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable

from fastmerge.data.benchmark import Benchmark, Images, Layout, Place, Published
from fastmerge.data.fetch import Downloadable
from fastmerge.data.layouts import PARTS, only_test, parts, undivided
from fastmerge.data.tree import ClassFolder, class_folders
from fastmerge.errors import UserError

SUITE = "task_vectors and the papers on merging that use its suite"


def camel(folders: Iterable[str]) -> dict[str, str]:
    """AnnualCrop -> annual crop."""
    return {folder: re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", folder).lower() for folder in folders}


def flat(place: Place) -> Images:
    """`<class>/<image>`, not divided."""
    undivided(place)
    return Images(class_folders(place.base, "", notes=place.notes))


def resisc_lists(place: Place) -> Images:
    """Lists of file names such as `airplane_001.jpg`, beside the folder of the images."""
    only_test(place)
    found: list[list[ClassFolder]] = []
    for part in ("train", "test"):
        path = os.path.join(place.base, place.at(f"resisc45-{part}.txt"))
        with open(path, encoding="utf-8") as file:
            images: dict[str, list[str]] = defaultdict(list)
            for line in filter(None, map(str.strip, file)):
                images[line.rpartition("_")[0]].append(line)
        found.append(
            [ClassFolder("", name, place.at(f"NWPU-RESISC45/{name}"), sorted(own)) for name, own in images.items()]
        )
        for folder in found[-1]:
            full = os.path.join(place.base, folder.path)
            there = set(os.listdir(full)) if os.path.isdir(full) else set()
            if lack := [image for image in folder.images if image not in there]:
                raise UserError(f"{path} lists {lack[0]}, but {os.path.join(full, lack[0])} does not exist.")
    return Images(found[0], found[1], "official", "the lists of Neumann et al. 2019, without those for validation")


EUROSAT = Downloadable(
    "eurosat",
    "EuroSAT",
    10,
    (
        Layout(
            "EuroSAT_splits", "EuroSAT_splits/{train,test}/<class>/<image>", ("EuroSAT_splits", "eurosat"), PARTS, parts
        ),
        Layout(
            "official",
            "eurosat/2750/<class>/<image>",
            ("eurosat/2750", "2750", "EuroSAT", "EuroSAT_RGB"),
            ("AnnualCrop", "SeaLake"),
            flat,
            tells="AnnualCrop",
        ),
    ),
    (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    ),
    (Published(21_600, 2_700, SUITE, ("folders",)),),
    "the suite of task_vectors has 21,600 train and 2,700 test images",
    names=camel,
    source="EuroSAT",
)


RESISC45 = Benchmark(
    "resisc45",
    "NWPU-RESISC45",
    45,
    (
        Layout(
            "with lists",
            "resisc45/{NWPU-RESISC45/<class>/<image>, resisc45-train.txt, resisc45-test.txt}",
            ("resisc45",),
            ("NWPU-RESISC45", "resisc45-train.txt", "resisc45-test.txt"),
            resisc_lists,
            tells="resisc45-train.txt",
        ),
        Layout(
            "train and test folders",
            "resisc45/{train,test}/<class>/<image>",
            ("resisc45", "NWPU-RESISC45"),
            PARTS,
            parts,
        ),
        Layout(
            "official",
            "NWPU-RESISC45/<class>/<image>",
            ("NWPU-RESISC45", "resisc45/NWPU-RESISC45", "resisc45"),
            ("airplane", "wetland"),
            flat,
            tells="thermal_power_station",
        ),
    ),
    tuple(
        f"{view} {kind} of {article}{{}}."
        for article in ("", "a ", "the ")
        for kind in ("imagery", "photo", "view")
        for view in ("satellite", "aerial")
    ),
    (Published(18_900, 6_300, SUITE, ("official", "folders")),),
    "the suite of task_vectors has 18,900 train and 6,300 test images",
)
