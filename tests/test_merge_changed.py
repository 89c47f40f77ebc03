"""Inputs that change while `fastmerge merge` reads them: one line that names the file, exit 2, nothing written, and the
command works when it is started again. Without the checks the process dies of SIGBUS or writes a mix of two models."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.files.hashes import Hashes
from fastmerge.files.inputs import open_input
from fastmerge.files.recipe import KEY
from fastmerge.files.stamp import stamp_of
from fastmerge.files.stream import Stream
from fastmerge.files.surveyed import Scratch
from fastmerge.files.write import Output


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"{k}.weight": torch.randn(64, 64, generator=generator) for k in range(4)}


CHANGES = {  # what happens to a file of this path, what the message says of it
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 4), "bytes, now it has"),
    "replaced": (lambda path: os.replace(path.with_name(f"c{path.suffix}"), path), "another file took its name"),
    "rewritten": (lambda path: path.write_bytes(path.read_bytes()[:-8] + bytes(8)), "it was written to"),
    "deleted": (lambda path: path.unlink(), "cannot be read any more (No such file or directory)"),
}
KINDS = {"safetensors": save_file, "pt": torch.save}


@pytest.fixture(params=KINDS)
def command(request, tmp_path, monkeypatch):
    """The words of a merge of a and b; c is another file of their size."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b", "c")):
        KINDS[request.param](tensors(seed), f"{name}.{request.param}")
    return ["--models", f"a.{request.param}", f"b.{request.param}", "--base", f"base.{request.param}", "--out", "out"]


def changed_after(monkeypatch, where, name, number, change):
    """Call `change` after that many calls of a method."""
    method, calls = getattr(where, name), []

    def counted(self, *arguments):
        found = method(self, *arguments)
        calls.append(name)
        if len(calls) == number:
            change()
        return found

    monkeypatch.setattr(where, name, counted)


BETWEEN = ("task-arithmetic", Output, "finished", 2)  # two tensors
PLACES = [
    ("task-arithmetic", Output, "finished", 4),  # after the last
    ("ties", Stream, "_thresholds", 1),  # between two passes
    ("opcm", Scratch, "keep", 2),  # in the first of two passes
]


@pytest.mark.parametrize(
    "change, rule, where, name, number",
    [*((change, *BETWEEN) for change in CHANGES), *(("cut", *place) for place in PLACES)],
)
def test_an_input_that_changes(change, rule, where, name, number, command, tmp_path, monkeypatch, capfd):
    path = tmp_path / command[2]
    whole, (act, said) = path.read_bytes(), CHANGES[change]
    with monkeypatch.context() as during:
        changed_after(during, where, name, number, lambda: act(path))
        assert main(["merge", rule, *command]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {path.name}: ") and said in error and error.count("\n") == 1, error
    assert not list(tmp_path.glob("out*"))
    path.write_bytes(whole)
    assert main(["merge", rule, *command]) == 0
    assert main(["merge", "--recipe", "out"]) == 0


def test_what_changes_between_two_entries_of_the_journal(command, tmp_path, monkeypatch):
    """A tensor of a changed input is not in the journal, so a killed merge does not go on behind it."""
    journal = []
    monkeypatch.setattr("fastmerge.files.write.FLUSH", 1)
    monkeypatch.setattr(Output, "save", lambda self, entries: journal.extend(entry["name"] for entry in entries))
    path = tmp_path / command[1]
    change = CHANGES["rewritten"][0]
    changed_after(monkeypatch, Output, "written", 2, lambda: change(path))  # the second tensor is not yet finished
    assert main(["merge", "average", *command]) == 2
    assert journal == ["0.weight"]


@pytest.mark.parametrize("where", ["a", "base"])
def test_an_adapter_and_its_base(where, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a")):
        save_file(tensors(seed), f"{name}.safetensors")
    assert main("merge average --models a.safetensors --base base.safetensors --extract-lora 4 --out r4".split()) == 0
    path = tmp_path / {"a": "r4/adapter_config.json", "base": "base.safetensors"}[where]
    words = "merge average --models r4 --base base.safetensors --out out".split()
    with monkeypatch.context() as during:
        text = path.read_bytes()
        changed_after(during, Output, "finished", 2, lambda: path.write_bytes(text))
        assert main(words) == 2
    assert f"{path.name}: changed while it was merged" in capfd.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert main(words) == 0


def test_in_memory(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_file(tensors(seed), path)
    changed_after(monkeypatch, Stream, "_pass", 1, lambda: CHANGES["rewritten"][0](paths[1]))  # all is merged
    with pytest.raises(UserError, match=r"b.safetensors: changed while it was merged \(it was written to\)"):
        fastmerge.merge([str(path) for path in paths], "average")


def test_the_recipe_has_the_hashes_of_what_was_merged(command, tmp_path, monkeypatch):
    """The hash of the file as the command found it, where it changed before it was opened."""
    path, real = tmp_path / command[1], Hashes.__init__

    def hashed_then_changed(self, files=()):
        real(self, files)
        for future in self.futures.values():
            future.result()
        CHANGES["replaced"][0](path)

    monkeypatch.setattr(Hashes, "__init__", hashed_then_changed)
    assert main(["merge", "average", *command]) == 0
    about = json.loads(open_input(tmp_path / "out").metadata[KEY])
    assert about["inputs"][0]["files"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    expected = (tensors(3)["0.weight"] + tensors(2)["0.weight"]) / 2  # of c and b
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")["0.weight"], expected)


def test_a_hash_is_of_the_file_that_was_opened(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    opened = stamp_of(path)
    path.write_bytes(bytes(99))
    with pytest.raises(UserError, match="a: changed while it was merged .it had 100 bytes, now it has 99"):
        Hashes([path]).wait({path: opened})
