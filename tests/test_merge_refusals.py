"""`fastmerge merge` refuses what it cannot merge: one line, exit 2, nothing written, no input changed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.__main__ import main
from fastmerge.files.rules import FILE_RULES

SHAPES = {"head.weight": (3, 4), "norm.weight": (7,), "trunk.weight": (5, 6)}


def tensors(seed, **changes):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} | changes
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def raw(header, data=b"", length=None):
    """The bytes of a safetensors file with this header (an object, or its text)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def about(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class Pickled:
    def __reduce__(self):
        return Path.write_text, (Path("executed"), "code of a pickle ran")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with base, a and b, of the same names and shapes."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        save_file(tensors(seed), f"{name}.safetensors")
    return tmp_path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capfd, folder, *arguments, out="out"):
    """Run a merge that must be refused; returns its line."""
    before = contents(folder)
    assert main(["merge", *arguments, *(["--out", out] if out else [])]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert contents(folder) == before
    return error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [name for name, rule in FILE_RULES.items() if rule.statistics is None])
def test_a_value_that_is_not_finite(rule, value, place, capfd):
    """Named with the file that has it; with --allow-nonfinite the other tensors are what they are without it."""
    broken = tensors(1)
    broken["trunk.weight"][2, 3] = value
    save_file(broken, "a.safetensors")
    others = {name: load_file(f"{name}.safetensors") for name in ("a", "b", "base")}
    for one in others.values():
        del one["trunk.weight"]
    models = ["a", "b"] if FILE_RULES[rule].most is None else ["a"]
    words = [rule, "--models", *(f"{name}.safetensors" for name in models), "--base", "base.safetensors"]
    words += ["--set", "p=0"] if rule == "dare" else ["--set", "p=0", "density=1"] if rule == "dare-ties" else []
    words += ["--set", "density=1", "gamma=0"] if rule == "breadcrumbs" else []
    if rule != "randmix":  # draws the value, or not
        assert "trunk.weight: " in (said := refused(capfd, place, *words)) and "(they are in a.safetensors)" in said
    assert main(["merge", *words, "--out", "out.safetensors", "--allow-nonfinite"]) == 0
    found = load_file("out.safetensors")
    assert rule == "randmix" or not found.pop("trunk.weight").isfinite().all()
    if rule not in (
        "dare",
        "dare-ties",
        "della",
        "della-linear",
        "randmix",
        "ties",
        "knots",
    ):  # see more than one tensor
        alone = fastmerge.merge([others[name] for name in models], rule, base=others["base"], settings=settings(words))
        assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert all(x.isfinite().all() for x in found.values())


def settings(words):
    return dict(word.split("=") for word in words if "=" in word)


def test_statistics_that_cannot_be(place, capfd):
    words = ["fisher", "--models", "a.safetensors", "b.safetensors", "--statistics", "f.safetensors", "g.safetensors"]
    fishers = {name: x.abs() for name, x in tensors(1).items()}
    save_file(fishers, "f.safetensors")
    save_file(fishers | {"norm.weight": -fishers["norm.weight"]}, "g.safetensors")
    assert "--statistics: file 2 has negative entries" in refused(capfd, place, *words)
    save_file(fishers | {"norm.weight": fishers["norm.weight"] / 0}, "g.safetensors")
    assert "norm.weight: 7 values of the output are NaN or inf (they are in g.safetensors)" in refused(
        capfd, place, *words
    )


DAMAGED = {
    "empty": (b"", "bytes"),
    "a header of no bytes": (raw(b""), "JSON"),
    "too short": (b"\x01\x02\x03", "bytes"),
    "announces more than there is": (raw({}, length=1 << 40), "announces"),
    "header of 200 MB announced": (raw({}, length=200_000_000), "announces"),
    "not JSON": (raw(b"{ not json"), "JSON"),
    "nested without end": (raw(b"[" * 100_000), "JSON"),
    "not UTF-8": (raw(b'{"\xff\xfe": 1}'), "JSON"),
    "a list": (raw([1, 2]), "object"),
    "a name twice": (raw(b'{"x": {}, "x": {}}'), "twice"),
    "a tensor of no object": (raw({"x": 3}), "x"),
    "no offsets": (raw({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), "x"),
    "unknown dtype": (raw({"x": about("F4")}, bytes(8)), "F4"),
    "negative shape": (raw({"x": about(shape=(-2,))}, bytes(8)), "x"),
    "fractional shape": (raw({"x": about(shape=(2.0,))}, bytes(8)), "x"),
    "true as a shape": (raw({"x": about(shape=(True, 2))}, bytes(8)), "x"),
    "three offsets": (raw({"x": about(offsets=(0, 8, 9))}, bytes(8)), "x"),
    "reversed offsets": (raw({"x": about(offsets=(8, 0))}, bytes(8)), "x"),
    "size against shape": (raw({"x": about(shape=(3,))}, bytes(8)), "x"),
    "beyond the end": (raw({"x": about(offsets=(0, 8))}, bytes(4)), "x"),
    "overlap": (raw({"x": about(), "y": about(offsets=(4, 12))}, bytes(12)), "y"),
    "hole": (raw({"x": about(), "y": about(offsets=(12, 20))}, bytes(20)), "y"),
    "bytes after the end": (raw({"x": about()}, bytes(9)), "9"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}, "x": about()}, bytes(8)), "__metadata__"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file(place, capfd, case):
    content, word = DAMAGED[case]
    (place / "bad.safetensors").write_bytes(content)
    error = refused(capfd, place, "average", "--models", "a.safetensors", "bad.safetensors")
    assert "bad.safetensors" in error and word in error, error


def test_a_header_of_more_than_100_mb(place, capfd):
    with open("bad.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(8 + 100_000_001)  # sparse
    before = sorted(place.iterdir())
    assert main(["merge", "average", "--models", "a.safetensors", "bad.safetensors", "--out", "out"]) == 2
    assert "100000001" in capfd.readouterr().err
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_file_cut_short(place, capfd, cut):
    whole = (place / "b.safetensors").read_bytes()
    (place / "b.safetensors").write_bytes(whole[:-cut])
    assert "b.safetensors" in refused(capfd, place, "average", "--models", "a.safetensors", "b.safetensors")


BOTH = ["--models", "a.safetensors", "b.safetensors"]
BASED = [*BOTH, "--base", "base.safetensors"]
COMMANDS = {  # arguments, words of the message
    "unknown rule": (["tyes", *BASED], ["tyes", "ties"]),
    "no models": (["average"], ["--models"]),
    "no base": (["ties", *BOTH], ["--base"]),
    "too few models": (["slerp", "--models", "a.safetensors"], ["slerp", "2"]),
    "no such file": (["average", "--models", "a.safetensors", "c.safetensors"], ["c.safetensors"]),
    "twice the same": (["average", "--models", "a.safetensors", "./a.safetensors"], ["a.safetensors"]),
    "weights of wrong length": (["average", *BOTH, "--weights", "1", "2", "3"], ["3 weights", "2 models"]),
    "weights that are no numbers": (["average", *BOTH, "--weights", "1", "much"], ["much"]),
    "an infinite weight": (["average", *BOTH, "--weights", "1", "inf"], ["inf"]),
    "a negative weight": (["ties", *BASED, "--weights", "1", "-1"], ["ties", "at least 0"]),
    "a rule without weights": (["magmax", *BASED, "--weights", "1", "2"], ["magmax does not weigh"]),
    "too many models": (["wise-ft", *BASED], ["wise-ft merges"]),
    "a model that is not there": (["ties", *BASED, "--tensors", "head.weight:take=3"], ["take=3", "1 to 2"]),
    "settings that do not fit": (["della", *BASED, "--set", "p=0.1"], ["--set", "p=0.1 and epsilon=0.15"]),
    "settings of a tensor that do not fit": (
        ["della", *BASED, "--tensors", "head.weight:scope=global"],
        ["--tensors 'head.weight:scope=global'", "row or tensor"],
    ),
    "a seed below 0": (["average", *BOTH, "--seed", "-1"], ["--seed -1"]),
    "a recipe and a rule": (["average", "--recipe", "a.safetensors"], ["--recipe repeats"]),
    "an unknown flag": (["average", *BOTH, "--wieghts", "1"], ["--wieghts"]),
    "weights that cancel": (["average", *BOTH, "--weights", "1", "-1"], ["weights"]),
    "unknown setting": (["ties", *BASED, "--set", "densty=0.2"], ["densty", "density"]),
    "a value out of range": (["ties", *BASED, "--set", "density=1.5"], ["density", "1.5"]),
    "a value that is no number": (["ties", *BASED, "--set", "density=some"], ["density", "some"]),
    "a setting without value": (["ties", *BASED, "--set", "density"], ["density"]),
    "a pattern that matches nothing": (["ties", *BASED, "--tensors", "haed.*:density=1"], ["haed", "head"]),
    "a pattern that is none": (["ties", *BASED, "--tensors", "he[ad:density=1"], ["he[ad"]),
    "a pattern without values": (["ties", *BASED, "--tensors", "head.*"], ["head.*"]),
    "a setting of another rule": (["average", *BOTH, "--tensors", "head.*:density=1"], ["density"]),
    "unknown dtype": (["average", *BOTH, "--dtype", "fp12"], ["fp12"]),
    "unknown --missing": (["average", *BOTH, "--missing", "ignore"], ["ignore"]),
    "memory that is none": (["average", *BOTH, "--max-memory", "lots"], ["lots"]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command(place, capfd, case):
    arguments, words = COMMANDS[case]
    error = refused(capfd, place, *arguments)
    assert all(word in error for word in words), error


def test_tensors_that_differ(place, capfd):
    save_file(tensors(3, extra=torch.ones(2)), "more.safetensors")
    save_file(tensors(3, **{"norm.weight": None}), "less.safetensors")
    save_file(tensors(3, **{"norm.weight": torch.ones(9)}), "wide.safetensors")
    save_file({f"blocks.{k}.mlp": torch.ones(2) for k in range(9)}, "other.safetensors")
    for name, words in (
        ("more", ["extra"]),
        ("less", ["norm.weight"]),
        ("wide", ["norm.weight", "[9]", "[7]"]),
        ("other", ["other.safetensors"]),
    ):
        error = refused(capfd, place, "average", "--models", "a.safetensors", f"{name}.safetensors")
        assert all(word in error for word in words), error


def test_whole_numbers_that_differ(place, capfd):
    for k, name in enumerate("ab"):
        save_file(tensors(k, ids=torch.arange(4) + k), f"{name}.safetensors")
    assert "ids" in refused(capfd, place, "average", *BOTH)
    save_file(tensors(1, ids=torch.arange(4.0)), "b.safetensors")
    assert "ids" in refused(capfd, place, "average", *BOTH)


def test_bf16_that_overflows_in_fp16(place, capfd):
    for k, name in enumerate("ab"):
        save_file({"x": torch.full((4,), 1e5 + k)}, f"{name}.safetensors")
    assert "x" in refused(capfd, place, "average", *BOTH, "--dtype", "fp16")


@pytest.mark.filterwarnings("error")
def test_a_pickle_runs_no_code(place, capfd):
    torch.save({"x": torch.ones(2), "y": Pickled()}, "b.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Pickled()))
    for name in ("b.pt", "raw.pt"):
        assert name in refused(capfd, place, "average", "--models", "a.safetensors", name)
    assert not Path("executed").exists()


def test_what_is_no_model(place, capfd):
    torch.save([1, 2], "list.pt")
    torch.save(tensors(1, x=torch.ones(3, dtype=torch.complex64)), "complex.pt")
    Path("text.pt").write_text("hello")
    Path("none").mkdir()
    os.symlink("nowhere", "gone.safetensors")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "IA3"}')
    for name, words in {
        "list.pt": ["no tensors by name"],
        "complex.pt": ["tensor x is torch.complex64"],
        "text.pt": ["text.pt: "],
        "none": ["none: no model there"],
        "gone.safetensors": ["no such file or folder"],
        "adapter": ["a IA3 adapter"],
    }.items():
        error = refused(capfd, place, "average", "--models", name, "--base", "base.safetensors")
        assert all(word in error for word in words), error


def test_a_torch_file_cut_short(place, capfd):
    torch.save(tensors(1), "b.pt")
    whole = Path("b.pt").read_bytes()
    Path("b.pt").write_bytes(whole[: len(whole) // 2])
    assert "b.pt" in refused(capfd, place, "average", "--models", "a.safetensors", "b.pt")


@pytest.mark.parametrize("damage", ["index", "shard", "place", "outside", "empty folder"])
def test_a_folder_of_shards_that_is_damaged(place, capfd, damage):
    folder = place / "shards"
    folder.mkdir()
    whole, places = tensors(1), {}
    for k, name in enumerate(whole):
        save_file({name: whole[name]}, folder / f"part-{k}.safetensors")
        places[name] = f"part-{k}.safetensors"
    index = folder / "model.safetensors.index.json"
    if damage == "place":
        places["norm.weight"], places["head.weight"] = places["head.weight"], places["norm.weight"]
    if damage == "outside":
        save_file({"norm.weight": whole["norm.weight"]}, place / "norm.safetensors")
        places["norm.weight"] = "../norm.safetensors"
    index.write_text("{" if damage == "index" else json.dumps({"weight_map": places}))
    if damage == "shard":
        (folder / "part-1.safetensors").unlink()
    if damage == "empty folder":
        for path in folder.iterdir():
            path.unlink()
    assert "shards" in refused(capfd, place, "average", "--models", "a.safetensors", "shards")


def test_the_output_is_an_input_or_there(place, capfd):
    assert "a.safetensors" in refused(capfd, place, "average", *BOTH, out="a.safetensors")
    os.symlink("a.safetensors", "link.safetensors")
    refused(capfd, place, "average", *BOTH, out="link.safetensors")
    assert "base.safetensors: exists already" in refused(capfd, place, "average", *BOTH, out="base.safetensors")
    Path("out.part").mkdir()
    Path("out.part/mine").write_text("keep")
    assert "out.part is in the way and holds mine" in refused(capfd, place, "average", *BOTH)
    assert "--shard needs a folder" in refused(capfd, place, "average", *BOTH, "--shard", "1MB", out="o.safetensors")
    Path("there").mkdir()
    Path("there/notes.txt").write_text("mine")
    assert "there" in refused(capfd, place, "average", *BOTH, out="there")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission(place, capfd):
    Path("shut").mkdir(mode=0o500)
    assert "shut" in refused(capfd, place, "average", *BOTH, out="shut/out")


def test_an_output_under_a_file(place, capfd):
    assert "a.safetensors" in refused(capfd, place, "average", *BOTH, out="a.safetensors/out")


def test_a_full_disk(place, capfd, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "No space left on device); nothing was written" in refused(capfd, place, "average", *BOTH)


def test_a_file_that_may_not_grow(place, capfd):
    """A real limit of the system, of the size of a file: as a full disk, or a quota."""
    for name in "ab":
        save_file({"x": torch.ones(1 << 16)}, f"{name}.safetensors")
    before, limits = contents(place), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        code = [main(["merge", "average", *BOTH, "--out", out]) for out in ("out", "out.safetensors")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capfd.readouterr().err
    assert code == [2, 2] and error.count("File too large") == error.count("nothing was written") == 2, error
    assert contents(place) == before and not list(place.glob("out*"))


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "long name", "NUL", "no name", "folder called file"])
def test_an_input_that_is_no_file(place, capfd, kind):
    name, word = {
        "pipe": ("pipe.safetensors", "neither a file nor a folder"),
        "device": (os.devnull, "neither a file nor a folder"),
        "loop": ("loop.safetensors", "loop.safetensors"),
        "long name": ("x" * 300, "too long"),
        "NUL": ("a\0.safetensors", "null byte"),
        "no name": ("", "an empty name"),
        "folder called file": ("folder.safetensors", "no model there"),
    }[kind]
    if kind == "pipe":
        os.mkfifo(name)
    if kind == "loop":
        os.symlink("loop.safetensors", "other.safetensors")
        os.symlink("other.safetensors", "loop.safetensors")
    if kind == "folder called file":
        Path(name).mkdir()
    for words in (["--models", "a.safetensors", name], [*BOTH, "--base", name]):
        assert word in refused(capfd, place, "average", *words), kind


@pytest.mark.parametrize(
    "kind", ["pipe", "loop", "dangling", "here", "root", "long name", "NUL", "no name", "link to a"]
)
def test_an_output_that_cannot_be(place, capfd, kind):
    name, word = {
        "pipe": ("pipe", "exists already"),
        "loop": ("loop", "exists already"),
        "dangling": ("dangling", "exists already"),
        "here": (".", "is there; choose another name"),
        "root": ("/", "is there; choose another name"),
        "long name": ("x" * 300, "too long"),
        "NUL": ("a\0b", "null byte"),
        "no name": ("", "is there; choose another name"),
        "link to a": ("link", "is there; choose another name"),
    }[kind]
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "link to a":
        os.symlink("a.safetensors", name)
    elif kind == "loop":
        os.symlink("loop", "other")
        os.symlink("other", "loop")
    elif kind == "dangling":
        os.symlink("nowhere", name)
    error = refused(capfd, place, "average", *BOTH, f"--out={name}", out=None)
    assert word in error, error


def test_an_output_inside_an_input(place, capfd):
    """A second model in a folder would make the folder ambiguous."""
    for name in "ab":
        Path(f"run-{name}").mkdir()
        (place / f"{name}.safetensors").rename(f"run-{name}/model.safetensors")
    for out in ("run-a/merged", "run-b/x/merged.safetensors"):
        error = refused(capfd, place, "average", "--models", "run-a", "run-b", out=out)
        assert "is inside the input folder run-" in error, error


def test_shards_that_are_no_files(place, capfd):
    folder = place / "shards"
    folder.mkdir()
    places = dict.fromkeys(SHAPES, "s.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shard = folder / "s.safetensors"
    for make in (lambda: os.mkfifo(shard), lambda: os.symlink(shard, shard), shard.mkdir):
        make()
        assert "s.safetensors" in refused(capfd, place, "average", "--models", "a.safetensors", "shards")
        shard.rmdir() if shard.is_dir() else shard.unlink()
    (folder / "model.safetensors.index.json").write_bytes(b"\xff\xfe{}")
    assert "not an index of shards" in refused(capfd, place, "average", "--models", "a.safetensors", "shards")


HUGE = 1 << 62


@pytest.mark.parametrize("shape", [[HUGE, HUGE], [0, HUGE], [10**400]])
def test_numbers_beyond_any_file(place, capfd, shape):
    """Products beyond 64 bits; a tensor without entries may have any of the other sizes that torch takes."""
    (place / "bad.safetensors").write_bytes(raw({"x": about(shape=shape)}, bytes(8)))
    assert "tensor x" in refused(capfd, place, "average", "--models", "a.safetensors", "bad.safetensors")


def test_a_symlink_as_an_input_is_its_file(place, capfd):
    os.symlink("b.safetensors", "link.safetensors")
    assert main(["merge", "average", "--models", "a.safetensors", "link.safetensors", "--out", "out.safetensors"]) == 0
    merged = load_file("out.safetensors")
    for name, tensor in merged.items():
        expected = (tensors(1)[name].double() + tensors(2)[name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    os.symlink("a.safetensors", "again.safetensors")
    assert "again" in refused(capfd, place, "average", "--models", "a.safetensors", "again.safetensors", out="o")
