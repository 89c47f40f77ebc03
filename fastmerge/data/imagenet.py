"""ImageNet-1K (ILSVRC 2012), read in place: `{train,val}/<wnid>/*.JPEG` under the root or a usual folder in it.

The validation images are the test part. A copy with only some of the 1000 wnids is used as it is, with a warning.

Class names: open_clip's 1000 curated names, in the order of timm's synset list (sorted wnids); prompts: OpenAI's 80.
Two names (missile, sunglasses) belong to two classes each, as in OpenAI's list; they are kept, with a warning.
"""

from __future__ import annotations

import os

from fastmerge.data.archives import archives
from fastmerge.data.benchmark import folder_in
from fastmerge.data.dataset import Dataset, Origin
from fastmerge.data.files import data_root, listing
from fastmerge.data.folder import assemble
from fastmerge.data.tree import class_folders, find_parts, looked_for
from fastmerge.data.wordnet import class_names
from fastmerge.errors import UserError
from fastmerge.wording import counted

BASES = (
    "",
    "imagenet/images",
    "imagenet",
    "images",
    "ILSVRC/Data/CLS-LOC",
    "imagenet/ILSVRC/Data/CLS-LOC",
    "Data/CLS-LOC",
)
LAYOUT = "Supported layout: {train,val}/<wnid>/<image>, with wnids like n01440764."


def load(root: str | None, *, skip_bad_images: bool = False) -> Dataset:
    """ImageNet-1K under `root`.

    Raises UserError for missing data (with the paths tried), a flat `val`, a folder that is no wnid, an empty folder.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    root, parts = _find(data_root("imagenet1k", root))
    for part in parts:
        images, folders = listing(os.path.join(root, part))
        if images and not folders:
            raise UserError(
                f"{os.path.join(root, part)} is flat: {counted(len(images), 'image is', 'images are')} directly in it, of an "
                "unknown class. Sort images into one folder per wnid (the script valprep.sh does this for val). "
                + LAYOUT
            )
    below: list[str] = []
    train, test = (class_folders(root, part, notes=below) for part in parts)
    names = class_names()
    for folder in (*train, *test):
        if folder.name not in names:
            raise UserError(
                f"{os.path.join(root, folder.path)}: {folder.name!r} is not one of the 1000 wnids of ImageNet-1K. "
                "Move it away, or use --dataset folder for your own classes. " + LAYOUT
            )
    notes, present = [], {folder.name for folder in train}
    if len(present) < 1000:
        notes.append(f"{len(present)} of the 1000 classes of ImageNet-1K: not the usual benchmark")
    if left_out := {folder.name for folder in test} - present:
        test = [folder for folder in test if folder.name in present]
        lost = counted(len(left_out), f"class of {parts[1]} is", f"classes of {parts[1]} are")
        notes.append(f"{lost} left out: {parts[0]} has no such folder")
    whole = not notes
    notes += below
    return assemble(
        "imagenet1k",
        root,
        train,
        test,
        skip_bad=skip_bad_images,
        flip=True,
        templates=tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
        notes=notes,
        class_names=names,
        origin=Origin(
            f"{{{parts[0]},{parts[1]}}}/<wnid>/, in {root}",
            f"official: trained on {parts[0]}, tested on {parts[1]}",
            "the usual results, on val" if whole else "none: classes are missing",
        ),
    )


def _find(root: str) -> tuple[str, tuple[str, str]]:
    """The folder that contains the two parts, and the names of the parts."""
    looked: list[str] = []
    for base in BASES:
        folder = folder_in(root, base)
        if folder is None:
            looked.append(f"{os.path.join(root, base)} (no such folder)")
        elif parts := find_parts(folder, looked, [], tests=("val",), layouts=LAYOUT):
            return folder, parts
    packed = archives([root, *(os.path.join(root, base) for base in BASES)])
    raise UserError(f"data set 'imagenet1k' not found. {looked_for(looked)}\n{LAYOUT}{packed}")
