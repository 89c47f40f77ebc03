"""What determines a run's numbers: a change of it is refused and nothing is overwritten; everything else may change."""

import copy
import json
import shutil
import types

import pytest
import torch
from image_trees import image_folder, truncate, write_image
from safetensors.torch import load_file, save_file

from fastmerge.__main__ import main
from fastmerge.config import FREE, PLAIN_GROUPS, declarations
from fastmerge.flags import parse
from fastmerge.identity import determinants, differences, fingerprint
from fastmerge.methods import METHODS
from fastmerge.models.tiny import load_tiny
from fastmerge.plan import plan

QUICK = (
    "--model tiny --dataset folder --tasks 2 --method finetune --no-nearest-mean --epochs 1 --batch-size 16 --lr 1e-3"
    " --device cpu --quiet"
).split()


def determined(*flags, **changes):
    """`determinants` of a command on data that need not exist. changes: of the contents."""
    config = parse(["--model=tiny", "--dataset=folder", *flags])
    about = {"device": "cpu", "weights": "a", "text": "b", "mean": (0.5,)} | changes
    sizes = config.scenario.task_sizes or [2] * (config.scenario.tasks or 10)
    tasks = [types.SimpleNamespace(classes=range(size)) for size in sizes]
    setup = types.SimpleNamespace(
        config=config,
        backbone=types.SimpleNamespace(weights_sha256=about["weights"], mean=about["mean"], std=(0.3,), image_size=32),
        dataset=types.SimpleNamespace(class_names=("x",), templates=("{}",)),
        flip=bool(config.data.flip),  # the data set's own answer is False
        scenario=types.SimpleNamespace(kind="cil", tasks=tasks, joined=lambda: None),
        head=types.SimpleNamespace(kind=config.model.head or "text"),
        device=types.SimpleNamespace(type=about["device"]),
        random_weights=config.model.pretrained == "none",
        text_sha256=about["text"],
        retained=None,
        earlier=None,
    )
    manifest = dict.fromkeys(("sha256", "images_sha256", "order_sha256"), "c") | changes.get("manifest", {})
    return determinants(setup, plan(config, setup.scenario), manifest)


BY_CONTENT = {
    "run.device", "data.data_root", "data.split_file", "data.test_part", "data.retain", "data.template", "data.class_names",
    "scenario.class_order", "model.pretrained", "model.mean", "model.std",
}  # fmt: skip


def test_every_setting_is_compared_or_named_as_free():
    """Walks all settings and all methods: a run depends on the plain groups and on those that its method reads."""
    base = determined("--method", *METHODS)
    seen = set(base["settings"]).union(*base["runs"].values())
    assert seen.isdisjoint(FREE) and BY_CONTENT <= FREE
    every = {f"{group}.{name}" for group, settings in declarations().items() for name in settings}
    assert every == seen | FREE
    for run, settings in base["runs"].items():
        method = METHODS[run.removesuffix("-seed0").removesuffix("-strict")]
        assert {name.split(".")[0] for name in settings} == set(method.groups) - set(PLAIN_GROUPS)
        for name, value in settings.items():
            other = copy.deepcopy(base)
            other["runs"][run][name] = "another"
            (line,) = differences(base, other)
            shown = value if isinstance(value, str) and " " in value else repr(value)
            assert line.startswith(f"{run}: {name}: {shown} -> 'another'")
            assert fingerprint(base, run) != fingerprint(other, run)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"device": "cuda"}, "device: 'cpu' -> 'cuda'"),
        ({"weights": "f" * 64}, "starting weights: 'a' -> sha256 ffffffffffff"),
        ({"text": "d"}, "text tower: 'b' -> 'd'"),
        ({"mean": (0.4,)}, "normalisation: mean [0.5]"),
        ({"manifest": {"order_sha256": "d"}}, "order: 'c' -> 'd'"),
        ({"manifest": {"images_sha256": "d"}}, "images: 'c' -> 'd'"),
        ({"manifest": {"sha256": "d"}}, "list of images: 'c' -> 'd'"),
    ],
)
def test_contents(changes, line):
    (found,) = differences(determined(), determined(**changes))
    assert found.startswith(line)


def test_what_may_change():
    base = determined("--lr", "1")
    free = "--lr 1 --data-root elsewhere --cache-gb 0 --quiet --save-every 5 --skip-bad-images --class-order natural"
    free += " --seeds 3 --method trm finetune --protocol full --trm.lambda2 0.5 --device cpu --no-flip --head text"
    assert differences(base, determined(*free.replace("--no-flip", "--flip False").split())) == []
    assert differences(base, determined("--lr", "1", "--trm.lambda2", "0.5")) == ["trm-seed0: trm.lambda2: 0.01 -> 0.5"]
    assert differences(base, determined()) == ["training.lr: 1.0 -> 0.0006"]
    assert determined("--tasks", "2") == determined("--task-sizes", "3", "2")  # the same tasks said in two ways
    (line,) = differences(determined("--tasks", "2"), determined("--task-sizes", "4", "2"))
    assert line == "scenario.task_sizes: None -> [4, 2]"
    older = copy.deepcopy(base)
    del older["settings"]["training.clip"]  # made before there was such a setting: the run had its default
    assert differences(older, base) == []
    assert differences(older, determined("--lr", "1", "--clip", "2")) == ["training.clip: 1.0 -> 2.0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, weights, a class order, and a finished run of them."""
    root = tmp_path_factory.mktemp("made")
    image_folder(root / "data", classes=4, train=4, test=2)
    save_file(load_tiny().state_dict(), root / "weights.safetensors")
    (root / "order.txt").write_text("2\n0\n3\n1\n")
    assert main([*QUICK, *flags(root)]) == 0
    return root


def flags(root, *more):
    about = {"data-root": "data", "pretrained": "weights.safetensors", "class-order": "order.txt", "run-dir": "run"}
    return [*(part for name, file in about.items() for part in (f"--{name}", str(root / file))), *more]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add(name):
    def change(root):
        state = load_file(root / "weights.safetensors")
        state[name] += 1
        save_file(state, root / "weights.safetensors")

    return change


def other_image(root):
    """Another picture under the same name, as large as the one before."""
    path = root / "data" / "train" / "colour_0" / "0.jpg"
    size = path.stat().st_size
    data = write_image(path, seed=99).read_bytes()
    path.write_bytes((data + bytes(size))[:size])


CHANGES = {
    "starting weights": add("visual.proj"),
    "text tower": add("token_embedding.weight"),
    "images": other_image,
    "list of images": lambda root: (root / "data/train/colour_0/0.jpg").rename(root / "data/train/colour_0/9.jpg"),
    "order": lambda root: (root / "order.txt").write_text("0\n1\n2\n3\n"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_contents_are_refused(what, made, tmp_path, capsys):
    root = shutil.copytree(made, tmp_path / "copy")
    CHANGES[what](root)
    before = snapshot(root / "run")
    assert main([*QUICK, *flags(root)]) == 2
    error = capsys.readouterr().err
    assert f"\n  {what}: " in error and " -> " in error and "another --run-dir" in error
    assert snapshot(root / "run") == before


def test_the_same_contents_elsewhere_are_the_same_run(made, tmp_path, capsys):
    root = shutil.copytree(made, tmp_path / "copy")
    (root / "data").rename(root / "moved")
    (root / "order.txt").rename(root / "other.json")
    (root / "other.json").write_text("[2, 0, 3, 1]")
    (root / "weights.safetensors").rename(root / "w.safetensors")
    changed = ["--data-root", "moved", "--class-order", "other.json", "--pretrained", "w.safetensors"]
    before = json.loads((root / "run" / "results.json").read_text())
    environment = root / "run" / "environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text())[0]))  # as older versions wrote it
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*QUICK, *flags(root), *changed, "--cache-gb", "0", "--save-every", "9", "--seeds", "0", "1"]) == 0
    after = json.loads((root / "run" / "results.json").read_text())["methods"]["finetune"]
    assert after["0"] == before["methods"]["finetune"]["0"] and set(after) == {"0", "1"}
    assert [start["device"] for start in json.loads(environment.read_text())] == ["cpu", "cpu"]


def test_nothing_learned_is_nothing_to_protect(made, tmp_path, capsys):
    """An unreadable image stops the run before anything is learned: repair it, and the same command works."""
    root = shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    path = root / "data" / "train" / "colour_2" / "1.jpg"
    good = path.read_bytes()
    truncate(path)
    assert main([*QUICK, *flags(root)]) == 2
    assert "1.jpg" in capsys.readouterr().err
    path.write_bytes(good)
    assert main([*QUICK, *flags(root)]) == 0


def test_bad_images_may_be_skipped_from_where_the_run_stopped(made, tmp_path, capsys):
    """The advice of the message is true: the run ends like one that skipped them from the start."""
    root = shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    truncate(root / "data" / "train" / "colour_1" / "1.jpg")  # of the second task
    save = ["--save-every", "0"]
    assert main([*QUICK, *flags(root, *save)]) == 2
    assert "the same command with --skip-bad-images" in " ".join(capsys.readouterr().err.split())
    assert list((root / "run").glob("*/checkpoint.safetensors"))
    assert main([*QUICK, *flags(root, *save, "--skip-bad-images")]) == 0
    assert main([*QUICK, *flags(root, "--skip-bad-images"), "--run-dir", str(root / "whole")]) == 0
    ends = [load_file(root / run / "finetune-seed0" / "model.safetensors") for run in ("run", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    results = [json.loads((root / run / "results.json").read_text())["methods"] for run in ("run", "whole")]
    assert results[0]["finetune"]["0"]["bad_images"] == results[1]["finetune"]["0"]["bad_images"] == 1
