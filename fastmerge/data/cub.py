"""CUB-200-2011 (Wah et al. 2011): 200 species of birds, 11,788 images, folders `NNN.Name`.

The official split has 5,994 / 5,794 images. LAMDA's copy, with the same folder names, has another split: results on the two
cannot be compared.
"""

from __future__ import annotations

from fastmerge.data import split_file
from fastmerge.data.benchmark import Benchmark, Images, Layout, Place, Published
from fastmerge.data.layouts import PARTS, parts
from fastmerge.data.split import by_list
from fastmerge.data.tree import class_folders


def official(place: Place) -> Images:
    """`images/NNN.Name/`, divided by the numbered files."""
    split = split_file.read(place.base, place.test_part)
    (train, test), order = by_list(split, class_folders(place.base, place.at("images")), place.base)
    return Images(train, test, "official", "official (train_test_split.txt)", order)


OFFICIAL = (
    "CMM and MagMax (the official split); not with PILOT and P&M, which use LAMDA's split of 9,430 / 2,358 images"
)
CUB = Benchmark(
    "cub200",
    "CUB-200-2011",
    200,
    (
        Layout(
            "official",
            "CUB_200_2011/{images/NNN.Name/<image>, images.txt, image_class_labels.txt, train_test_split.txt}",
            ("CUB_200_2011",),
            ("images", *split_file.NUMBERED),
            official,
            tells="train_test_split.txt",
        ),
        Layout(
            "MagMax's and CMM's conversion",
            "CUB_200_2011_splitted/images_train_test/{train,val}/NNN.Name/<image>",
            ("CUB_200_2011_splitted/images_train_test", "images_train_test"),
            ("train/[0-9]*.*", "val"),
            parts,
        ),
        Layout("LAMDA zip", "cub/{train,test}/NNN.Name/<image>", ("cub", "cub200"), (*PARTS, "train/[0-9]*.*"), parts),
    ),
    "openai80",
    (
        Published(5_994, 5_794, OFFICIAL),
        Published(9_430, 2_358, "PILOT and P&M (LAMDA's split); not with CMM and MagMax (the official split)"),
    ),
    "the official split has 5,994 train and 5,794 test images (CMM, MagMax), LAMDA's 9,430 and 2,358 (PILOT, P&M)",
)
