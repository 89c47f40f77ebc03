"""The embedded data set. Oracles: the recorded SHA-256 of the atlas, the distance of scripts/render_glyphs.py on a
sample, `read` of one image at a time, Unicode's names, SplitMix64 in plain Python."""

from __future__ import annotations

import hashlib
import time
import unicodedata

import numpy as np
import pytest
import torch

from fastmerge.data import glyphs, load_dataset
from fastmerge.errors import UserError

CPU = torch.device("cpu")
ATLAS_SHA256 = "95af90ecf410cd77e16dbed8eaa1a9d6366c3c0b89f73f6f71b31361c0b462cf"
NAMES_SHA256 = "63ce2b868cbf6e7bf250cd4d682f2cb176487a111abdff2c26070b4ef1c406ca"


def test_assets_are_the_recorded_ones():
    assert hashlib.sha256((glyphs.ASSETS / "glyphs.png").read_bytes()).hexdigest() == ATLAS_SHA256
    assert hashlib.sha256((glyphs.ASSETS / "glyphs.tsv").read_bytes()).hexdigest() == NAMES_SHA256
    assert glyphs.atlas().shape == (913, 12, 32, 32)
    assert not glyphs.atlas().flags.writeable


def test_names_are_unicodes_and_unique():
    names = [name for _, name in glyphs.characters()]
    assert len(set(names)) == len(names)
    codes = [int(code[2:], 16) for code, _ in glyphs.characters()]
    assert codes == sorted(set(codes))
    assert names == [unicodedata.name(chr(code)).lower() for code in codes]


def test_characters_differ_visibly_in_every_face():
    rows = np.random.RandomState(0).permutation(913)[:150]
    cells = glyphs.atlas()[rows].astype(np.float32) / 255
    for face in range(12):
        a = cells[:, face]
        energy = (a**2).sum((1, 2))
        closest = np.full((len(a), len(a)), np.inf)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                moved = np.roll(a, (dy, dx), (1, 2))  # ink keeps two pixels from the border, so nothing wraps
                squared = energy[:, None] + energy[None] - 2 * np.einsum("ipq,jpq->ij", a, moved, optimize=True)
                closest = np.minimum(closest, squared / (energy[:, None] + energy[None]))
        np.fill_diagonal(closest, np.inf)
        assert closest.min() > 0.099  # 0.1 before the atlas was rounded to 64 levels
    assert not glyphs.atlas()[:, :, [0, -1]].any() and not glyphs.atlas()[:, :, :, [0, -1]].any()


def test_loads_fast():
    for cached in (glyphs.characters, glyphs.atlas, glyphs._on):
        cached.cache_clear()
    start = time.process_time()
    glyphs.load().train.read(np.arange(1), 32, CPU)
    assert time.process_time() - start < 2  # about 0.3 s of one core


@pytest.mark.parametrize("size", [32, 48])
def test_an_image_does_not_depend_on_its_batch(size):
    split = glyphs.load().train
    index = np.random.RandomState(0).permutation(len(split))[:1100]  # more than two chunks
    whole, good = split.read(index, size, CPU)
    assert whole.shape == (1100, 3, size, size) and whole.dtype == torch.uint8 and good.all() and len(good) == 1100
    again = torch.cat([split.read(part, size, CPU)[0] for part in np.split(index, [1, 8, 700])])
    assert torch.equal(whole, again)
    for position in (0, 5, 1099):
        assert torch.equal(whole[position], split.read(index[position : position + 1], size, CPU)[0][0])
    assert split.read(index[:0], size, CPU)[0].shape == (0, 3, size, size)


def test_number_of_classes_and_copies_does_not_change_an_image():
    small, large = glyphs.load(classes=20, train_per_face=1), glyphs.load(classes=60, train_per_face=3)
    where = {name: i for i, name in enumerate(large.train.ids)}
    index = np.arange(0, len(small.train), 7)
    ours, _ = small.train.read(index, 32, CPU)
    theirs, _ = large.train.read(np.array([where[small.train.ids[i]] for i in index]), 32, CPU)
    assert torch.equal(ours, theirs)


def test_train_and_test_are_different_images():
    data = glyphs.load(train_per_face=2, test_per_face=2)
    train, _ = data.train.read(np.arange(len(data.train)), 32, CPU)
    test, _ = data.test.read(np.arange(len(data.test)), 32, CPU)
    both = {image.numpy().tobytes() for image in torch.cat([train, test])}
    assert len(both) == len(train) + len(test)  # and no image occurs twice


def test_split_sizes_labels_and_domains():
    data = load_dataset("glyphs", None)
    assert len(data.class_names) == len(set(data.class_names)) == 50
    assert data.domain_names == ("sans", "mono", "serif") and not data.flip and data.train.on_device
    for split, per_face in ((data.train, 6), (data.test, 3)):
        assert len(set(split.ids)) == len(split) == 50 * 12 * per_face
        assert (np.bincount(split.labels, minlength=50) == 12 * per_face).all()
        assert (np.bincount(split.domains) == len(split) // 3).all()
        for i in range(0, len(split), 97):
            _, face, code, copy = split.ids[i].split("/")
            assert unicodedata.name(chr(int(code[2:], 16))).lower() == data.class_names[split.labels[i]]
            assert face.startswith(data.domain_names[split.domains[i]]) and int(copy) < per_face


def test_ink_is_dark_and_where_the_glyph_is():
    """Without jitter the image is the atlas cell with dark ink on white."""
    still = glyphs.Jitter(rotation=0, scale=0, shear=0, shift=0, blur=0, contrast=1, tint=0, noise=0)
    cells = np.arange(0, 913 * 12, 101)
    images = glyphs.render(cells, glyphs.uniforms(0, cells), CPU, still)
    expected = 255 - glyphs.atlas().reshape(-1, 32, 32)[cells].astype(int)
    assert np.abs(images[:, 0].numpy() - expected).max() <= 1
    assert torch.equal(images[:, 0], images[:, 2])


def test_blur_is_binomial_and_keeps_the_ink():
    dot = torch.zeros(1, 32, 32)
    dot[0, 9, 20] = 1
    binomial = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    assert torch.allclose(glyphs._blur(dot)[0, 7:12, 18:23], binomial[:, None] * binomial)
    sharp = torch.tensor(glyphs.atlas()[:50, 0]).float()
    assert torch.allclose(glyphs._blur(sharp).sum((1, 2)), sharp.sum((1, 2)))


def test_uniforms_are_splitmix64():
    mask = 2**64 - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    got = glyphs.uniforms(7, np.array([0, 3, 10**6]))
    start = mix(7 + 0x632BE59BD9B4E019)
    for row, index in zip(got, (0, 3, 10**6), strict=True):
        step = 0x9E3779B97F4A7C15
        want = [(mix((start + (index * 16 + j) * step) & mask) >> 11) / 2**53 for j in range(1, 17)]
        assert row.tolist() == want
    many = glyphs.uniforms(1, np.arange(20000))
    assert np.abs(many.mean(0) - 0.5).max() < 0.01 and np.abs(np.corrcoef(many.T) - np.eye(16)).max() < 0.04


def test_run_and_pretraining_classes_are_disjoint():
    run = glyphs.load(classes=100).class_names
    before = {glyphs.characters()[row][1] for row in glyphs.pretraining_rows()}
    assert not set(run) & before and len(set(run) | before) == 913
    assert glyphs.load(classes=100).notes == () and "20 of the classes" in glyphs.load(classes=120).notes[0]
    default = glyphs.load().class_names
    assert set(glyphs.load(classes=30).class_names) < set(default) < set(run)
    words = [word for name in before for word in name.split()]
    known = {name for name in run if all(words.count(word) >= 3 for word in name.split())}
    assert known == set(default)
    assert {"latin", "greek", "armenian", "box", "modifier", "square"} <= {name.split()[0] for name in default}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 914}, "2 to 913"),
        ({"classes": 1}, "2 to 913"),
        ({"train_per_face": 0}, "train_per_face"),
        ({"test_per_face": -1}, "test_per_face"),
        ({"root": "somewhere"}, "reads no files"),
    ],
)
def test_bad_options_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        glyphs.load(**options)
