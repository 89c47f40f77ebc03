"""PACS (Li et al. 2017, arXiv 1710.03077): 7 classes in four domains, 9,991 images.

Its lists are made for testing on an unseen domain, so a test list holds all images of its domain. Here the images of
`..._test_kfold.txt` that are not in `..._train_kfold.txt` are for testing (those of `..._crossval_kfold.txt`).
"""

from __future__ import annotations

from fastmerge.data.benchmark import Benchmark, Layout
from fastmerge.data.layouts import PARTS, domains, either, lists, parts
from fastmerge.data.prompts import PHOTO

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS = Benchmark(
    "pacs",
    "PACS",
    7,
    (
        Layout(
            "official",
            "PACS/{kfold/<domain>/<class>/<image>, <domain>_train_kfold.txt, <domain>_test_kfold.txt}",
            ("PACS",),
            (either(("kfold", *DOMAINS)), either(DOMAINS, "{}_train_kfold.txt"), either(DOMAINS, "{}_test_kfold.txt")),
            lists(""),
            tells=either(DOMAINS, "{}_train_kfold.txt"),
        ),
        Layout(
            "with lists in splits/ (Dassl)",
            "PACS/{images/<domain>/<class>/<image>, splits/<domain>_train_kfold.txt, splits/<domain>_test_kfold.txt}",
            ("PACS",),
            (either(DOMAINS, "splits/{}_train_kfold.txt"), either(DOMAINS, "splits/{}_test_kfold.txt")),
            lists("splits"),
            tells=either(DOMAINS, "splits/{}_train_kfold.txt"),
        ),
        Layout(
            "with train and test folders",
            "PACS/{train,test}/<domain>/<class>/<image>",
            ("PACS",),
            (*PARTS, either(DOMAINS, "train/{}")),
            parts,
            tells="train/art_painting",
        ),
        Layout(
            "without lists (DomainBed)",
            "PACS/<domain>/<class>/<image>",
            ("PACS/kfold", "kfold", "PACS"),
            (either(DOMAINS),),
            domains,
            tells="art_painting",
        ),
    ),
    PHOTO,
    (),
    "results on PACS are usually of another task, testing on an unseen domain",
    DOMAINS,
)
