"""ImageCache. Oracle: `Split.read` of all images at once; the budget changes speed and memory, but no pixel.

pytest tests/test_data_cache.py
"""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from image_trees import truncate, write_tree

from fastmerge.data import load_dataset
from fastmerge.data.cache import CHUNK, ImageCache, StreamedImages, _free_bytes, _free_in_cgroups
from fastmerge.data.dataset import Split
from fastmerge.errors import UserError

CPU = torch.device("cpu")
SIZE = 4
BYTES = 3 * SIZE * SIZE  # per image


class Counting:
    """A `Split.read` that fills image i with i % 251 and records its calls; clearing `gate` blocks it."""

    def __init__(self, bad: int | None = None):
        self.reads, self.threads, self.bad, self.gate = [], set(), bad, threading.Event()
        self.gate.set()

    def __call__(self, indices, size, device):
        assert self.gate.wait(10)
        self.reads += indices.tolist()
        self.threads.add(threading.current_thread().name)
        if self.bad is not None and self.bad in indices:
            raise UserError(f"cannot read image {self.bad}")
        values = torch.from_numpy(indices % 251).byte()
        return values[:, None, None, None].expand(-1, 3, size, size).to(device), torch.ones(len(indices)).bool()


def counting(n: int = 1000, **options) -> Split:
    options = {"bad": None} | options
    reader = Counting(options.pop("bad"))
    return Split(np.arange(n) % 7, np.zeros(n, np.int64), [str(i) for i in range(n)], reader, **options)


def check(images, indices):
    """Compare every image and label of `images`, in two batches, with the values that `indices` imply."""
    assert len(images) == len(indices)
    for index in torch.randperm(len(indices)).split(max(1, len(indices) // 2)):
        pixels, labels = images.batch(index)
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(index), 3, SIZE, SIZE)
        assert np.array_equal(pixels[:, 1, 2, 3].numpy(), indices[index.numpy()] % 251)
        assert np.array_equal(labels.numpy(), indices[index.numpy()] % 7)


@pytest.mark.parametrize("budget, kind", [(10**9, "TaskImages"), (0, "StreamedImages")])
@pytest.mark.parametrize("keep", [True, False])
def test_pixels_and_labels(budget, kind, keep):
    split, indices = counting(), np.arange(990, 100, -3)  # more than one chunk
    assert len(indices) > CHUNK
    images = ImageCache(SIZE, "cpu", budget).get(split, indices, keep=keep)
    assert type(images).__name__ == kind and images.skipped == 0
    check(images, indices)


def test_decoded_once():
    split, indices = counting(), np.arange(50)
    images = ImageCache(SIZE, CPU).get(split, indices)
    for _ in range(3):
        check(images, indices)
    assert sorted(split.read.reads) == list(range(50))


def test_kept_sets_are_not_decoded_again_and_others_are_released():
    cache, split = ImageCache(SIZE, CPU), counting()
    kept = cache.get(split, np.arange(5), keep=True)
    assert cache.get(split, np.arange(5), keep=True) is kept
    images = cache.get(split, np.arange(5, 10))
    gone = weakref.ref(images.images)
    del images
    gc.collect()
    assert gone() is None  # only the caller held it


def test_memory_stays_within_the_budget_over_many_tasks():
    cache, split = ImageCache(SIZE, CPU, budget_bytes=35 * BYTES), counting()
    tests = [cache.get(split, np.arange(10 * t, 10 * t + 10), keep=True) for t in range(6)]
    assert [isinstance(t, StreamedImages) for t in tests] == [False] * 3 + [True] * 3
    for t in range(20):  # train sets have a second budget of the same size
        train = cache.get(split, np.arange(30 * t, 30 * t + 30))
        assert not isinstance(train, StreamedImages)
    assert isinstance(cache.get(split, np.arange(36)), StreamedImages)


def test_prefetch_runs_behind_and_get_takes_its_result():
    cache, split, indices = ImageCache(SIZE, CPU), counting(), np.arange(600)
    split.read.gate.clear()
    cache.prefetch(split, indices)  # returns although reading is blocked
    split.read.gate.set()
    check(cache.get(split, indices), indices)
    assert sorted(split.read.reads) == list(range(600))
    assert threading.current_thread().name not in split.read.threads


def test_prefetch_survives_gets_of_kept_sets():
    cache, split, indices = ImageCache(SIZE, CPU), counting(), np.arange(300)
    cache.prefetch(split, indices)
    check(cache.get(split, np.arange(400, 420), keep=True), np.arange(400, 420))
    check(cache.get(split, indices), indices)
    assert sorted(split.read.reads) == list(range(300)) + list(range(400, 420))


def test_prefetch_of_another_set_is_given_up():
    cache, split = ImageCache(SIZE, CPU), counting(n=100 * CHUNK)
    split.read.gate.clear()
    cache.prefetch(split, np.arange(100 * CHUNK))
    prefetch = cache._next
    threading.Timer(0.05, split.read.gate.set).start()
    check(cache.get(split, np.arange(10)), np.arange(10))
    prefetch.decoded.result(10)
    assert len(split.read.reads) <= 10 + 2 * CHUNK


def test_prefetch_that_does_not_fit_beside_the_current_set_does_nothing():
    cache, split = ImageCache(SIZE, CPU, budget_bytes=50 * BYTES), counting()
    cache.get(split, np.arange(30))
    cache.prefetch(split, np.arange(30, 60))
    assert cache._next is None
    check(cache.get(split, np.arange(30, 60)), np.arange(30, 60))


def test_error_of_the_background_surfaces_in_get():
    cache, split = ImageCache(SIZE, CPU), counting(bad=7)
    cache.prefetch(split, np.arange(20))
    with pytest.raises(UserError, match="cannot read image 7"):
        cache.get(split, np.arange(20))


def test_error_of_the_look_ahead_surfaces_in_its_batch():
    images = ImageCache(SIZE, CPU, 0).get(counting(bad=7), np.arange(20))
    order = list(torch.arange(20).split(5))
    images.plan(order)
    images.batch(order[0])
    with pytest.raises(UserError, match="cannot read image 7"):
        images.batch(order[1])
    assert len(images.batch(order[2])[1]) == 5


def test_streaming_decodes_what_is_planned_once_and_anything_else_when_asked():
    split, indices = counting(), np.arange(40)
    images = ImageCache(SIZE, CPU, 0).get(split, indices)
    order = list(torch.randperm(40).split(8))
    images.plan(order)
    for index in order:
        assert np.array_equal(images.batch(index)[0][:, 0, 0, 0].numpy(), index.numpy())
    assert sorted(split.read.reads) == list(range(40))
    images.plan(order)
    check(images, indices)  # not the planned order
    images.plan(order[3:])  # as after a resume
    assert torch.equal(images.batch(order[3])[0][:, 0, 0, 0], order[3].byte())


@pytest.mark.parametrize("budget", [10**9, 0])
@pytest.mark.parametrize("prefetch", [True, False])
def test_bad_images_are_left_out_alike_with_and_without_memory(tmp_path, budget, prefetch):
    write_tree(tmp_path, "train/a", "train/b", "test/a", "test/b", images=6, suffix=".jpg")
    for k in (1, 4):
        truncate(tmp_path / f"train/a/{k}.jpg")
    data = load_dataset("folder", tmp_path, skip_bad_images=True)
    indices = np.arange(11, -1, -1)
    cache = ImageCache(16, CPU, budget)
    if prefetch:
        cache.prefetch(data.train, indices)
    images = cache.get(data.train, indices)
    good = np.array([i for i in indices if i not in (1, 4)])
    assert images.skipped == 2 and len(images) == 10
    pixels, labels = images.batch(torch.arange(10))
    assert torch.equal(pixels, data.train.read(good, 16, CPU)[0])
    assert np.array_equal(labels.numpy(), data.train.labels[good])


@pytest.mark.parametrize("budget", [10**9, 0])
def test_no_readable_image_at_all(tmp_path, budget):
    write_tree(tmp_path, "train/a", "test/a", images=1)
    truncate(tmp_path / "train/a/0.png")
    data = load_dataset("folder", tmp_path, skip_bad_images=True)
    with pytest.raises(UserError, match="train/a/0.png"):
        ImageCache(8, CPU, budget).get(data.train, np.arange(1))


def test_image_that_breaks_during_a_streamed_run_is_named(tmp_path):
    write_tree(tmp_path, "train/a", "test/a", images=2)
    data = load_dataset("folder", tmp_path, skip_bad_images=True)
    images = ImageCache(8, CPU, 0).get(data.train, np.arange(2))
    truncate(tmp_path / "train/a/1.png")
    with pytest.raises(UserError, match="train/a/1.png could be read before"):
        images.batch(torch.arange(2))


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [10**9, 0])
@pytest.mark.parametrize("on_device", [True, False])
def test_on_the_gpu(budget, on_device):
    split, indices = counting(on_device=on_device), np.arange(600)
    cache = ImageCache(SIZE, "cuda", budget)
    cache.prefetch(split, indices)
    images = cache.get(split, indices)
    order = list(torch.randperm(600).split(100))
    images.plan(order)
    for index in order:
        pixels, labels = images.batch(index)
        assert pixels.is_cuda and labels.is_cuda
        assert np.array_equal(pixels[:, 0, 0, 0].cpu().numpy(), index.numpy() % 251)
        assert np.array_equal(labels.cpu().numpy(), index.numpy() % 7)


@pytest.mark.parametrize(
    ("device", "given", "budget"),
    [
        ("cpu", None, 8e9),
        ("cpu", 3e9, 3e9),
        ("cpu", 90e9, 20e9),
        ("cuda", None, 26e9),
        ("cuda", 3e9, 3e9),
        ("cuda", 90e9, 26e9),
    ],
)
def test_the_budget_follows_the_free_memory(monkeypatch, device, given, budget):
    free = {"cpu": 80 * 10**9, "cuda": 78 * 10**9}
    monkeypatch.setattr("fastmerge.data.cache._free_bytes", lambda where: free[where.type])
    assert ImageCache(SIZE, device, given).budget_bytes == budget


def group(folder, version, limit, used, cached):
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    folder.mkdir(parents=True, exist_ok=True)
    most, current, files = names[version]
    (folder / f"memory.{most}").write_text(f"{limit}\n")
    (folder / f"memory.{current}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{files} {cached}\n")


def test_limits_of_containers_and_jobs_count(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    group(tmp_path / "2", 2, 900, 500, 100)
    group(tmp_path / "2/job", 2, 700, 400, 0)
    group(tmp_path / "2/job/step", 2, "max", 400, 0)
    assert sorted(_free_in_cgroups(tmp_path / "2", own)) == [300, 500]
    own.write_text("9:cpu,cpuacct:/x\n4:memory:/host/path\n")  # in a container the path is the host's
    group(tmp_path / "1/memory", 1, 900, 950, 30)
    assert _free_in_cgroups(tmp_path / "1", own) == [0]
    assert _free_in_cgroups(tmp_path / "1", tmp_path / "none") == []
    monkeypatch.setattr("fastmerge.data.cache._free_in_cgroups", lambda: [12345])
    assert _free_bytes(torch.device("cpu")) == 12345


def test_beside_a_gpu_the_next_images_have_the_hosts_memory(monkeypatch):
    free = {"cpu": 400 * BYTES, "meta": 240 * BYTES}
    monkeypatch.setattr("fastmerge.data.cache._free_bytes", lambda where: free[where.type])
    cache, split = ImageCache(SIZE, "meta"), counting()
    cache._current_bytes = cache.budget_bytes  # a task that fills the device's share
    cache.prefetch(split, np.arange(60))
    assert cache._next is not None
    cache.prefetch(split, np.arange(61))  # it would not fit the device
    assert cache._next.key[1] == np.arange(60).tobytes()
    cache.close()
