"""ImageNet-1K layouts. Oracle: trees that the test writes, with well-known wnids and names.

pytest tests/test_data_imagenet.py
"""

from __future__ import annotations

import os
import time

import pytest
from image_trees import write_image, write_tree

from fastmerge.data import load_dataset
from fastmerge.data.imagenet import class_names
from fastmerge.data.scenario import build_scenario
from fastmerge.errors import UserError

SOME = ("n01440764", "n02165456", "n04355933")  # tench, ladybug, sunglass


def tree(root, *wnids, images=1):
    return write_tree(root, *(f"{part}/{w}" for part in ("train", "val") for w in wnids), images=images, suffix=".JPEG")


def error_of(root) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset("imagenet1k", root)
    return str(caught.value)


@pytest.mark.parametrize("base", ["", "imagenet/images", "imagenet", "ILSVRC/Data/CLS-LOC"])
def test_layouts(tmp_path, base):
    tree(tmp_path / base, *SOME, images=2)
    data = load_dataset("imagenet1k", tmp_path)
    assert data.origin.layout.startswith("{train,val}/<wnid>/, in ") and data.origin.comparable.startswith("none")
    assert data.class_names == ("tench", "ladybug", "sunglasses") and data.name == "imagenet1k"
    assert data.train.ids[0] == "train/n01440764/0.JPEG"  # does not depend on where the copy is
    assert len(data.templates) == 80 and "a bad photo of a {}." in data.templates
    assert "3 of the 1000 classes" in data.notes[0]


def test_names_follow_the_wnids():
    names = class_names()
    assert list(names) == sorted(names) and len(names) == 1000
    assert names["n02007558"] == "flamingo" and names["n15075141"] == "toilet paper"


def test_thousand_classes_list_quickly_and_duplicate_names_are_reported(tmp_path):
    names = list(class_names())
    source = write_image(tmp_path / "one.JPEG")
    for part in ("train", "val"):
        for wnid in names:
            (tmp_path / part / wnid).mkdir(parents=True)
            os.link(source, tmp_path / part / wnid / "0.JPEG")
    start = time.perf_counter()
    data = load_dataset("imagenet1k", tmp_path)
    assert data.origin.comparable == "the usual results, on val"
    assert time.perf_counter() - start < 5
    assert len(data.class_names) == 1000 and data.notes == ()
    manifest = build_scenario(data, "cil", 100, "1993").manifest()
    assert manifest["order_sha256"] == "1184d882ffd7"
    assert all(len(task["classes"]) == 10 for task in manifest["tasks"]) and len(manifest["tasks"]) == 100
    assert any("missile" in w and "sunglasses" in w for w in manifest["warnings"])


def test_not_found_lists_every_path(tmp_path):
    message = error_of(tmp_path)
    for path in ("{train,val}", "imagenet/images", "imagenet", "ILSVRC/Data/CLS-LOC"):
        assert str(tmp_path / path) in message
    assert "{train,val}/<wnid>/<image>" in message


def test_flat_val(tmp_path):
    tree(tmp_path, *SOME)
    (tmp_path / "val").rename(tmp_path / "old")
    write_image(tmp_path / "val/ILSVRC2012_val_00000001.JPEG")
    message = error_of(tmp_path)
    assert f"{tmp_path}/val is flat" in message and "valprep.sh" in message


def test_unknown_wnid(tmp_path):
    message = error_of(tree(tmp_path, *SOME, "n99999999"))
    assert str(tmp_path / "train/n99999999") in message and "--dataset folder" in message


def test_missing_val(tmp_path):
    message = error_of(write_tree(tmp_path, "train/n01440764"))
    assert str(tmp_path) in message and "no folder val" in message


def test_val_of_all_classes_beside_a_train_subset(tmp_path):
    tree(tmp_path, *SOME)
    write_tree(tmp_path, "val/n02007558")
    data = load_dataset("imagenet1k", tmp_path)
    assert len(data.class_names) == 3 and "1 class of val is left out" in data.notes[1]


def test_empty_wnid_folder(tmp_path):
    tree(tmp_path, *SOME)
    (tmp_path / "train/n02007558").mkdir()
    assert str(tmp_path / "train/n02007558") in error_of(tmp_path)
