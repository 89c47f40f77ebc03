"""ImageNet-A (Hendrycks et al. 2021, arXiv 1907.07174): 200 classes of ImageNet, 7,500 natural adversarial images.

It was published as a test set. Splits are later inventions; in LAMDA's some classes have three test images, so the mean over
images and the mean over classes differ visibly.
"""

from __future__ import annotations

from functools import cache

from fastmerge.data import wordnet
from fastmerge.data.benchmark import Benchmark, Layout, Published
from fastmerge.data.layouts import PARTS, flat_wnids, parts
from fastmerge.data.prompts import PHOTO

PLACES = ("imagenet-a", "imagenet_a", "imageneta")
IMAGENET_A = Benchmark(
    "imagenet-a",
    "ImageNet-A",
    200,
    (
        Layout("LAMDA zip", "imagenet-a/{train,test}/<wnid>/<image>", PLACES, (*PARTS, "train/n????????"), parts),
        Layout("official", "imagenet-a/<wnid>/<image>", PLACES, ("n????????",), flat_wnids),
        Layout(
            "CoOp tree",
            "imagenet-adversarial/imagenet-a/<wnid>/",
            ("imagenet-adversarial/imagenet-a",),
            ("n????????",),
            flat_wnids,
        ),
    ),
    PHOTO,
    (Published(5_981, 1_519, "PILOT and SD-LoRA (LAMDA's zip)", ("folders",)),),
    "PILOT and SD-LoRA use LAMDA's zip, 5,981 train and 1,519 test images",
    synsets=cache(lambda: frozenset(wordnet.subset("imagenet_a"))),
)
