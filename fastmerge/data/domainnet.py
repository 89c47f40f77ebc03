"""DomainNet (Peng et al. 2019, arXiv 1812.01754): 345 classes in six domains, official lists of 70 % / 30 % per domain.

Labels are those of the lists. Copies without lists are in the order of their folders' names, where capitals come first.
"""

from __future__ import annotations

from fastmerge.data.benchmark import Benchmark, Layout, Published
from fastmerge.data.layouts import PARTS, domains, either, lists, parts

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
SHORT = ("clip", "info", "paint", "quick")  # DomainBed's names of the first four
TELL = ("infograph", "quickdraw", "info", "quick")  # the other domains are in other data sets too
PLACES = ("domainnet", "domain_net")
LISTS = "|".join(f"{folder}/{domain}_{{0}}.txt" for folder in ("image_list", "splits") for domain in DOMAINS)
DOMAINNET = Benchmark(
    "domainnet",
    "DomainNet",
    345,
    (
        Layout(
            "official",
            "domainnet/{<domain>/<class>/<image>, <domain>_train.txt, <domain>_test.txt}",
            PLACES,
            (either(DOMAINS), either(DOMAINS, "{}_train.txt"), either(DOMAINS, "{}_test.txt")),
            lists(""),
            tells=either(DOMAINS, "{}_train.txt"),
        ),
        Layout(
            "lists in a folder (Transfer-Learning-Library, Dassl)",
            "domainnet/{<domain>/<class>/<image>, {image_list,splits}/<domain>_train.txt, .../<domain>_test.txt}",
            PLACES,
            (either(DOMAINS), LISTS.format("train"), LISTS.format("test")),
            lists("image_list", "splits"),
            tells=LISTS.format("train"),
        ),
        Layout(
            "MagMax's and CMM's conversion",
            "domainnet/{train,test}/<domain>/<class>/<image>",
            PLACES,
            (*PARTS, either((*DOMAINS, *SHORT), "train/{}")),
            parts,
            tells=either(TELL, "train/{}"),
        ),
        Layout(
            "without lists (DomainBed)",
            "domain_net/{clip,info,paint,quick,real,sketch}/<class>/<image>",
            PLACES,
            (either((*DOMAINS, *SHORT)),),
            domains,
            tells=either(TELL),
        ),
    ),
    "openai80",
    (
        Published(409_832, 176_743, "CMM, RanPAC and S-Prompts (official lists, cleaned version)", ("official",)),
        Published(409_832, 176_743, "MagMax and CMM, if the folders follow the official lists", ("folders",)),
    ),
    "the official lists of the cleaned version have 409,832 train and 176,743 test images; "
    "InfLoRA uses CODA-Prompt's YAML lists (--split-file)",
    DOMAINS,
)
