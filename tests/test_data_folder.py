"""Folder layouts. Oracle: the tree that the test writes; every error must name the path and say what to do.

pytest tests/test_data_folder.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from image_trees import truncate, write_image, write_tree

from fastmerge.data import load_dataset
from fastmerge.data.files import decode
from fastmerge.errors import UserError

CPU = torch.device("cpu")


def error_of(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("train, test", [("train", "test"), ("train", "val"), ("Train", "VAL")])
def test_class_folders(tmp_path, train, test):
    write_tree(tmp_path, f"{train}/sea_lion", f"{train}/Bee", f"{test}/Bee", f"{test}/sea_lion", images=3)
    data = load_dataset("folder", tmp_path)
    assert data.class_names == ("Bee", "sea lion")  # code-point order; `_` becomes a space
    assert data.domain_names == (tmp_path.name,) and data.name == tmp_path.name
    assert list(data.train.labels) == [0, 0, 0, 1, 1, 1] and not data.train.domains.any()
    assert data.train.ids[0] == f"{train}/Bee/0.png" and data.test.ids[-1] == f"{test}/sea_lion/2.png"
    assert data.notes == ()


@pytest.mark.parametrize("layout", ["{domain}/{part}/{name}", "{part}/{domain}/{name}"])
def test_domains_share_one_label_space_when_one_lacks_a_class(tmp_path, layout):
    classes = {"photo": ["ant", "cat", "dog"], "sketch": ["cat", "dog"]}  # no ant in sketch, but cat keeps label 1
    for part in ("train", "test"):
        for domain, names in classes.items():
            write_tree(tmp_path, *(layout.format(domain=domain, part=part, name=name) for name in names))
    data = load_dataset("folder", tmp_path)
    assert data.class_names == ("ant", "cat", "dog") and data.domain_names == ("photo", "sketch")
    for split in (data.train, data.test):
        assert list(split.labels) == [0, 0, 1, 1, 2, 2, 1, 1, 2, 2]
        assert list(split.domains) == [0] * 6 + [1] * 4


def test_hidden_and_other_files_are_ignored_and_any_image_suffix_is_read(tmp_path):
    write_tree(tmp_path, "train/a", "test/a")
    write_image(tmp_path / "train/a/x.JPG")
    write_image(tmp_path / "train/a/y.webp")
    write_image(tmp_path / "train/a/.hidden.png")
    (tmp_path / "train/a/Thumbs.db").write_bytes(b"no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/readme.txt").write_text("no class")
    data = load_dataset("folder", tmp_path)
    assert [i.split("/")[-1] for i in data.train.ids] == ["0.png", "1.png", "x.JPG", "y.webp"]
    assert data.train.read(np.arange(4), 8, CPU)[0].shape == (4, 3, 8, 8)


def test_test_wins_over_val_and_differences_are_noted(tmp_path):
    write_tree(tmp_path, "train/a", "train/b", "test/a", "val/a")
    data = load_dataset("folder", tmp_path)
    assert any("val" in note and "left out" in note for note in data.notes)
    assert any("only in train: b" in note for note in data.notes)
    assert data.test.ids[0].startswith("test/")


def test_wordnet_ids_get_their_names(tmp_path):
    write_tree(tmp_path, *(f"{part}/{wnid}" for part in ("train", "test") for wnid in ("n02007558", "n01440764")))
    data = load_dataset("folder", tmp_path)
    assert data.class_names == ("tench", "flamingo") and "ImageNet-1K" in data.notes[0]
    write_tree(tmp_path, "train/n00000001", "test/n00000001")
    data = load_dataset("folder", tmp_path)
    assert data.class_names == ("n00000001", "tench", "flamingo") and "1 not in ImageNet-1K" in data.notes[0]


def test_user_files_are_not_touched(tmp_path):
    write_tree(tmp_path, "train/a", "test/a")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(tmp_path.rglob("*"))}
    data = load_dataset("folder", tmp_path)
    data.train.read(np.arange(2), 8, CPU)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(tmp_path.rglob("*"))} == before


def split_files(tmp_path, train, test):
    as_json, as_lines = tmp_path / "split.json", tmp_path / "split.txt"
    as_json.write_text(json.dumps({"train": train, "test": test}))
    as_lines.write_text("".join(f"train {p}\n" for p in train) + "\n" + "".join(f"test\t{p}\n" for p in test))
    return as_json, as_lines


@pytest.mark.parametrize("which", [0, 1])
def test_split_file(tmp_path, which):
    tree = write_tree(tmp_path / "tree", "my cat", "dog", images=3)
    files = split_files(tmp_path, ["my cat/1.png", "my cat/0.png", "dog/2.png"], ["./my cat/2.png", "dog/0.png"])
    data = load_dataset("folder", tree, split_file=str(files[which]))
    assert data.class_names == ("dog", "my cat")
    assert list(data.train.ids) == ["dog/2.png", "my cat/0.png", "my cat/1.png"]  # sorted; dog/1.png is left out
    assert list(data.test.ids) == ["dog/0.png", "my cat/2.png"] and list(data.test.labels) == [0, 1]


def test_split_file_with_domains(tmp_path):
    tree = write_tree(tmp_path / "tree", "photo/cat", "sketch/cat")
    file = split_files(tmp_path, ["photo/cat/0.png", "sketch/cat/0.png"], ["photo/cat/1.png", "sketch/cat/1.png"])[1]
    data = load_dataset("folder", tree, split_file=str(file))
    assert data.class_names == ("cat",) and data.domain_names == ("photo", "sketch")
    assert list(data.test.domains) == [0, 1]


@pytest.mark.parametrize(
    "text, says",
    [
        ("train a/0.png\ntest a/9.png", ["line 2", "a/9.png", "relative to"]),
        ("train a/0.png\ntest a/0.png", ["line 2", "a/0.png", "twice"]),
        ("train a/0.png\ntest x/a/1.png", ["line 2", "a/1.png, d/a/1.png"]),
        ("train a/0.png\nteh a/1.png", ["line 2", "'teh'", "train path"]),
        ("train\n", ["no image for train and test"]),
        ("train a/0.png\ntest ", ["line 2", "with a path"]),
        ("train 0.png\ntest a/0.png", ["line 1", "<class>/<image>"]),
        ("train a/0.png\ntest d/a/0.png", ["line 2", "every entry"]),
        ("train a/0.png", ["no image for test"]),
        ('{"train": ["a/0.png"]', ["not JSON"]),
        ('{"train": ["a/0.png"], "val": []}', ["no image for test"]),
        ('{"train": ["a/0.png"], "text": []}', ["'text'", '"test"']),
        ('{"train": [["a/0.png", "1", "ant"]], "test": []}', ["train[0]", "[path, label, class name]"]),
    ],
)
def test_split_file_errors(tmp_path, text, says):
    tree = write_tree(tmp_path / "tree", "a", "d/a")
    file = tmp_path / "split"
    file.write_text(text)
    message = error_of("folder", tree, split_file=str(file))
    assert all(part in message for part in [str(file), *says]), message


def test_missing_split_file(tmp_path):
    message = error_of("folder", write_tree(tmp_path, "a"), split_file=str(tmp_path / "none.json"))
    assert str(tmp_path / "none.json") in message and "Expected JSON" in message


def test_the_nearest_layout_is_named_with_what_it_lacks(tmp_path):
    message = error_of("folder", write_tree(tmp_path / "a", "cat", "dog"))
    assert "Nearest: <class>/<image>, with 2 class folders such as cat" in message and "give --split-file" in message
    message = error_of("folder", write_tree(tmp_path / "b", "photo/cat", "sketch/cat"))
    assert "Nearest: <domain>/<class>/<image>, with 2 domains such as photo" in message
    assert "Nearest: 2 images in no class folder" in error_of("folder", write_tree(tmp_path / "c", "."))
    (tmp_path / "d").mkdir()
    assert "Nearest" not in error_of("folder", tmp_path / "d")


def test_no_layout_found_lists_every_path_and_the_layouts(tmp_path):
    write_tree(tmp_path, "cat", "dog")
    message = error_of("folder", tmp_path)
    for folder in (tmp_path, tmp_path / "cat", tmp_path / "dog"):
        assert f"{folder}/{{train,test,val}}" in message
    assert "<domain>/{train,test|val}/<class>/<image>" in message and "--split-file" in message


@pytest.mark.parametrize("have, lack", [("train", "test or val"), ("val", "train")])
def test_one_part_only(tmp_path, have, lack):
    message = error_of("folder", write_tree(tmp_path, f"{have}/a"))
    assert str(tmp_path) in message and f"no folder {lack}" in message
    message = error_of("folder", write_tree(tmp_path / "more", "ok/train/a", "ok/test/a", f"bad/{have}/a"))
    assert str(tmp_path / "more/bad") in message and f"no folder {lack}" in message


@pytest.mark.parametrize("part", ["train", "test"])
def test_empty_class_folder(tmp_path, part):
    write_tree(tmp_path, "train/a", "test/a", "train/b", "test/b")
    for file in (tmp_path / part / "b").iterdir():
        file.unlink()
    message = error_of("folder", tmp_path)
    assert "empty class folder" in message and str(tmp_path / part / "b") in message and "remove the folder" in message


def test_flat_and_empty_parts(tmp_path):
    write_tree(tmp_path, "train", "test")
    message = error_of("folder", tmp_path)
    assert str(tmp_path / "train") in message and "in no class folder" in message
    (tmp_path / "e/train").mkdir(parents=True)
    (tmp_path / "e/test").mkdir()
    message = error_of("folder", tmp_path / "e")
    assert str(tmp_path / "e/train") in message and "is empty" in message


def test_bad_roots_names_and_options(tmp_path):
    assert "--data-root" in error_of("folder")
    assert f"{tmp_path}/nowhere does not exist" in error_of("folder", tmp_path / "nowhere")
    message = error_of("cifar101")
    assert "Did you mean: cifar10, cifar100" in message and "imagenet1k" in message
    message = error_of("imagenet1k", tmp_path, split_file="x")
    assert "no option split_file (--split-file)" in message and "Leave it out" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_unreadable_image_is_named_and_can_be_skipped(tmp_path, suffix):
    write_tree(tmp_path, "train/a", "test/a", images=4, suffix=suffix)
    bad = [truncate(tmp_path / f"train/a/1{suffix}"), tmp_path / f"train/a/3{suffix}"]
    bad[1].write_bytes(b"")
    data = load_dataset("folder", tmp_path)
    with pytest.raises(UserError) as caught:
        data.train.read(np.array([0, 3, 1, 2]), 8, CPU)
    message = str(caught.value)
    assert str(bad[1]) in message and "--skip-bad-images" in message  # the first bad image in the requested order
    data = load_dataset("folder", tmp_path, skip_bad_images=True)
    images, good = data.train.read(np.arange(4), 8, CPU)
    assert good.tolist() == [True, False, True, False]
    assert not images[1].any() and not images[3].any() and images[0].any() and images[2].any()


def test_same_pixels_whatever_the_company(tmp_path):
    data = load_dataset("folder", write_tree(tmp_path, "train/a", "test/a", images=5))
    together = data.train.read(np.arange(5), 16, CPU)[0]
    assert torch.equal(data.train.read(np.array([3, 1]), 16, CPU)[0], together[[3, 1]])
    assert np.array_equal(together[2].permute(1, 2, 0).numpy(), decode(str(tmp_path / data.train.ids[2]), 16))


@pytest.mark.parametrize("domain", ["", "photo/"])
def test_images_below_a_class_folder_with_images_are_told(tmp_path, domain):
    write_tree(tmp_path, f"train/{domain}cat", f"test/{domain}cat", f"train/{domain}cat/kittens/small")
    data = load_dataset("folder", tmp_path)
    assert len(data.train) == len(data.test) == 2
    assert data.notes == (
        f"2 images are in folders inside class folders, such as train/{domain}cat/kittens, and left out",
    )
