"""Small trees in the layouts of published data sets, without pixels: listing them needs names only.

A tree is a dict from path to text; None makes an empty image file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

WNIDS = ("n01443537", "n01484850", "n02007558")  # goldfish, great white shark, flamingo
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
PAINTED = ("art_painting", "cartoon", "photo", "sketch")
BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
MODELS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012")


def plant(root: Path, tree: dict[str, str | None]) -> Path:
    for path, text in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text or "")
    return root


def images(*folders: str, names: Iterable[str] = ("0.jpg", "1.jpg", "2.jpg")) -> dict[str, None]:
    names = list(names)
    return {f"{folder}/{name}": None for folder in folders for name in names}


def both(form: str, values: Iterable[str], test: str = "test", **options) -> dict[str, None]:
    """`form` with {part} for train and test, and {} for each of the values."""
    values = list(values)
    folders = [form.replace("{part}", part).replace("{}", value) for part in ("train", test) for value in values]
    return images(*folders, **options)


def cub() -> dict[str, str | None]:
    """Official: three images a species, the first for testing."""
    paths = [f"{bird}/{k}.jpg" for bird in BIRDS for k in range(3)]
    lines = range(1, len(paths) + 1)
    return dict.fromkeys(f"CUB_200_2011/images/{path}" for path in paths) | {
        "CUB_200_2011/images.txt": "".join(f"{n} {path}\n" for n, path in zip(lines, paths, strict=True)),
        "CUB_200_2011/image_class_labels.txt": "".join(f"{n} {(n + 2) // 3}\n" for n in lines),
        "CUB_200_2011/train_test_split.txt": "".join(f"{n} {int(n % 3 != 1)}\n" for n in lines),
    }


def cars(root: Path) -> Path:
    """Official: two images a model and part."""
    import numpy as np
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([MODELS], dtype=object)})
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.zeros((1, 6), dtype=[("bbox_x1", object), ("class", object), ("fname", object)])
        rows[0] = [(1, i % 3 + 1, f"{i + 1:05d}.jpg") for i in range(6)]
        savemat(folder / file, {"annotations": rows})
        plant(folder, images(f"cars_{part}", names=(f"{i + 1:05d}.jpg" for i in range(6))))
    return root


def domainnet(lists: str = "") -> dict[str, str | None]:
    """Official: labels are not in code-point order (a capital), quickdraw lacks a class, one class is called train."""
    classes, tree = ("airplane", "The_Eiffel_Tower", "train"), {}
    for domain in DOMAINS:
        own = classes[1:] if domain == "quickdraw" else classes
        paths = [f"{domain}/{name}/{domain}_{k}.jpg" for name in own for k in range(3)]
        tree |= {f"domainnet/{path}": None for path in paths}
        for part, chosen in (("train", paths[::3] + paths[1::3]), ("test", paths[2::3])):
            tree[f"domainnet/{lists}{domain}_{part}.txt"] = "".join(
                f"{path} {classes.index(path.split('/')[1])}\n" for path in chosen
            )
    return tree


def pacs(lists: str = "", inside: str = "kfold/") -> dict[str, str | None]:
    """Official: a test list holds all images, labels begin with 1."""
    tree: dict[str, str | None] = {}
    for domain in PAINTED:
        lines = [f"{domain}/{name}/pic_{k}.jpg {c}\n" for c, name in ((1, "dog"), (2, "elephant")) for k in range(3)]
        tree |= {f"PACS/{inside}{line.split()[0]}": None for line in lines}
        train = [line for line in lines if "pic_2" not in line]
        tree[f"PACS/{lists}{domain}_train_kfold.txt"] = "".join(train)
        tree[f"PACS/{lists}{domain}_crossval_kfold.txt"] = "".join(line for line in lines if line not in train)
        tree[f"PACS/{lists}{domain}_test_kfold.txt"] = "".join(lines)
    return tree


def tiny() -> dict[str, str | None]:
    """Official: unlabelled test images, labels of val in a file."""
    tree = images(*(f"tiny-imagenet-200/train/{wnid}/images" for wnid in WNIDS))
    tree |= images("tiny-imagenet-200/test/images")
    tree |= images("tiny-imagenet-200/val/images", names=(f"val_{k}.JPEG" for k in range(6)))
    lines = "".join(f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t0\t9\t9\n" for k in range(6))
    return tree | {"tiny-imagenet-200/val/val_annotations.txt": lines}


RENDITIONS = ("art_0.jpg", "art_1.jpg", "sketch_0.jpg", "toy_0.jpg", "videogame_12.jpg")
OFFICE = ("amazon", "dslr", "webcam")
HOME = ("Art", "Clipart", "Product", "Real World")

# (data set, layout): the tree, and what must be found: class names, domains, numbers of train and test images
Case = tuple[dict[str, str | None], tuple[str, ...], tuple[str, ...], int, int]
FISH = ("goldfish", "great white shark", "flamingo")
BIRD_NAMES = ("Black footed Albatross", "Laysan Albatross")
KINDS = ("art", "sketch", "toy", "videogame")
TREES: dict[tuple[str, str], Case] = {
    ("imagenet-r", "official"): (
        images(*(f"imagenet-r/{w}" for w in WNIDS), names=RENDITIONS) | {"imagenet-r/README.txt": "text"},
        FISH, KINDS, 10, 5,
    ),
    ("imagenet-r", "CoOp tree"): (
        images(*(f"imagenet-rendition/imagenet-r/{w}" for w in WNIDS), names=RENDITIONS), FISH, KINDS, 10, 5,
    ),
    ("imagenet-r", "LAMDA zip"): (both("imagenet-r/{part}/{}", WNIDS, names=RENDITIONS), FISH, KINDS, 15, 15),
    ("imagenet-r", "MagMax's and CMM's conversion"): (  # in the order of the wnids, not of the folders
        both("imagenet-r/{part}/{}", ("flamingo", "goldfish", "great_white_shark"), names=RENDITIONS), FISH, KINDS, 15, 15,
    ),
    ("imagenet-a", "official"): (
        images("imagenet-a/n01531178", "imagenet-a/n01498041"), ("stingray", "goldfinch"), ("imagenet-a",), 4, 2,
    ),
    ("imagenet-a", "CoOp tree"): (images("imagenet-adversarial/imagenet-a/n01531178"), ("goldfinch",), ("imagenet-a",), 2, 1),
    ("imagenet-a", "LAMDA zip"): (both("imagenet-a/{part}/{}", ["n01531178"]), ("goldfinch",), ("imagenet-a",), 3, 3),
    ("cub200", "official"): (cub(), BIRD_NAMES, ("cub200",), 4, 2),
    ("cub200", "LAMDA zip"): (both("cub/{part}/{}", BIRDS), BIRD_NAMES, ("cub200",), 6, 6),
    ("cub200", "MagMax's and CMM's conversion"): (
        both("CUB_200_2011_splitted/images_train_test/{part}/{}", BIRDS, "val"), BIRD_NAMES, ("cub200",), 6, 6,
    ),
    ("cars", "copy by class"): (
        both("car_data/{part}/{}", (m.replace("/", "-") for m in MODELS)), MODELS, ("cars",), 9, 9,
    ),
    ("cars", "CoOp tree"): (
        images("stanford_cars/cars_train", "stanford_cars/cars_test")
        | {"stanford_cars/split_zhou_StanfordCars.json": """{"train": [["cars_train/0.jpg", 1, "2012 Acura RL Sedan"]],
            "val": [["cars_train/1.jpg", 0, "2000 AM General Hummer SUV"]],
            "test": [["cars_test/0.jpg", 0, "2000 AM General Hummer SUV"]]}"""},
        MODELS[:2], ("cars",), 2, 1,
    ),
    ("domainnet", "official"): (domainnet(), ("airplane", "The Eiffel Tower", "train"), DOMAINS, 34, 17),
    ("domainnet", "lists in a folder (Transfer-Learning-Library, Dassl)"): (
        domainnet("image_list/"), ("airplane", "The Eiffel Tower", "train"), DOMAINS, 34, 17,
    ),
    ("domainnet", "MagMax's and CMM's conversion"): (
        both("DomainNet/{part}/{}/airplane", ("clipart", "real")), ("airplane",), ("clipart", "real"), 6, 6,
    ),
    ("domainnet", "without lists (DomainBed)"): (
        images("domain_net/clip/zebra", "domain_net/quick/The_Eiffel_Tower"),
        ("The Eiffel Tower", "zebra"), ("clipart", "quickdraw"), 4, 2,
    ),
    ("office31", "official"): (images(*(f"office31/{d}/images/back_pack" for d in OFFICE)), ("back pack",), OFFICE, 6, 3),
    ("office31", "without images/"): (images(*(f"office31/{d}/back_pack" for d in OFFICE)), ("back pack",), OFFICE, 6, 3),
    ("office31", "CMM's conversion"): (both("Office31/{part}/{}/bike", OFFICE), ("bike",), OFFICE, 9, 9),
    ("office-home", "official"): (
        images(*(f"OfficeHomeDataset_10072016/{d}/Alarm_Clock" for d in HOME)), ("Alarm Clock",), HOME, 8, 4,
    ),
    ("office-home", "CMM's conversion"): (
        both("OfficeHome/{part}/{}/Mop", ("art", "clipart", "product", "real_world")), ("Mop",), HOME, 12, 12,
    ),
    ("pacs", "official"): (pacs(), ("dog", "elephant"), PAINTED, 16, 8),
    ("pacs", "with lists in splits/ (Dassl)"): (
        pacs("splits/", "images/"), ("dog", "elephant"), PAINTED, 16, 8,
    ),
    ("pacs", "with train and test folders"): (
        both("PACS/{part}/{}/dog", ("photo", "sketch")), ("dog",), ("photo", "sketch"), 6, 6,
    ),
    ("pacs", "without lists (DomainBed)"): (images("PACS/photo/dog", "PACS/sketch/dog"), ("dog",), ("photo", "sketch"), 4, 2),
    ("tiny-imagenet", "official"): (tiny(), FISH, ("tiny-imagenet",), 9, 6),
    ("tiny-imagenet", "val sorted by class"): (
        both("tiny-imagenet-200/{part}/{}/images", WNIDS, "val") | images("tiny-imagenet-200/test/images"),
        FISH, ("tiny-imagenet",), 9, 9,
    ),
}  # fmt: skip


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """Every path under `root` with its size and its time of change."""
    return {p: (os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in map(str, [root, *root.rglob("*")])}
