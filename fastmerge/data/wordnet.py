"""Names of ImageNet's classes by WordNet id (wnid), from the lists that timm and open_clip ship."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def class_names() -> dict[str, str]:
    """wnid -> name of the 1000 classes of ImageNet-1K, in sorted order of the wnids."""
    from open_clip import IMAGENET_CLASSNAMES  # these two take seconds to import
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


def subset(name: str) -> list[str]:
    """The wnids of `imagenet_r` or `imagenet_a`, sorted."""
    return _list(f"{name}_synsets.txt")


@cache
def lemmas() -> dict[str, list[str]]:
    """wnid -> the words of WordNet for it."""
    pairs = (line.split("\t") for line in _list("imagenet_synset_to_lemma.txt"))
    return {wnid: [word.strip() for word in words.split(",")] for wnid, words in pairs}


def _list(name: str) -> list[str]:
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8").split("\n")[:-1]
