"""Office-31 (Saenko et al. 2010): 31 classes, three domains, 4,110 images. Office-Home (Venkateswara et al. 2017,
arXiv 1706.07522): 65 classes, four domains, 15,588 images.

Neither has an official split into train and test. CMM's is random over an unsorted listing, so it differs between machines.
CMM's own prompts (six and five, about offices) are not included; `--template FILE` takes them.
"""

from __future__ import annotations

from fastmerge.data.benchmark import Benchmark, Layout
from fastmerge.data.layouts import PARTS, domains, either, parts
from fastmerge.data.prompts import PHOTO

CAMERAS = ("amazon", "dslr", "webcam")
TELL = ("dslr", "webcam")
STYLES = ("Art", "Clipart", "Product", "Real World")
HOMES = ("OfficeHomeDataset_10072016", "OfficeHome", "office_home", "office-home")
WITHOUT = "no split was published; those of CMM and others are random and differ from machine to machine"

OFFICE31 = Benchmark(
    "office31",
    "Office-31",
    31,
    (
        Layout(
            "CMM's conversion",
            "Office31/{train,test}/<domain>/<class>/<image>",
            ("Office31", "office-31"),
            (*PARTS, either(CAMERAS, "train/{}")),
            parts,
            tells=either(TELL, "train/{}"),
        ),
        Layout(
            "official",
            "office31/{amazon,dslr,webcam}/images/<class>/<image>",
            ("Office31", "office-31", "office", "domain_adaptation_images"),
            (either(CAMERAS, "{}/images"),),
            domains,
            tells=either(TELL, "{}/images"),
        ),
        Layout(
            "without images/",
            "office31/{amazon,dslr,webcam}/<class>/<image>",
            ("Office31", "office-31", "office"),
            (either(CAMERAS),),
            domains,
            tells=either(TELL),
        ),
    ),
    PHOTO,
    (),
    WITHOUT,
    CAMERAS,
)
OFFICE_HOME = Benchmark(
    "office-home",
    "Office-Home",
    65,
    (
        Layout(
            "CMM's conversion",
            "OfficeHome/{train,test}/{art,clipart,product,real_world}/<class>/<image>",
            HOMES,
            (*PARTS, "train/art|train/clipart|train/product|train/real?world"),
            parts,
            tells="train/product",
        ),
        Layout(
            "official",
            "OfficeHomeDataset_10072016/{Art,Clipart,Product,Real World}/<class>/<image>",
            HOMES,
            ("art|clipart|product|real?world|realworld",),
            domains,
            tells="product",
        ),
    ),
    PHOTO,
    (),
    WITHOUT,
    STYLES,
)
