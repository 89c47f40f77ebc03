"""Data sets of the user: loaders, Hugging Face `datasets` on disk, WebDataset shards. Oracle: the images put in."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from image_trees import write_image
from PIL import Image

import fastmerge
from fastmerge.__main__ import main
from fastmerge.data import DATASETS, load_dataset, make_dataset, register_dataset
from fastmerge.errors import UserError

CPU = torch.device("cpu")
PIXELS = np.random.RandomState(0).randint(0, 256, (10, 16, 16, 3)).astype(np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def png(array):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "png")
    return data.getvalue()


def has(split, numbers, labels):
    """Whether a split has these images of PIXELS with these labels."""
    images, good = split.read(np.arange(len(split)), 16, CPU)
    assert good.all() and split.labels.tolist() == labels
    return np.array_equal(images.permute(0, 2, 3, 1).numpy(), PIXELS[numbers])


@pytest.mark.parametrize("kind", ["array", "list", "pil", "path"])
def test_make_dataset_takes_paths_images_and_arrays(kind, tmp_path):
    images = PIXELS.copy() if kind == "array" else list(PIXELS)
    if kind == "pil":
        images = [Image.fromarray(array) for array in PIXELS]
    if kind == "path":
        images = [tmp_path / f"{i}.png" for i in range(10)]
        for path, array in zip(images, PIXELS, strict=True):
            path.write_bytes(png(array))
    data = make_dataset("mine", ("a", "b", "c"), (images[:6], LABELS), (images[6:9], [0, 1, 2]))
    assert has(data.train, range(6), LABELS) and has(data.test, [6, 7, 8], [0, 1, 2])
    assert data.templates == ("a photo of a {}.",)
    if kind in ("list", "pil"):
        assert data.train.contents is None
        return
    before = data.train.contents()
    assert before != data.test.contents()
    if kind == "array":
        images[0] += 1
    else:
        images[0].write_bytes(png(PIXELS[9]))
    assert data.train.contents() != before


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (4, [0, 1], "4 images and labels of shape .2."),
        (2, [0, 3], "expected labels 0..2, got 0..3"),
        (2, [0.0, 1.0], "expected labels 0..2, got 0.0..1.0 .float64"),
    ],
)
def test_make_dataset_refuses_what_does_not_fit(images, labels, says):
    with pytest.raises(UserError, match=f"mine train: {says}"):
        make_dataset("mine", ("a", "b", "c"), (PIXELS[:images], labels), (PIXELS[:3], [0, 1, 2]))


def test_an_image_of_another_kind_is_named():
    data = make_dataset("mine", ("a", "b", "c"), (PIXELS[:3].astype(float), [0, 1, 2]), (PIXELS[:3], [0, 1, 2]))
    with pytest.raises(UserError, match="cannot read image train/0000000: expected a path.*got float64"):
        data.train.read(np.array([0]), 16, CPU)


def mine(root, *, skip_bad_images=False):
    assert root == "here" and skip_bad_images
    return make_dataset("mine", ("a", "b", "c"), (PIXELS[:6], LABELS), (PIXELS[6:9], [0, 1, 2]))


def test_a_registered_loader_has_a_name(monkeypatch):
    monkeypatch.setattr("fastmerge.data.DATASETS", registered := dict(DATASETS))
    fastmerge.register_dataset("mine", mine)
    data = load_dataset("mine", "here", skip_bad_images=True, download=True, template="an {}")
    assert has(data.train, range(6), LABELS) and data.templates == ("an {}",)
    with pytest.raises(UserError, match="has no option split_file .--split-file.; it takes: skip_bad_images"):
        load_dataset("mine", "here", split_file="x")
    register_dataset("mine", lambda root: [1])
    with pytest.raises(UserError, match="returned list; expected fastmerge.data.Dataset"):
        load_dataset("mine")
    register_dataset("mine", lambda root: 1 / 0)
    with pytest.raises(
        UserError, match=r"its loader failed: ZeroDivisionError: .* \(in .*test_data_hub.py, line \d+\)"
    ):
        load_dataset("mine")
    for name, loader, says in (
        ("cifar10", mine, "'cifar10' is a data set of fastmerge"),
        ("my data", mine, "is no name"),
        ("a:b", mine, "is no name"),
        ("other", 3, "its loader is int"),
        ("other", lambda: 0, "takes no argument"),
    ):
        with pytest.raises(UserError, match=says):
            register_dataset(name, loader)
    assert "other" not in registered


MODULE = """
import numpy as np
from fastmerge.data import make_dataset

def load(root):
    pixels = np.random.RandomState(1).randint(0, 256, (24, 16, 16, 3)).astype(np.uint8)
    labels = [i % 4 for i in range(24)]
    return make_dataset("noise", "abcd", (pixels[:16], labels[:16]), (pixels[16:], labels[16:]))

NUMBER = 3
"""


def test_a_loader_in_a_module_trains(tmp_path, monkeypatch, capsys):
    (tmp_path / "noise_images.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    flags = "--dataset noise_images:load --model tiny --method finetune --epochs 1 --tasks 2 --no-nearest-mean --quiet"
    assert main([*flags.split(), "--run-dir", "run"]) == 0
    assert main(["evaluate", "run/finetune-seed0", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["images"] == 8
    for name, says in (
        ("noise_images:lod", "noise_images has no lod"),
        ("noise_images:NUMBER", "its loader is int"),
        ("no_such_module_here:load", "cannot import no_such_module_here: ModuleNotFoundError"),
        ("noise images:load", "expected package.module:loader"),
        (":load", "expected package.module:loader"),
    ):
        with pytest.raises(UserError, match=says):
            load_dataset(name)


def hub(tmp_path, form, features=None):
    datasets = pytest.importorskip("datasets")
    names = ["tabby_cat", "dog", "fish"]
    features = features or datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    def part(numbers, labels):
        rows = {"image": [{"bytes": png(PIXELS[i]), "path": None} for i in numbers], "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    both = datasets.DatasetDict(train=part(range(6), LABELS), validation=part([6, 7, 8], [2, 1, 0]))
    if form == "saved":
        both.save_to_disk(str(tmp_path / "pets"))
    else:
        (tmp_path / "pets" / "data").mkdir(parents=True)
        for name, split in both.items():
            split.to_parquet(str(tmp_path / "pets" / "data" / f"{name}-00000-of-00001.parquet"))
    return tmp_path / "pets"


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_hugging_face_datasets_on_disk(form, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # where parquet is converted to
    root = hub(tmp_path, form)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    data = load_dataset("huggingface", root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert data.name == "pets" and data.class_names == ("tabby cat", "dog", "fish")
    assert has(data.train, range(6), LABELS) and has(data.test, [6, 7, 8], [2, 1, 0])
    assert data.notes == ("validation is used for testing",) and data.train.contents() == data.test.contents()
    for part in ("extra", "train"):
        with pytest.raises(UserError, match=f"--test-part {part}: .* has no such part for testing. It has: validation"):
            load_dataset("huggingface", root, test_part=part)


def test_hugging_face_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "img": [{"bytes": png(PIXELS[i]), "path": None} for i in range(4)],
        "label": ["sketch b", "a", "a", "sketch b"],
        "domain": ["photo", "art", "photo", "art"],
        "text": ["x"] * 4,
    }
    part = datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image())
    datasets.DatasetDict(train=part, test=part.select([0, 1])).save_to_disk(str(tmp_path / "d"))
    data = load_dataset("huggingface", tmp_path / "d")
    assert data.class_names == ("a", "sketch b") and data.domain_names == ("art", "photo")
    assert data.train.domains.tolist() == [1, 0, 1, 0] and has(data.test, [0, 1], [1, 0])
    datasets.DatasetDict(train=part.remove_columns("label"), test=part).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(UserError, match="no column says the class"):
        load_dataset("huggingface", tmp_path / "e")
    part.save_to_disk(str(tmp_path / "f"))
    with pytest.raises(UserError, match="is a single split"):
        load_dataset("huggingface", tmp_path / "f")
    with pytest.raises(UserError, match="nothing found in .* .0 parquet files"):
        load_dataset("huggingface", tmp_path)


def shard(path, *samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for name, content in sample.items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))


def sample(number, label, ending="cls"):
    return {f"s/{number:04d}.png": png(PIXELS[number]), f"s/{number:04d}.{ending}": label.encode()}


def test_a_single_split_is_divided_within_every_class_and_domain(tmp_path):
    datasets = pytest.importorskip("datasets")
    n, image = 60, {"bytes": png(PIXELS[0]), "path": None}
    rows = {"image": [image] * n, "label": [i % 3 for i in range(n)], "domain": ["ab"[i // 30] for i in range(n)]}
    part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=part).save_to_disk(str(tmp_path / "d"))
    data, again = (load_dataset("huggingface", tmp_path / "d") for _ in range(2))
    assert data.test.ids == again.test.ids and {*data.train.ids} | {*data.test.ids} == {
        f"train/{i:07d}" for i in range(n)
    }
    assert len(data.train) == 48 and "20 % of every class by a hash of the row numbers" in data.notes[0]
    for split, each in ((data.train, 8), (data.test, 2)):
        numbers = [int(image[-7:]) for image in split.ids]
        assert split.labels.tolist() == [i % 3 for i in numbers] and split.domains.tolist() == [
            i // 30 for i in numbers
        ]
        assert np.bincount(split.labels * 2 + split.domains).tolist() == [each] * 6


def test_the_division_of_a_single_split_does_not_depend_on_the_name_of_the_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    n, image = 60, {"bytes": png(PIXELS[0]), "path": None}
    rows = {"image": [image] * n, "label": [i % 3 for i in range(n)]}
    part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    found = []
    for name in ("one", "two"):
        datasets.DatasetDict(train=part).save_to_disk(str(tmp_path / name))
        found.append(load_dataset("huggingface", tmp_path / name))
    assert found[0].test.ids == found[1].test.ids and found[0].notes == found[1].notes
    assert [data.domain_names for data in found] == [("one",), ("two",)]


@pytest.mark.parametrize("column", ["label", "domain"])
@pytest.mark.parametrize("named", [True, False])
def test_rows_without_a_label_are_told(column, named, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {name: [0, 1, 0] if named else ["a", "b", "a"] for name in ("label", "domain")}
    rows[column] = [*rows[column][:2], None]
    rows["image"] = [{"bytes": png(PIXELS[0]), "path": None}] * 3
    kind = datasets.ClassLabel(names=["a", "b"]) if named else datasets.Value("string")
    features = datasets.Features({"label": kind, "domain": kind, "image": datasets.Image()})
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=rf"1 image has no {column} \(None\)"):
        load_dataset("huggingface", tmp_path / "d")


@pytest.mark.parametrize("form", ["{}/{}-00000-of-00001.parquet", "data/{}/{}-0.parquet", "{}/{}/0000.parquet"])
def test_parquet_files_of_several_configurations_are_not_joined(form, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = hub(tmp_path, "parquet")
    for part in ("train", "validation"):
        content = (root / "data" / f"{part}-00000-of-00001.parquet").read_bytes()
        for name in ("large", "small"):
            path = root / form.format(name, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (root / "data" / f"{part}-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="2 configurations, which are different data sets: large, small") as caught:
        load_dataset("huggingface", root)
    one = str(caught.value).rpartition("--data-root ")[2]
    assert one.endswith("small") and len(load_dataset("huggingface", one).train) == 6


def test_web_dataset_shards(tmp_path):
    shard(tmp_path / "train" / "0.tar", *(sample(i, str(LABELS[i])) for i in range(4)))
    shard(tmp_path / "train" / "1.tar", *(sample(i, str(LABELS[i])) for i in (4, 5)))
    shard(tmp_path / "test" / "0.tar", *(sample(i, str(i - 6)) for i in (6, 7, 8)))
    data = load_dataset("webdataset", tmp_path)
    assert data.class_names == ("0", "1", "2") and data.test.ids[0] == "test/0.tar/s/0006"
    assert has(data.train, range(6), LABELS) and has(data.test, [6, 7, 8], [0, 1, 2])
    (tmp_path / "classnames.txt").write_text("tabby cat\ndog\nfish\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}\n")
    named = load_dataset("webdataset", tmp_path)
    assert named.class_names == ("tabby cat", "dog", "fish") and named.templates == ("a drawing of a {}",)
    assert named.train.labels.tolist() == LABELS
    (tmp_path / "classnames.txt").write_text("tabby cat\ndog\n")
    with pytest.raises(UserError, match="classnames.txt has 2 names; class '2' of the shards is none of them"):
        load_dataset("webdataset", tmp_path)


def test_web_dataset_names_and_json(tmp_path):
    about = [json.dumps({"label": name}) for name in ("sea_lion", "ant")]
    shard(tmp_path / "imgs-train-000000.tar", sample(9, "x"))  # not the name of a part
    shard(tmp_path / "train-000000.tar", sample(0, about[0], "json"), sample(1, about[1], "json"))
    shard(tmp_path / "val-000000.tar", sample(2, "ant", "txt"))
    data = load_dataset("webdataset", tmp_path)
    assert data.class_names == ("ant", "sea lion") and data.notes == ("val is used for testing",)
    assert has(data.train, [0, 1], [1, 0]) and has(data.test, [2], [0])


def test_web_dataset_that_webdataset_wrote(tmp_path):
    """Oracle: the library's own writer."""
    webdataset = pytest.importorskip("webdataset")
    for part, numbers in (("train", range(6)), ("test", range(6, 9))):
        with webdataset.ShardWriter(str(tmp_path / f"{part}-%06d.tar"), maxcount=4, verbose=0) as sink:
            for i in numbers:
                sink.write({"__key__": f"sample{i:03d}", "png": Image.fromarray(PIXELS[i]), "cls": i % 3})
    data = load_dataset("webdataset", tmp_path)
    assert has(data.train, range(6), [i % 3 for i in range(6)]) and has(data.test, [6, 7, 8], [0, 1, 2])


def test_web_dataset_faults(tmp_path):
    with pytest.raises(UserError, match="shards in .*: none. Expected"):
        load_dataset("webdataset", tmp_path)
    shard(tmp_path / "train-0.tar", sample(0, "0"))
    with pytest.raises(UserError, match="1 of train. Expected"):
        load_dataset("webdataset", tmp_path)
    shard(tmp_path / "test-0.tar", {"a.png": png(PIXELS[0])})
    with pytest.raises(UserError, match="test-0.tar: sample a has no class"):
        load_dataset("webdataset", tmp_path)
    (tmp_path / "test-0.tar").write_bytes(b"\x1f\x8b no tar")
    with pytest.raises(UserError, match="cannot read .*test-0.tar .*Expected an uncompressed tar file"):
        load_dataset("webdataset", tmp_path)


def test_a_bad_image_in_a_shard_is_named_or_skipped(tmp_path):
    write_image(tmp_path / "x.png")
    for part in ("train", "test"):
        shard(tmp_path / f"{part}-0.tar", sample(0, "0"), {"b.png": b"no image", "b.cls": b"0"})
    with pytest.raises(UserError, match="cannot read image train/train-0.tar/b"):
        load_dataset("webdataset", tmp_path).train.read(np.array([1]), 16, CPU)
    skipping = load_dataset("webdataset", tmp_path, skip_bad_images=True)
    assert skipping.train.read(np.array([0, 1]), 16, CPU)[1].tolist() == [True, False]


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_web_dataset_is_not_tested_on_its_training_images(part, tmp_path):
    shard(tmp_path / "train-0.tar", sample(0, "0"))
    shard(tmp_path / "test-0.tar", sample(1, "0"))
    with pytest.raises(UserError, match=f"--test-part {part}: .* has no such part for testing. It has: test"):
        load_dataset("webdataset", tmp_path, test_part=part)
