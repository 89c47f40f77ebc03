"""The data sets of the suite of eight in small trees of their published layouts. Oracle: the files and lists written here."""

import gzip
import struct

import numpy as np
import pytest
import torch
from image_trees import write_image, write_tree

from fastmerge.data import DATASETS, digits, load_dataset
from fastmerge.data.gtsrb import SIGNS
from fastmerge.errors import UserError

CPU = torch.device("cpu")


def lines(path, *text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in text))


def idx(path, array):
    """Write LeCun's IDX format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def mnist(root):
    pixels = np.random.RandomState(0).randint(0, 256, (12, 28, 28)).astype(np.uint8)
    labels = (np.arange(12) % 10).astype(np.uint8)
    for part, n in (("train", 12), ("t10k", 10)):
        idx(root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", pixels[:n])
        idx(root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels[:n])
    return pixels


def svhn(root, monkeypatch):
    from scipy.io import savemat

    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3, 11)).astype(np.uint8)
    labels = np.arange(1, 12)
    labels[10] = 10  # the published label of the digit 0
    for part in ("train", "test"):
        savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": np.minimum(labels, 10)[:, None]})
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    return pixels


def eurosat(root):
    write_tree(root / "eurosat" / "2750", "AnnualCrop", "SeaLake", "River", images=5, suffix=".jpg")


def resisc45(root):
    base = root / "resisc45"
    for name in ("airplane", "sea_ice", "wetland"):
        for k in range(1, 5):
            write_image(base / "NWPU-RESISC45" / name / f"{name}_{k:03d}.jpg", k)
    every = ("airplane", "sea_ice", "wetland")
    lines(base / "resisc45-train.txt", *(f"{name}_{k:03d}.jpg" for name in every for k in (1, 4)))
    lines(base / "resisc45-val.txt", *(f"{name}_003.jpg" for name in every))
    lines(base / "resisc45-test.txt", *(f"{name}_002.jpg" for name in every))


def sun397(root):
    base = root / "SUN397"
    for name in ("a/abbey", "c/church/indoor", "c/church/outdoor", "z/zen_garden"):
        write_tree(base, name, images=3, suffix=".jpg")
    every = ("/a/abbey", "/c/church/indoor", "/c/church/outdoor", "/z/zen_garden")
    lines(base / "Training_01.txt", *(f"{name}/{k}.jpg" for name in every for k in (0, 2)))
    lines(base / "Testing_01.txt", *(f"{name}/1.jpg" for name in every))
    lines(base / "ClassName.txt", *every)


def dtd(root):
    base = root / "dtd" / "dtd"
    write_tree(base / "images", "banded", "cobwebbed", images=3, suffix=".jpg")
    for part, k in (("train", 0), ("val", 1), ("test", 2)):
        lines(base / "labels" / f"{part}1.txt", *(f"{name}/{k}.jpg" for name in ("banded", "cobwebbed")))


def gtsrb(root):
    base = root / "gtsrb"
    write_tree(base / "GTSRB" / "Training", "00000", "00014", images=2, suffix=".ppm")
    for k in range(3):
        write_image(base / "GTSRB" / "Final_Test" / "Images" / f"{k:05d}.ppm", k)
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    lines(base / "GT-final_test.csv", header, *(f"{k:05d}.ppm;9;9;0;0;9;9;{c}" for k, c in enumerate((14, 0, 14))))


TREES = {"eurosat": eurosat, "resisc45": resisc45, "sun397": sun397, "dtd": dtd, "gtsrb": gtsrb}


def names(data, part):
    split = getattr(data, part)
    return [(image, data.class_names[c]) for image, c in zip(split.ids, split.labels, strict=True)]


def test_mnist(tmp_path):
    pixels = mnist(tmp_path)
    data = load_dataset("mnist", tmp_path)
    assert data.class_names == tuple("0123456789") and not data.flip
    assert (len(data.train), len(data.test)) == (12, 10) and data.train.labels.tolist() == [*range(10), 0, 1]
    images, good = data.train.read(np.array([11, 0]), 28, CPU)
    assert good.all() and np.array_equal(images[0].numpy(), np.stack([pixels[11]] * 3))
    assert len(load_dataset("mnist", tmp_path / "MNIST" / "raw").test) == 10
    before = data.train.contents()
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_dataset("mnist", tmp_path)
    assert before != data.test.contents()


def test_svhn(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    pixels = svhn(tmp_path, monkeypatch)
    data = load_dataset("svhn", tmp_path)
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]
    images, _ = data.test.read(np.array([3]), 32, CPU)
    assert np.array_equal(images[0].numpy(), pixels[..., 3].transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_missing_digits_are_named_and_nothing_is_written(name, tmp_path):
    with pytest.raises(UserError, match=f"data set '{name}' not found: looked for the files .*--download"):
        load_dataset(name, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="does not exist"):
        load_dataset(name, tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TREES)
def test_official_trees(name, tmp_path):
    TREES[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    data = load_dataset(name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    for split in (data.train, data.test):
        assert split.read(np.arange(len(split)), 8, CPU)[1].all()
    assert not set(data.train.ids) & set(data.test.ids)
    assert set(data.train.labels) == set(data.test.labels) == set(range(len(data.class_names)))
    assert data.flip == (name != "gtsrb") and "classes" in data.origin.comparable


@pytest.mark.parametrize("name", [name for name in TREES if name != "eurosat"])
def test_trees_with_train_and_test_folders(name, tmp_path):
    folders = ("00007", "00038") if name == "gtsrb" else ("sea_ice", "zen_garden")
    for part, images in (("train", 3), ("test", 2)):
        write_tree(tmp_path / name / part, *folders, images=images)
    data = load_dataset(name, tmp_path)
    assert data.class_names == (("speed limit 100", "keep right") if name == "gtsrb" else ("sea ice", "zen garden"))
    assert (len(data.train), len(data.test)) == (6, 4) and data.origin.split == "the train and test folders"


def test_eurosat_is_divided_by_our_own_rule(tmp_path):
    eurosat(tmp_path)
    data = load_dataset("eurosat", tmp_path)
    assert data.class_names == ("annual crop", "river", "sea lake")
    assert (len(data.train), len(data.test)) == (12, 3) and "our own" in data.origin.split
    write_tree(tmp_path / "EuroSAT_splits" / "train", "AnnualCrop", "SeaLake", images=3)
    for part in ("val", "test"):
        write_tree(tmp_path / "EuroSAT_splits" / part, "AnnualCrop", "SeaLake", images=2)
    data = load_dataset("eurosat", tmp_path)
    assert (len(data.train), len(data.test)) == (6, 4) and all("/test/" in f"/{i}" for i in data.test.ids)


def test_resisc45_has_the_images_of_the_lists(tmp_path):
    resisc45(tmp_path)
    data = load_dataset("resisc45", tmp_path)
    assert data.class_names == ("airplane", "sea ice", "wetland")
    assert names(data, "test")[1] == ("NWPU-RESISC45/sea_ice/sea_ice_002.jpg", "sea ice")
    assert len(data.train) == 6 and not any("_003" in image for image in (*data.train.ids, *data.test.ids))
    (tmp_path / "resisc45" / "NWPU-RESISC45" / "wetland" / "wetland_002.jpg").unlink()
    with pytest.raises(UserError, match="resisc45-test.txt lists wetland_002.jpg, but .* does not exist"):
        load_dataset("resisc45", tmp_path)
    (tmp_path / "resisc45" / "resisc45-train.txt").unlink()
    assert "our own" in load_dataset("resisc45", tmp_path).origin.split


def test_sun397_names_have_their_kind(tmp_path):
    sun397(tmp_path)
    data = load_dataset("sun397", tmp_path / "SUN397")
    assert data.class_names == ("abbey", "church indoor", "church outdoor", "zen garden")
    assert ("c/church/indoor/1.jpg", "church indoor") in names(data, "test") and len(data.train) == 8
    for part in ("Training", "Testing"):
        (tmp_path / "SUN397" / f"{part}_01.txt").unlink()
    without = load_dataset("sun397", tmp_path)
    assert without.class_names == data.class_names and "our own" in without.origin.split


def test_dtd_trains_on_train_and_val(tmp_path):
    dtd(tmp_path)
    data = load_dataset("dtd", tmp_path)
    assert [image for image, _ in names(data, "train")] == [
        f"images/{name}/{k}.jpg" for name in ("banded", "cobwebbed") for k in (0, 1)
    ]
    assert names(data, "test") == [(f"images/{name}/2.jpg", name) for name in ("banded", "cobwebbed")]
    assert len(data.templates) == 8 and "a photo of the {} thing." in data.templates


def test_gtsrb_takes_the_test_labels_from_its_table(tmp_path):
    gtsrb(tmp_path)
    data = load_dataset("gtsrb", tmp_path)
    assert data.class_names == ("speed limit 20", "stop") and len(SIGNS) == 43 and SIGNS[40] == "roundabout"
    found = dict(names(data, "test"))
    assert (
        found["GTSRB/Final_Test/Images/00000.ppm"] == "stop" and found["GTSRB/Final_Test/Images/00001.ppm"] == SIGNS[0]
    )


def test_nothing_is_downloaded_without_the_flag(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a download")

    for source in ("EuroSAT", "DTD", "GTSRB", "SUN397"):
        monkeypatch.setattr(f"torchvision.datasets.{source}.__init__", forbidden)
    for name in ("eurosat", "dtd", "gtsrb", "sun397", "resisc45"):
        with pytest.raises(UserError, match=f"data set '{name}' .* not found"):
            load_dataset(name, tmp_path)
        if name != "resisc45":
            with pytest.raises(AssertionError, match="a download"):
                load_dataset(name, tmp_path, download=True)
    assert set(TREES) < set(DATASETS)


def test_a_download_that_fails_is_told(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.DTD.__init__", offline)
    with pytest.raises(UserError, match="data set 'dtd': the download into .* failed: no route to host"):
        load_dataset("dtd", tmp_path, download=True)


def test_a_download_is_read(tmp_path, monkeypatch):
    def fetched(self, root, **options):
        assert options == {"download": True}
        eurosat(tmp_path)

    class Fetched:
        def __new__(cls, root, download):
            mnist(tmp_path)

    monkeypatch.setattr("torchvision.datasets.EuroSAT.__init__", fetched)
    assert len(load_dataset("eurosat", tmp_path, download=True).test) == 3
    monkeypatch.setattr("torchvision.datasets.EuroSAT.__init__", None)  # what is there is not fetched again
    assert len(load_dataset("eurosat", tmp_path, download=True).test) == 3
    real = digits.MNIST
    monkeypatch.setattr("fastmerge.data.digits.MNIST", Fetched)
    monkeypatch.setattr("fastmerge.data.digits._located", lambda folder: located(real, folder))
    assert len(load_dataset("mnist", tmp_path, download=True).test) == 10


def located(real, folder):
    return type("MNIST", (real,), {"raw_folder": property(lambda self: folder)})
