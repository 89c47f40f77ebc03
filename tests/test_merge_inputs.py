"""What `fastmerge merge` reads: file kinds, names, adapters, settings of tensors, interrupted and repeated merges."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from test_merge_files import flat, model, run

import fastmerge
from fastmerge.__main__ import main
from fastmerge.errors import UserError
from fastmerge.files.hashes import Hashes, likely_files
from fastmerge.files.inputs import open_input
from fastmerge.files.recipe import KEY
from fastmerge.files.rules import FILE_RULES
from fastmerge.files.settings import places
from fastmerge.files.stamp import stamp_of
from fastmerge.files.write import Output

BASE = model(0)
A, B = model(1, like=BASE), model(2, like=BASE)
MEAN = {name: (A[name] + B[name]) / 2 for name in A}


def close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def merged(*paths, **options):
    return fastmerge.merge([str(path) for path in paths], "average", **options)


def shards(folder, tensors, kind):
    """A folder as transformers writes it: two shards and an index."""
    folder.mkdir()
    names, places = sorted(tensors), {}
    for k, part in enumerate((names[:2], names[2:])):
        file = f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{k + 1:05d}-of-00002.{kind}"
        content = {name: tensors[name] for name in part}
        save_file(content, folder / file) if kind == "safetensors" else torch.save(content, folder / file)
        places |= dict.fromkeys(part, file)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text('{"architectures": ["Toy"]}')
    return folder


def test_kinds_of_inputs(tmp_path):
    torch.save({"state_dict": A, "epoch": 3}, tmp_path / "a.pt")
    torch.save(B, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({f"module.{name}": x for name, x in B.items()}, tmp_path / "b.safetensors")
    hf, old = shards(tmp_path / "hf", A, "safetensors"), shards(tmp_path / "bin", B, "bin")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    save_file(B, tmp_path / "runs" / "x" / "model.safetensors")
    for pair in (("a.pt", "old.pth"), ("a.pt", "b.safetensors"), (hf, old), (hf, "runs/x"), ("a.pt", "runs")):
        close(merged(*(tmp_path / one for one in pair)), MEAN)
    fastmerge.merge([hf, tmp_path / "a.pt"], "average", out=tmp_path / "out", dtype="bf16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2  # like the first model
    assert index["metadata"]["total_size"] == 2 * flat(A).numel()
    assert (tmp_path / "out" / "config.json").is_file()
    found = merged(tmp_path / "out")
    assert all(torch.equal(found[name], A[name].bfloat16()) for name in A)


def test_half_precision_is_rounded_once(tmp_path):
    half = [{name: x.bfloat16() for name, x in one.items()} for one in (A, B)]
    found = fastmerge.merge(half, "average")
    for name, x in found.items():
        exact = (half[0][name].double() + half[1][name].double()) / 2
        assert x.dtype == torch.bfloat16 and torch.equal(x, exact.float().bfloat16())


def test_an_output_like_another_model(tmp_path, capsys):
    """Names, types, shards and small files of --like; no more and no less tensors."""
    other = {f"model.{name}": x.bfloat16() if name == "b.weight" else x for name, x in A.items() if name != "scale"}
    like = shards(tmp_path / "like", other, "safetensors")
    save_file(A, tmp_path / "a.safetensors")
    save_file({f"module.{name}": x for name, x in B.items()}, tmp_path / "b.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    words = ["merge", "average", "--models", *paths, "--like", str(like)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"names, types and files like {like}" in said and f"left out, as {like} has none: model.scale" in said
    index = [json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (like, tmp_path / "out")]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    assert (tmp_path / "out" / "config.json").read_text() == (like / "config.json").read_text()
    found = merged(tmp_path / "out")
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in other.items()}
    for name, x in found.items():
        torch.testing.assert_close(x, MEAN[name.removeprefix("model.")].to(x.dtype))
    assert main(["merge", "--recipe", str(tmp_path / "out")]) == 0
    based = merged(*paths, base=BASE | {"extra": torch.ones(2)}, missing="base", like="base")
    assert based.keys() == {*BASE, "extra"}
    for message, options in {
        "--like state dict has more, but the merge has not": {"like": A | {"more": torch.ones(2)}},
        r"scale: shape \[\], but \[2\] in --like": {"like": A | {"scale": torch.ones(2)}},
        "scale: torch.float32, but torch.int64 in --like": {"like": A | {"scale": torch.tensor(1)}},
        "--like base: --base is not given": {"like": "base"},
        "another architecture": {"like": {"x": torch.ones(2)}},
    }.items():
        with pytest.raises(UserError, match=message):
            merged(*paths, **options)


def test_an_adapter_is_the_product_on_the_base(tmp_path):
    peft = pytest.importorskip("peft")

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 2)
            self.linear = torch.nn.Linear(4, 5)
            self.head = torch.nn.Linear(5, 2)

    torch.manual_seed(0)
    base = Toy()
    start = {name: x.clone() for name, x in base.state_dict().items()}
    models = []
    for k in range(2):
        toy = Toy()
        toy.load_state_dict(start)
        config = peft.LoraConfig(
            r=2,
            lora_alpha=3 + k,
            target_modules=["conv", "linear"],
            modules_to_save=["head"],
            use_rslora=bool(k),
            alpha_pattern={"linear": 5},
        )
        tuned = peft.get_peft_model(toy, config)
        for name, x in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(x)
        tuned.save_pretrained(tmp_path / f"adapter{k}")
        models.append(tuned.merge_and_unload().state_dict())
    found = fastmerge.merge([tmp_path / "adapter0", tmp_path / "adapter1"], "average", base=start)
    close(found, {name: (models[0][name] + models[1][name]) / 2 for name in start})
    with pytest.raises(UserError, match="an adapter needs --base"):
        merged(tmp_path / "adapter0")
    with pytest.raises(UserError, match="it changes head.* but no tensor of the base"):
        fastmerge.merge([tmp_path / "adapter0"], "average", base=BASE)


def test_tied_tensors_are_written_once(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.a = torch.nn.Linear(3, 3, bias=False)
            self.b = torch.nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            torch.nn.init.constant_(self.a.weight, value)

    torch.save(Tied(1.0).state_dict(), tmp_path / "a.pt")
    save_model(Tied(2.0), str(tmp_path / "b.safetensors"))
    fastmerge.merge([tmp_path / "a.pt", tmp_path / "b.safetensors"], "average", out=tmp_path / "out.safetensors")
    loaded = Tied(0.0)
    from safetensors.torch import load_model

    load_model(loaded, tmp_path / "out.safetensors")
    assert torch.equal(loaded.b.weight, torch.full((3, 3), 1.5))
    assert list(load_file(tmp_path / "out.safetensors")) == ["a.weight"]


def test_missing_mismatched_and_whole_number_tensors():
    ids = torch.arange(4)
    base, a, b = ({**one, "ids": ids.clone()} for one in (BASE, A, B))
    del a["scale"]
    b["c.bias"] = torch.zeros(9)
    b["extra"] = torch.ones(2)
    for text, options in {
        "c.bias: shapes differ: .*--mismatch": {"missing": "base", "tensors": ["extra:take=2"]},
        "scale: not in model 1; choose --missing": {"mismatch": "base"},
    }.items():
        with pytest.raises(UserError, match=text):
            fastmerge.merge([a, b], "average", base=base, **options)
    found = fastmerge.merge([a, b], "average", base=base, missing="average", mismatch="base")
    assert torch.equal(found["scale"], b["scale"]) and torch.equal(found["c.bias"], base["c.bias"])
    assert torch.equal(found["extra"], b["extra"]) and torch.equal(found["ids"], ids)
    found = fastmerge.merge([a, b], "average", base=base, missing="skip", mismatch="base")
    assert not {"extra", "scale"} & found.keys()
    found = fastmerge.merge([a, b], "average", base=base, missing="base", mismatch="base", tensors=["extra:take=2"])
    torch.testing.assert_close(found["scale"], (base["scale"] + b["scale"]) / 2)
    b["ids"] = ids + 1
    with pytest.raises(UserError, match="ids: torch.int64 values differ.*take=base"):
        fastmerge.merge([a, b], "average", base=base, missing="skip", mismatch="base")


def test_settings_of_single_tensors():
    words = [r".*:density=0.5", r"a\..*:density=1,weights=1/3", r"scale:take=2", r"c\..*:take=base"]
    found = fastmerge.merge([A, B], "ties", base=BASE, settings={"scope": "tensor"}, tensors=words)
    assert torch.equal(found["scale"], B["scale"]) and torch.equal(found["c.bias"], BASE["c.bias"])
    da, db = A["a.weight"] - BASE["a.weight"], B["a.weight"] - BASE["a.weight"]
    mass = da + 3 * db
    parts = [(d * w, w * ((d > 0) == (mass > 0))) for d, w in ((da, 1), (db, 3))]
    expected = sum(x * (w > 0) for x, w in parts) / sum(w for _, w in parts)
    torch.testing.assert_close(found["a.weight"], BASE["a.weight"] + expected, rtol=1e-5, atol=1e-6)
    whole = fastmerge.merge([A, B], "ties", base=BASE, settings={"scope": "tensor", "density": 0.5})
    assert torch.equal(found["b.weight"], whole["b.weight"])


def test_values_along_the_layers():
    """Linear between equally distant values; names without a layer have the first; layers are counted by their beginning."""
    generator, names = torch.Generator().manual_seed(0), [f"blocks.{k}.w" for k in range(5)]
    names += ["embed", "text.layers.0.w", "text.layers.1.w", "single.0.w"]
    a, b = ({name: torch.randn(4, 3, generator=generator) for name in names} for _ in range(2))
    found = fastmerge.merge([a, b], "average", tensors=[r".*:weights=1..0..0/0..1..4", r"blocks\.3\..*:weights=1/3"])
    shares = dict(zip(names[:5], (0, 1 / 2, 1, 3 / 4, 1), strict=True)) | {"embed": 0, "text.layers.0.w": 0}
    shares |= {"text.layers.1.w": 1, "single.0.w": 1}
    for name, t in shares.items():
        torch.testing.assert_close(found[name], (1 - t) * a[name] + t * b[name], rtol=1e-5, atol=1e-6)
    base = {name: torch.zeros(4, 3) for name in names}
    found = fastmerge.merge([a], "task-arithmetic", base=base, settings={"scale": "1..3"})
    for name, scale in zip(names, (1, 1.5, 2, 2.5, 3, 1, 1, 3, 3), strict=True):
        torch.testing.assert_close(found[name], scale * a[name])
    # no share of one of two: the other alone
    for rule, extra in (
        ("slerp", {}),
        ("nuslerp", {"base": base}),
        ("ties", {"base": base, "settings": {"density": 1}}),
    ):
        found = fastmerge.merge([a, b], rule, tensors=[".*:weights=1..0/0..1"], **extra)
        torch.testing.assert_close(found["embed"], a["embed"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["single.0.w"], b["single.0.w"], rtol=1e-5, atol=1e-6)
    for message, words in {
        "scope is no number, so it cannot change": {"settings": {"scope": "tensor..global"}},
        "density 2.0: expected": {"settings": {"density": "0.1..2"}},
        "1 weight for 2 models": {"tensors": [".*:weights=1..0"]},
        "expected numbers from the first layer to the last": {"tensors": [".*:weights=1..x/1"]},
        "ties needs weights of at least 0": {"tensors": [".*:weights=1..-1/1"]},
    }.items():
        with pytest.raises(UserError, match=message):
            fastmerge.merge([a, b], "ties", base=base, **words)
    with pytest.raises(UserError, match="magmax does not weigh"):
        fastmerge.merge([a, b], "magmax", base=base, tensors=[".*:weights=1..0/0..1"])
    with pytest.raises(UserError, match="--set p=0.3..0.1..0.5: p=0.1 and epsilon=0.15"):
        fastmerge.merge([a, b], "della", base=base, settings={"p": "0.3..0.1..0.5"})


def test_a_recipe_repeats_and_verifies(tmp_path, capsys):
    save_file(A, tmp_path / "a.safetensors")
    shards(tmp_path / "b", B, "safetensors")
    save_file(BASE, tmp_path / "base.safetensors")
    files = [tmp_path / name for name in ("base.safetensors", "a.safetensors", "b")]
    flags = ("--set", "p=0.3", "--seed", "5", "--tensors", "scale:take=1", "--report", str(tmp_path / "report.csv"))
    assert run("dare", files, tmp_path / "out", *flags) == 0
    rows = (tmp_path / "report.csv").read_text().splitlines()
    assert len(rows) == 1 + len(A) and rows[0].startswith(
        "tensor,shape,action,nonfinite,norm,conflicts,changed,cosine_1"
    )
    d = [x["a.weight"].double() - BASE["a.weight"].double() for x in (A, B, merged(tmp_path / "out"))]
    row = next(row for row in rows if row.startswith("a.weight")).split(",")
    assert float(row[4]) == pytest.approx(float(d[2].norm()), rel=1e-4)
    assert float(row[5]) == pytest.approx(float((d[0] * d[1] < 0).double().mean()), abs=1e-5)
    assert float(row[8]) == pytest.approx(float((d[1] * d[2]).sum() / d[1].norm() / d[2].norm()), abs=1e-3)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert main(["merge", "--recipe", str(tmp_path / "out")]) == 0
    assert "5 tensors with the same bits" in capsys.readouterr().out
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert digest.encode() in data
    (tmp_path / "out" / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["merge", "--recipe", str(tmp_path / "out")]) == 2
    assert "1 of its tensors is not what the recipe gives" in capsys.readouterr().err
    save_file(B, tmp_path / "a.safetensors")
    assert main(["merge", "--recipe", str(tmp_path / "out")]) == 2
    assert "a.safetensors: changed since it was merged" in capsys.readouterr().err
    assert main(["merge", "--recipe", str(tmp_path / "a.safetensors")]) == 2
    assert "no recipe in its metadata" in capsys.readouterr().err


def test_hashes_begin_with_a_guess(tmp_path, monkeypatch):
    """What is guessed wrongly is not asked for; what was not guessed is hashed when it is asked for."""
    monkeypatch.setattr("fastmerge.files.hashes.BLOCK", 64)
    hf, old = shards(tmp_path / "hf", A, "safetensors"), shards(tmp_path / "bin", B, "bin")
    (tmp_path / "hf" / "pytorch_model.bin").write_text("the same model again")
    os.mkfifo(tmp_path / "pipe")
    guessed = likely_files([hf, old, hf / "config.json", tmp_path / "pipe", tmp_path / "none", "x" * 300])
    names = [file.name for file in guessed]
    assert names[:2] == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)] and names[-1] == "config.json"
    assert names[2:4] == [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)] and len(names) == 5
    index = hf / "model.safetensors.index.json"
    found = Hashes(guessed).wait({path: stamp_of(path) for path in (guessed[0], index)})
    assert found == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (guessed[0], index)}
    with pytest.raises(UserError, match="none: cannot be read any more"):
        Hashes(guessed).wait({tmp_path / "none": stamp_of(index)})


KILLED = """
import os, signal, sys
import fastmerge.files.write as write
write.FLUSH = 1
save, count = write.Output.save, 0
def counted(self, entries):
    global count
    save(self, entries)
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
write.Output.save = counted
from fastmerge.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_merge_goes_on(tmp_path, capsys):
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    save_file(A, paths[0])
    save_file(B, paths[1])
    words = ["merge", "average", "--models", *paths, "--shard", "6KB", "--out", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other.part"
    shutil.copytree(tmp_path / "out.part", other)
    assert main(words) == 0
    assert "going on after 3 of 5 tensors" in capsys.readouterr().out
    close(merged(tmp_path / "out"), MEAN)
    assert main(["merge", "--recipe", str(tmp_path / "out")]) == 0
    # with other settings it starts anew
    capsys.readouterr()
    assert main([*words[:-1], str(tmp_path / "other"), "--weights", "1", "3"]) == 0
    assert "going on" not in capsys.readouterr().out
    close(merged(tmp_path / "other"), {name: (A[name] + 3 * B[name]) / 4 for name in A})
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("rule", ["average", "task-arithmetic", "ties"])
def test_what_some_models_have_is_averaged_by_their_weights(rule):
    models = [{**A, "some": torch.full((3,), 1.0)}, dict(B), {**B, "some": torch.full((3,), 5.0)}]
    base = {} if rule == "average" else {"base": BASE}
    for weights, expected in (((3.0, 2.0, 1.0), 2.0), ((1.0, 2.0, 0.0), 1.0), (None, 3.0)):
        found = fastmerge.merge(models, rule, **base, weights=weights, missing="average")
        assert torch.equal(found["some"], torch.full((3,), expected))
    own = ["some:weights=1/7/3"]
    found = fastmerge.merge(models, rule, **base, weights=(3, 2, 1), missing="average", tensors=own)
    assert torch.equal(found["some"], torch.full((3,), 4.0))
    with pytest.raises(
        UserError, match="some: the weights of the models that have it add up to 0, so it has no average"
    ):
        fastmerge.merge(models, rule, **base, weights=(0, 2, 0), missing="average")


class Killed(BaseException):
    """Ends a merge as a signal does: nothing is cleaned up."""


@pytest.fixture
def killed(monkeypatch):
    """Run a merge that ends after its second tensor is on the disk."""

    def run(merge, *arguments, **more):
        finished, calls = Output.finished, []

        def counted(self, item, about):
            finished(self, item, about)
            calls.append(item.name)
            if len(calls) == 2:
                for saved in self.saves:
                    saved.result()
                self._close()
                raise Killed

        with monkeypatch.context() as during, pytest.raises(Killed):
            during.setattr("fastmerge.files.write.FLUSH", 1)
            during.setattr(Output, "finished", counted)
            merge(*arguments, **more)

    return run


@pytest.mark.parametrize("memory", ["models", "base", "statistics"])
def test_a_merge_of_tensors_in_memory_never_goes_on(memory, killed, tmp_path):
    """Others of the same names look the same: what the first merge wrote would be part of the second."""
    paths = [str(tmp_path / name) for name in ("a.safetensors", "base.safetensors")]
    save_file(A, paths[0])
    save_file({name: x.abs() for name, x in BASE.items()}, paths[1])  # may be a Fisher too
    rule = "fisher" if memory == "statistics" else "task-arithmetic"
    first, second = ({name: x.abs() for name, x in tensors.items()} for tensors in (A, B))
    given = [{"models": paths, "base": paths[1], "rule": rule, memory: x} for x in (first, second)]
    for one in given:
        one[memory] = one[memory] if memory == "base" else [one[memory], paths[1]]
        one["models"] = one["models"][:1] if memory == "base" else one["models"]
    killed(fastmerge.merge, **given[0], out=tmp_path / "out")
    fastmerge.merge(**given[1], out=tmp_path / "out")
    expected = fastmerge.merge(**given[1])
    found = merged(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_that_took_each_others_names_are_other_inputs(killed, tmp_path, capsys):
    """Of one size and time, as files of an archive may be."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, tensors in zip(paths, (A, B), strict=True):
        save_file(tensors, path)
        os.utime(path, (1e9, 1e9))
    words = ["merge", "average", "--models", *map(str, paths), "--weights", "1", "3", "--out", str(tmp_path / "out")]
    killed(main, words)
    os.rename(paths[0], tmp_path / "c")
    os.rename(paths[1], paths[0])
    os.rename(tmp_path / "c", paths[1])
    capsys.readouterr()
    assert main(words) == 0
    assert "going on" not in capsys.readouterr().out
    close(merged(tmp_path / "out"), {name: (B[name] + 3 * A[name]) / 4 for name in A})


def test_the_model_of_like_is_in_the_recipe(tmp_path, capfd):
    """It decides which tensors and types the output has."""
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "like")}
    for path, tensors in zip(paths.values(), (A, B, {name: x.half() for name, x in A.items()}), strict=True):
        save_file(tensors, path)
    words = ["merge", "average", "--models", paths["a"], paths["b"], "--like", paths["like"]]
    out = str(tmp_path / "out")
    assert main([*words, "--out", out]) == 0 and main(["merge", "--recipe", out]) == 0
    about = json.loads(open_input(out).metadata[KEY])
    hashes = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in paths.items()}
    assert [one["files"] for one in about["inputs"]] == [{paths[name]: hashes[name]} for name in paths]
    assert main([*words, "--out", paths["like"]]) == 2
    capfd.readouterr()
    save_file({name: x.bfloat16() for name, x in A.items()}, paths["like"])
    assert main(["merge", "--recipe", out]) == 2
    assert "like.safetensors: changed since it was merged: SHA-256 " in capfd.readouterr().err
    fastmerge.merge([paths["a"], paths["b"]], "average", like=A, out=tmp_path / "memory")
    assert main(["merge", "--recipe", str(tmp_path / "memory")]) == 2
    assert "merged from tensors in memory" in capfd.readouterr().err


def test_a_like_that_changes_during_the_merge(tmp_path, monkeypatch):
    for name in ("a", "like"):
        save_file(A, tmp_path / f"{name}.safetensors")
    finished = Output.finished

    def changed(self, item, about):
        finished(self, item, about)
        os.utime(tmp_path / "like.safetensors", (1, 1))

    monkeypatch.setattr(Output, "finished", changed)
    with pytest.raises(UserError, match="like.safetensors: changed while it was merged"):
        fastmerge.merge(
            [tmp_path / "a.safetensors"], "average", like=tmp_path / "like.safetensors", out=tmp_path / "out"
        )


def test_a_report_has_what_was_merged_before_it(killed, tmp_path):
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for path, tensors in zip(paths, (A, B), strict=True):
        save_file(tensors, path)
    words = ["merge", "average", "--models", *paths, "--out"]
    killed(main, [*words, str(tmp_path / "out")])
    for name in ("out", "whole"):
        assert main([*words, str(tmp_path / name), "--report", str(tmp_path / f"{name}.csv")]) == 0
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "whole.csv").read_text()


def test_nan_that_was_allowed_once_is_refused_later(killed, tmp_path, capfd):
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    save_file(A | {"a.weight": A["a.weight"] / 0}, paths[0])
    save_file(B, paths[1])
    words = ["merge", "average", "--models", *paths, "--out", str(tmp_path / "out")]
    killed(main, [*words, "--allow-nonfinite"])
    assert main(words) == 2
    assert "a.weight: 3200 values of the output are NaN or inf (they are in " in capfd.readouterr().err


def test_inputs_are_not_changed_and_a_dry_run_writes_nothing(tmp_path, capsys):
    before = {name: x.clone() for name, x in A.items()}
    found = fastmerge.merge([A], "average")
    for x in found.values():
        x.zero_()
    assert all(torch.equal(A[name], before[name]) for name in A)
    save_file(A, tmp_path / "a.safetensors")
    assert main(["merge", "average", "--models", str(tmp_path / "a.safetensors"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "5 tensors (5 merged), 3,769 entries" in said and "memory" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_page_about_merging(tmp_path, monkeypatch, capsys):
    """Its commands print what it says, its code runs, and its tables name every rule and its settings."""
    page = (Path(__file__).parent.parent / "docs" / "MERGE.md").read_text()
    monkeypatch.chdir(tmp_path)
    start = load_file(Path(fastmerge.__file__).parent / "models" / "assets" / "tiny-glyphs.safetensors")
    save_file(start, "base.safetensors")
    for k, name in enumerate("ab"):
        torch.manual_seed(k)
        save_file(
            {key: (x + 0.01 * torch.randn(x.shape)).to(x.dtype) for key, x in start.items()}, f"{name}.safetensors"
        )
    (_, bash), (_, said), (_, python) = re.findall(r"```(\w*)\n(.*?)```", page, re.S)
    for line in bash.splitlines():
        assert main(shlex.split(line, comments=True)[3:]) == 0
    printed = capsys.readouterr().out
    assert said == printed
    exec(python, {})
    assert main(["merge", "--help"]) == 0
    listed = re.sub(r"[^\w-]+", " ", capsys.readouterr().out).split()
    assert FILE_RULES.keys() <= set(listed)
    for name, rule in FILE_RULES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert name in ("dare-ties", "knots") or all(f"`{setting}`" in row for setting in places(name)), name
        assert ("| yes |" in row) == rule.needs_base
