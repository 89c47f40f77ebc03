"""CIFAR through torchvision. Oracle: pickles that the test writes in the published format (without checksums).

pytest tests/test_data_cifar.py
"""

from __future__ import annotations

import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar as torchvision_cifar
from PIL import Image

from fastmerge.data import load_dataset
from fastmerge.data.cifar import TEMPLATES
from fastmerge.errors import UserError

CPU = torch.device("cpu")
NAMES = ["apple", "aquarium_fish", "baby"]


def write_cifar100(folder, n=6):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3072), np.uint8)
    for part in ("train", "test"):
        entry = {"data": pixels, "fine_labels": [i % 3 for i in range(n)], "coarse_labels": [0] * n}
        (folder / part).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}))
    return pixels.reshape(n, 3, 32, 32)


@pytest.fixture
def no_checksums(monkeypatch):
    monkeypatch.setattr(torchvision_cifar, "check_integrity", lambda path, md5=None: True)


@pytest.mark.parametrize("where", ["cifar-100-python", ".", "my-copy"])
def test_found_under_the_root_and_as_the_root(tmp_path, no_checksums, where):
    pixels = write_cifar100(tmp_path / where)
    data = load_dataset("cifar100", tmp_path / where if where == "my-copy" else tmp_path)
    assert data.origin.split == "official, 50,000 / 10,000" and str(tmp_path / where) in data.origin.layout
    assert data.class_names == ("apple", "aquarium fish", "baby") and data.flip
    assert list(data.train.labels) == [0, 1, 2, 0, 1, 2]
    images, good = data.test.read(np.array([4, 1]), 32, CPU)
    assert good.all() and np.array_equal(images.numpy(), pixels[[4, 1]])


def test_other_sizes_agree_with_pillow(tmp_path, no_checksums):
    pixels = write_cifar100(tmp_path)
    data = load_dataset("cifar100", tmp_path)
    for size in (16, 96):
        image = data.train.read(np.array([2]), size, CPU)[0][0].permute(1, 2, 0).numpy()
        expected = np.asarray(Image.fromarray(pixels[2].transpose(1, 2, 0)).resize((size, size), Image.BICUBIC))
        assert image.shape == expected.shape and np.abs(image.astype(int) - expected).max() <= 1


def test_cifar10(tmp_path, no_checksums):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))
    data = load_dataset("cifar10", tmp_path)
    assert len(data.train) == 10 and len(data.test) == 2 and data.name == "cifar10"


def error_of(root, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset("cifar100", root, **options)
    return str(caught.value)


def test_not_found_says_where_and_how(tmp_path):
    message = error_of(tmp_path)
    assert str(tmp_path / "cifar-100-python") in message and "--download" in message and "meta" in message


def test_damaged_files_are_noticed(tmp_path):
    write_cifar100(tmp_path / "cifar-100-python")  # its checksums differ from the published ones
    message = error_of(tmp_path)
    assert str(tmp_path / "cifar-100-python") in message and "damaged" in message and "--download" in message


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision_cifar, "download_and_extract_archive", refuse)
    message = error_of(tmp_path / "new", download=True)
    assert "no route to host" in message and "by hand" in message and str(tmp_path / "new") in message


def test_prompts():
    assert len(set(TEMPLATES)) == 18
    assert "a photo of a {}." in TEMPLATES and "a black and white photo of the {}." in TEMPLATES
