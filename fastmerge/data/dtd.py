"""DTD, the Describable Textures Dataset (Cimpoi et al. 2014): 47 textures, 5,640 images, official lists (partition 1).

The lists for training and for validation are both used for training, 3,760 images, and 1,880 are for testing.
"""

from __future__ import annotations

import os
from collections import defaultdict

from fastmerge.data.benchmark import Images, Layout, Place, Published
from fastmerge.data.fetch import Downloadable
from fastmerge.data.layouts import PARTS, only_test, parts
from fastmerge.data.tree import ClassFolder
from fastmerge.errors import UserError


def lists(place: Place) -> Images:
    """`labels/{train,val,test}1.txt`, with lines such as `banded/banded_0002.jpg`."""
    only_test(place)
    found = []
    for files in (("train1.txt", "val1.txt"), ("test1.txt",)):
        images: dict[str, list[str]] = defaultdict(list)
        for file in files:
            with open(path := os.path.join(place.base, place.at(f"labels/{file}")), encoding="utf-8") as lines:
                for line in filter(None, map(str.strip, lines)):
                    name, _, image = line.partition("/")
                    full = os.path.join(place.base, place.at(f"images/{name}"), image)
                    if not os.path.exists(full):
                        raise UserError(f"{path} lists {line}, but {full} does not exist.")
                    images[name].append(image)
        found.append([ClassFolder("", name, place.at(f"images/{name}"), sorted(own)) for name, own in images.items()])
    return Images(found[0], found[1], "official", "official, partition 1; train and val are for training")


DTD = Downloadable(
    "dtd",
    "DTD",
    47,
    (
        Layout(
            "official",
            "dtd/{images/<class>/<image>, labels/train1.txt, labels/val1.txt, labels/test1.txt}",
            ("dtd", "dtd/dtd"),
            ("images", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt"),
            lists,
            tells="labels/train1.txt",
        ),
        Layout("train and test folders", "dtd/{train,test|val}/<class>/<image>", ("dtd",), PARTS, parts),
    ),
    tuple(
        f"a photo of {article} {{}} {kind}."
        for article in ("a", "the")
        for kind in ("texture", "pattern", "thing", "object")
    ),
    (
        Published(3_760, 1_880, "papers on merging that train on the lists train1 and val1"),
        Published(1_880, 1_880, "papers that train on the list train1 alone (torchvision's train split)"),
    ),
    "partition 1 has 3,760 images in train1 and val1, and 1,880 in test1",
    source="DTD",
)
