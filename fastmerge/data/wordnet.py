"""Class names of ImageNet-1K by WordNet id (wnid), for every data set whose folders are wnids."""

from __future__ import annotations


def class_names() -> dict[str, str]:
    """wnid -> name of the 1000 classes, in sorted order of the wnids."""
    from open_clip import IMAGENET_CLASSNAMES  # these two take seconds to import
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))
