"""ImageNet-R(endition) (Hendrycks et al. 2021, arXiv 2006.16241): 200 classes of ImageNet in 15 renditions, 30,000 images.

No split was published with it; at least five are in use. Classes are known by their wnids in every copy, also where folders
have the names of the README (MagMax, CMM), so labels are in
wnid order. The domain of an image is its rendition, with which the name of its file begins.
"""

from __future__ import annotations

import os
import re
from functools import cache

from fastmerge.data import wordnet
from fastmerge.data.benchmark import Benchmark, Images, Layout, Place, Published
from fastmerge.data.layouts import PARTS, flat_wnids, parts
from fastmerge.data.tree import WNID, ClassFolder
from fastmerge.wording import counted

RENDITIONS = (
    "art", "cartoon", "deviantart", "embroidery", "graffiti", "graphic", "misc", "origami", "painting", "sculpture",
    "sketch", "sticker", "tattoo", "toy", "videogame",
)  # fmt: skip
PLACES = ("imagenet-r", "imagenet_r", "imagenetr", "imagenet-rendition/imagenet-r")


def rendition(image: str) -> str | None:
    kind = re.split(r"[_.]", image.lower(), maxsplit=1)[0]
    return kind if kind in RENDITIONS else None


def named_parts(place: Place) -> Images:
    """Train and test folders of wnids, or of class names, which are turned into wnids where all are known."""
    images = parts(place)
    names = {f.name for f in (*images.train, *(images.test or []))}
    if all(WNID.fullmatch(name) for name in names):
        return images
    known = wnids_of(place.base)
    wnids = {name: known.get(_plain(name)) for name in names}
    if lost := sorted(name for name, wnid in wnids.items() if wnid is None):
        one, many = "class folder is neither a wnid nor a name", "class folders are neither wnids nor names"
        place.notes.append(
            f"{counted(len(lost), one, many)} that we know, such as {lost[0]}; so classes are in the order of "
            "their folders' names"
        )
        return images

    def renamed(part: list[ClassFolder]) -> list[ClassFolder]:
        return [f._replace(name=wnids[f.name] or f.name) for f in part]

    return images._replace(train=renamed(images.train), test=renamed(images.test or []))


def wnids_of(base: str) -> dict[str, str]:
    """plain name -> wnid of the 200 classes: from the README beside the images, from ImageNet-1K's names, and WordNet's."""
    mine = wordnet.subset("imagenet_r")
    found = {_plain(name): wnid for wnid, names in wordnet.lemmas().items() if wnid in mine for name in names}
    found |= {_plain(name): wnid for wnid, name in wordnet.class_names().items() if wnid in mine}
    for folder in (base, os.path.dirname(base)):
        readme = os.path.join(folder, "README.txt")
        if os.path.isfile(readme):
            with open(readme, encoding="utf-8", errors="replace") as file:
                words = [line.split(maxsplit=1) for line in file]
            found |= {_plain(pair[1]): pair[0] for pair in words if len(pair) == 2 and WNID.fullmatch(pair[0])}
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().lower()


LISTED = "CODA-Prompt, mammoth, InfLoRA and P&M, if the list is CODA-Prompt's; not with LAMDA's zip or random splits"
FOLDERS = (
    "PILOT, EASE, SD-LoRA and RanPAC, if this is LAMDA's zip; random splits of the same size (MagMax, CMM, TRM, L2P in "
    "PyTorch) differ from run to run"
)
IMAGENET_R = Benchmark(
    "imagenet-r",
    "ImageNet-R",
    200,
    (
        Layout(
            "LAMDA zip",
            "imagenet-r/{train,test}/<wnid>/<rendition>_<k>.jpg",
            PLACES,
            (*PARTS, "train/n????????"),
            named_parts,
        ),
        Layout("official", "imagenet-r/<wnid>/<rendition>_<k>.jpg", PLACES[:3], ("n????????",), flat_wnids),
        Layout("CoOp tree", "imagenet-rendition/imagenet-r/<wnid>/", PLACES[3:], ("n????????",), flat_wnids),
        Layout(
            "MagMax's and CMM's conversion", "imagenet-r/{train,test}/<class name>/<image>", PLACES, PARTS, named_parts
        ),
    ),
    "openai80",
    (
        Published(24_000, 6_000, LISTED, ("YAML lists",)),
        Published(24_000, 6_000, "RAPF, if the list is its own", ("text with sections",)),
        Published(24_000, 6_000, FOLDERS, ("folders",)),
    ),
    "24,000 train and 6,000 test images are usual; CODA-Prompt's lists (--split-file) are what CODA-Prompt, mammoth, "
    "InfLoRA and P&M use",
    RENDITIONS,
    rendition,
    synsets=cache(lambda: frozenset(wordnet.subset("imagenet_r"))),
)
