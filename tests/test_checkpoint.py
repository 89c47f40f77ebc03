"""Atomic files: after a write that really fails half-way, the disk still has the old content."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmerge.checkpoint import joined, load_tensors, replace, resident, save_json, save_tensors, select
from fastmerge.errors import UserError


def test_round_trip_of_every_kind_of_tensor(tmp_path):
    base = torch.randn(100)
    tensors = {
        "view": base[10:20],
        "transposed": torch.randn(3, 4).T,
        "zero-d": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "half": torch.randn(3).bfloat16(),
    }
    path = tmp_path / "c.safetensors"
    save_tensors(path, tensors, {"state": {"task": 3, "none": None}})
    loaded, about = load_tensors(path)
    assert about == {"state": {"task": 3, "none": None}} and set(loaded) == set(tensors)
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype and torch.equal(loaded[name], t)
    assert path.stat().st_size < 4096  # the view is saved without the rest of its storage
    assert resident(tensors) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    """While one writes, another one writes the same file and is done first: both succeed, and nothing is left."""
    path = tmp_path / "c.safetensors"

    def write(temporary):
        save_file({"x": torch.ones(1)}, temporary)
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", os.getppid)
            save_tensors(path, {"x": torch.zeros(1)}, {"n": 2})
        assert load_tensors(path)[1] == {"n": 2}

    assert replace(path, write) > 0
    assert load_file(path)["x"] == 1 and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_process_left_is_deleted(tmp_path, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number in (os.getppid(), gone.pid):

        def killed(temporary):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("os.getpid", lambda number=number: number)
            replace(tmp_path / f"{number}.json", killed)
    (tmp_path / "mine.part").write_text("a user's file")
    assert len(list(tmp_path.glob("*.part"))) == 3
    save_json(tmp_path / "other.json", [])
    left = {path.name.partition(".")[0] for path in tmp_path.glob("*.part")}
    assert left == {str(os.getppid()), "mine"}  # a living process still writes its own


def test_parts():
    parts = joined(a={"x": torch.ones(1)}, ab={"y": torch.zeros(2)})
    assert set(parts) == {"a.x", "ab.y"} and set(select(parts, "a")) == {"x"}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the file size simulates a full disk: the real writer fails in the middle."""
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"x": torch.ones(10)}, {"n": 1})
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from fastmerge.checkpoint import save_tensors, save_json
from fastmerge.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (lambda: save_tensors(Path({str(path)!r}), {{"x": torch.ones(1_000_000)}}, {{"n": 2}}),
              lambda: save_json(Path({str(tmp_path / "r.json")!r}), list(range(100_000)))):
    try:
        write()
    except UserError as error:
        print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "c.safetensors" in out and "unharmed" in out and "r.json" in out
    loaded, about = load_tensors(path)
    assert about == {"n": 1} and torch.equal(loaded["x"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]  # no partial file remains
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_unwritable_and_unreadable(tmp_path):
    with pytest.raises(UserError, match="there is no previous version"):
        save_json(tmp_path / "missing" / "r.json", {})
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"bad\.safetensors: not a fastmerge checkpoint"):
        load_tensors(bad)
    with pytest.raises(ValueError, match="JSON"):
        save_json(tmp_path / "nan.json", {"x": float("nan")})
    assert not (tmp_path / "nan.json").exists()


def test_json_is_readable_without_torch(tmp_path):
    save_json(tmp_path / "r.json", {"a": [1.5, None]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [1.5, None]}
