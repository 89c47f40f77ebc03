"""Several data sets as one, and a task for each. Oracle: the parts themselves, loaded alone."""

import json

import numpy as np
import pytest
import torch
from image_trees import image_folder, write_tree
from published_trees import TREES, plant
from toy import CONCEPTS

from fastmerge.__main__ import main
from fastmerge.config import Config
from fastmerge.data import load_dataset
from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.joined import join, load_datasets
from fastmerge.data.scenario import build_scenario
from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.methods import METHODS
from fastmerge.models import load_backbone
from fastmerge.models.heads import build_head

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Two folders; the classes cat and fish are in both."""
    root = tmp_path_factory.mktemp("trees")
    for name, classes in (("home", ("ant", "cat", "fish")), ("shop", ("cat", "dog", "fish"))):
        for part, images in (("train", 3), ("test", 2)):
            write_tree(root / name / part, *classes, images=images)
    return root


def roots(trees):
    return [str(trees / "home"), str(trees / "shop")]


def test_classes_of_the_same_name_are_one(trees):
    alone = [load_dataset("folder", root) for root in roots(trees)]
    both = load_datasets(["folder", "folder"], roots(trees), download=False)
    assert both.name == "home+shop" and both.domain_names == ("home", "shop")
    assert both.class_names == ("ant", "cat", "fish", "dog")
    assert any("2 classes are in several data sets and count as one each: cat, fish" in note for note in both.notes)
    for part in ("train", "test"):
        joined, parts = getattr(both, part), [getattr(data, part) for data in alone]
        assert list(joined.ids) == [f"{d.name}/{i}" for d, p in zip(alone, parts, strict=True) for i in p.ids]
        names = [d.class_names[c] for d, p in zip(alone, parts, strict=True) for c in p.labels]
        assert [both.class_names[c] for c in joined.labels] == names
        assert joined.domains.tolist() == [0] * len(parts[0]) + [1] * len(parts[1])
        order = np.random.RandomState(0).permutation(len(joined))  # images of both in one read
        pixels, good = joined.read(order, 16, CPU)
        each = torch.cat([p.read(np.arange(len(p)), 16, CPU)[0] for p in parts])
        assert torch.equal(pixels, each[torch.from_numpy(order)]) and good.all()


def test_tasks_are_the_data_sets(trees):
    both = load_datasets(["folder", "folder"], roots(trees), download=False)
    scenario = build_scenario(both, "datasets", None, "natural")
    assert [(task.name, task.classes) for task in scenario.tasks] == [("home", (0, 1, 2)), ("shop", (1, 2, 3))]
    assert scenario.seen(0) == (0, 1, 2) and scenario.seen(1) == (0, 1, 2, 3)
    assert [len(task.test) for task in scenario.tasks] == [6, 6]
    swapped = build_scenario(both, "datasets", 2, "0")  # a permutation that starts with the second
    assert swapped.domain_order == (1, 0) and swapped.class_order == (1, 2, 3, 0) and swapped.seen(0) == (1, 2, 3)
    assert swapped.manifest()["domain_order"] == ["shop", "home"]
    with pytest.raises(UserError, match="--tasks 3: there is one task per data set, and home.shop has 2 data sets"):
        build_scenario(both, "datasets", 3, "natural")


def toy(name, classes, templates=("a {}",), flip=True, test=None):
    def split(labels):
        labels = np.asarray(labels, np.int64)
        return Split(labels, np.zeros_like(labels), [f"{i}" for i in range(len(labels))], lambda *_: None)

    every = range(len(classes))
    return Dataset(name, classes, (name,), split(every), split(every if test is None else test), templates, flip)


def test_names_that_occur_twice_in_one_data_set_stay_two_classes():
    both = join([toy("a", ("missile", "missile", "ant")), toy("b", ("ant", "missile", "missile", "missile"))])
    assert both.class_names == ("missile", "missile", "ant", "missile")
    assert both.train.labels.tolist() == [0, 1, 2, 2, 0, 1, 3]


def test_equal_names_of_data_sets_are_told_apart():
    three = join([toy("a", ("x",)), toy("a", ("y",)), toy("a", ("z",))])
    assert three.domain_names == ("a", "a#2", "a#3") and three.templates == ("a {}",)


def test_flips_only_where_all_data_sets_allow_them():
    assert join([toy("a", ("x",)), toy("b", ("y",))]).flip
    mixed = join([toy("a", ("x",)), toy("digits", ("y",), flip=False)])
    assert not mixed.flip and "no flips, which only a allow" in mixed.notes[0]


def test_prompts_are_those_of_the_data_set_that_has_the_class():
    """Oracle: a head for each data set alone."""
    backbone, encoder = load_backbone("tiny", "glyphs")
    parts = [toy("a", ("A", "B"), ("a photo of {}",)), toy("b", ("B", "C"), ("the letter {}", "a {}"))]
    both = join(parts)
    assert both.templates == (("a photo of {}",), ("a photo of {}",), ("the letter {}", "a {}"))

    def rows(data):
        about = {"class_names": data.class_names, "templates": data.templates}
        return build_head("text", backbone=backbone, encoder=encoder, **about).weight

    expected = torch.stack([*rows(parts[0]), rows(parts[1])[1]])
    torch.testing.assert_close(rows(both), expected)
    assert both.most_populous(2).templates == both.templates[:2]
    with pytest.raises(ValueError, match="exactly one"):
        join([toy("a", ("A",)), toy("b", ("B",), ("no place",))])


def test_a_class_of_a_task_needs_training_images_there():
    data = join([toy("a", ("x", "y")), toy("b", ("x", "z"))])
    lacking = Dataset(**{**vars(data), "train": data.train.subset(np.array([0, 1, 3]))})  # no x of b
    with pytest.raises(UserError, match="b: no train image of class x"):
        build_scenario(lacking, "datasets", None, "natural")


@pytest.mark.parametrize(
    ("names", "places", "options", "says"),
    [
        (["folder"] * 3, ["home", "shop"], {}, "--data-root names 2 folders for 3 data sets"),
        (["folder", "folder"], ["home"], {}, "folder is named twice with the same folder"),
        (["folder", "folder"], ["home", "shop"], {"split_file": "list"}, "folder and folder would both read this file"),
        (
            ["glyphs", "imagenet1k"],
            ["home"],
            {"split_file": "list"},
            "none of the data sets glyphs, imagenet1k takes it",
        ),
        (["glyphs", "folde"], ["home"], {}, "unknown data set 'folde'. Did you mean: folder"),
    ],
)
def test_what_does_not_fit(trees, names, places, options, says):
    (trees / "list").write_text("train home/train/ant/0.png\n")
    options = {name: str(trees / value) for name, value in options.items()}
    with pytest.raises(UserError, match=says):
        load_datasets(names, [str(trees / place) for place in places], download=False, **options)


def test_the_same_images_are_known_however_their_folder_is_named(trees, tmp_path):
    link, home = tmp_path / "link", trees / "home"
    link.symlink_to(home)
    for other in (link, f"{home}/", f"{trees}/shop/../home"):
        with pytest.raises(UserError, match="folder is named twice with the same folder"):
            load_datasets(["folder", "folder"], [str(home), str(other)], download=False)
    images = tmp_path / "links"  # its own root, with links to the classes of the other one
    for part in ("train", "test"):
        (images / part).mkdir(parents=True)
        (images / part / "ant").symlink_to(home / part / "ant")
    with pytest.raises(UserError, match=f"folder and folder both read the images in {images}/train/ant; name each"):
        load_datasets(["folder", "folder"], [str(home), str(images)], download=False)
    office = plant(tmp_path / "data", TREES["office31", "official"][0])
    base = load_dataset("office31", office).train.read.root
    assert base != str(office)
    with pytest.raises(UserError, match="office31 and office31 both read the images in"):
        load_datasets(["office31", "office31"], [str(office), base], download=False)


def test_one_root_serves_all_and_glyphs_needs_none(trees):
    both = load_datasets(["glyphs", "folder"], [str(trees / "home")], download=False)
    assert both.domain_names == ("glyphs", "home") and len(both.class_names) == 53
    assert not both.train.on_device
    pixels, _ = both.train.read(np.array([len(both.train) - 1, 0]), 16, CPU)
    assert torch.equal(pixels[1:], load_dataset("glyphs").train.read(np.array([0]), 16, CPU)[0])


def test_flags():
    several = parse("--dataset glyphs folder --data-root d".split())
    assert (several.data.dataset, several.data.data_root) == (("glyphs", "folder"), ("d",))
    assert (several.scenario.scenario, several.scenario.class_order) == ("datasets", "natural")
    assert several.model.model == "ViT-B-16-quickgelu"
    assert several.run.run_dir == "runs/glyphs-folder-datasets-ViT-B-16-quickgelu"
    for flags, says in (
        ("--scenario datasets", "there is only glyphs; name several with --dataset"),
        ("--dataset glyphs folder --scenario dil", "for several data sets use datasets or cil"),
        ("--dataset", "--dataset needs a value"),
        ("--data-root", "--data-root needs a value"),
    ):
        with pytest.raises(UserError, match=says):
            parse(flags.split())
    assert Config().data.dataset == ("glyphs",)


@pytest.mark.parametrize(
    "methods", [("finetune", "lwf", "ewc", "joint"), pytest.param(tuple(METHODS), marks=pytest.mark.slow)]
)
def test_methods_on_data_sets_that_share_classes(methods, tmp_path, capsys):
    """They train, merge and are evaluated over the joined classes and over the classes of each data set."""
    image_folder(tmp_path / "a", classes=2, train=4, test=2)
    image_folder(tmp_path / "b", classes=4, train=4, test=2)
    places = [str(tmp_path / "a"), str(tmp_path / "b")]
    run = ["--model", "tiny", "--run-dir", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "8"]
    command = ["--dataset", "folder", "folder", "--data-root", *places, *run, "--method", *methods, "--quiet"]
    command += ["--clg-cbm.concepts", str(CONCEPTS)]
    assert main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["methods"]) >= {"finetune", "nearest-mean"} and len(results["methods"]) >= len(methods)
    for name, seeds in results["methods"].items():
        result = seeds["0"]
        if METHODS[name.removesuffix("-strict")].joint:
            assert "own classes" not in result["also"]
            continue
        (first, none), (_, last) = result["accuracy_matrix"]
        (own_first, _), (_, own_last) = result["also"]["own classes"]["accuracy_matrix"]
        assert none is None and own_first == first  # after the first task both have the same candidates
        assert own_last >= last, name  # fewer candidates, among them the true one
    starting = results["zero_shot"]
    assert starting["also"]["own classes"]["accuracy_matrix"][0][0] == starting["accuracy_matrix"][0][0]
    assert "mean of tasks" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run" / "finetune-seed0"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(results["methods"]["finetune"]["0"]["final_accuracy"])
    assert list(found["per_task"]) == ["a", "b"]
    per_task = results["methods"]["finetune"]["0"]["accuracy_matrix"][-1]
    assert list(found["per_task"].values()) == pytest.approx(per_task)


def test_a_data_set_is_added_to_a_finished_sequence(tmp_path, capsys):
    """Oracle: one run over all three data sets."""
    for name, classes in (("a", 2), ("b", 3), ("c", 4)):
        image_folder(tmp_path / name, classes=classes, train=4, test=2)
    run = "--model tiny --method finetune --no-nearest-mean --epochs 1 --batch-size 8 --quiet --run-dir".split()
    command = ["--dataset", "folder", "folder", "--data-root", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*command, *run, str(tmp_path / "two")]) == 0
    longer = ["--continue-from", str(tmp_path / "two"), "--dataset", "folder", "--data-root", str(tmp_path / "c")]
    assert main([*longer, "--no-nearest-mean", "--quiet", "--run-dir", str(tmp_path / "then")]) == 0
    command = ["--dataset", *["folder"] * 3, "--data-root", *(str(tmp_path / name) for name in "abc")]
    assert main(["--continue-from", str(tmp_path / "two"), *command, "--run-dir", str(tmp_path / "again")]) == 2
    assert "folder, folder are tasks of" in capsys.readouterr().err
    first = ["--continue-from", str(tmp_path / "then"), "--dataset", "folder", "--data-root", str(tmp_path / "a")]
    assert main([*first, "--no-nearest-mean", "--run-dir", str(tmp_path / "again")]) == 2  # of the run before the last
    assert f"folder is a task of {tmp_path / 'two'}" in capsys.readouterr().err
    image_folder(tmp_path / "d", classes=2, train=2, test=1)
    for name, which in (("a", "two"), ("c", "then"), ("d", "")):  # all that the chain trained on, and what it will
        new = ["--continue-from", str(tmp_path / "then"), "--dataset", "folder", "--data-root", str(tmp_path / "d")]
        assert main([*new, "--retain", "folder", str(tmp_path / name), "--run-dir", str(tmp_path / "again")]) == 2
        tasks = f"tasks of {tmp_path / which}" if which else "tasks"
        assert f"--retain folder: {tasks} train on this data set" in capsys.readouterr().err
    assert main([*command, *run, str(tmp_path / "three")]) == 0
    then, three = (
        json.loads((tmp_path / name / "finetune-seed0" / "result.json").read_text()) for name in ("then", "three")
    )
    assert then["accuracy_matrix"] == three["accuracy_matrix"]
    assert then["also"]["own classes"]["accuracy_matrix"] == three["also"]["own classes"]["accuracy_matrix"]


def test_classes_of_joined_data_sets_are_renamed(trees, tmp_path):
    def load(text):
        (tmp_path / "names").write_text(text)
        names = str(tmp_path / "names")
        return load_datasets(["folder", "folder"], roots(trees), download=False, class_names=names).class_names

    assert load("cat\ttabby\nant\tworker ant\n") == ("worker ant", "tabby", "fish", "dog")
    assert load('{"dog": "hound"}') == ("ant", "cat", "fish", "hound")
    for text, says in (
        ("tabby\nant\nfish\ndog\n", "for several data sets expected lines with a name, a tab and a new name"),
        ("cot\ttabby\n", "'cot' is no class. Did you mean: cat"),
        ("cat\tdog\n", "'dog' would be the name of several classes"),
        ('{"cat": 3}', "for several data sets expected"),
    ):
        with pytest.raises(UserError, match=says):
            load(text)
