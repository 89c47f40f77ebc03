"""Task sequences. Oracles: hashes of published class orders, and the definition of a partition.

pytest tests/test_scenario.py
"""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.scenario import build_scenario, evenly, order_hash, read_order, split_hash, task_sizes
from fastmerge.errors import UserError


def no_pixels(indices, size, device):
    raise AssertionError("a scenario needs no pixels")


def split(labels, domains=None) -> Split:
    labels = np.asarray(labels, np.int64)
    domains = np.zeros_like(labels) if domains is None else np.asarray(domains, np.int64)
    return Split(labels, domains, [f"{i}.png" for i in range(len(labels))], no_pixels)


def dataset(classes=10, per_class=6, domains=1, names=None, train=None, test=None, notes=()) -> Dataset:
    """Labels cycle, so that the images of a class are scattered."""
    labels = np.tile(np.arange(classes), per_class)
    where = np.arange(len(labels)) % domains if domains == 1 else np.repeat(np.arange(domains), len(labels) // domains)
    names = names or tuple(f"class {c}" for c in range(classes))
    places = tuple(f"place {d}" for d in range(domains))
    train, test = train or split(labels, where), test or split(labels, where)
    return Dataset("toy", tuple(names), places, train, test, ("a {}",), True, notes)


@given(st.integers(1, 400), st.data())
def test_sizes_differ_by_one_larger_first_and_cover_everything(classes, data):
    tasks = data.draw(st.integers(1, classes))
    sizes = evenly(classes, tasks)
    assert len(sizes) == tasks and sum(sizes) == classes
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("classes, tasks", [(196, 11), (345, 21), (1000, 19)])
def test_pairs_for_which_floating_point_bounds_lose_a_class(classes, tasks):
    assert sum(evenly(classes, tasks)) == classes


def test_the_example_of_196_classes():
    assert evenly(196, 10) == [20] * 6 + [19] * 4


@pytest.mark.parametrize(
    "classes, given, sizes",
    [
        (100, {"first": 50}, [50] + [10] * 5),  # B50-Inc10
        (100, {"first": 50, "tasks": 11}, [50] + [5] * 10),  # B50-Inc5
        (100, {"first": 50, "tasks": 4}, [50, 17, 17, 16]),
        (196, {"sizes": (20,)}, [20] * 9 + [16]),  # PILOT's B0-Inc20 on Cars
        (196, {"sizes": (96, 10), "tasks": 11}, [96] + [10] * 10),
        (10, {"sizes": (3, 2, 5)}, [3, 2, 5]),
        (10, {"sizes": (10,)}, [10]),
        (10, {"first": 1}, [1, 9]),
    ],
)
def test_sizes_of_the_tasks(classes, given, sizes):
    data = dataset(classes=classes, per_class=1)
    assert task_sizes(data, **({"tasks": None} | given)) == sizes
    named = {"first": "first_classes"}
    scenario = build_scenario(data, "cil", **({"tasks": None} | {named.get(k, k): v for k, v in given.items()}))
    assert [len(task.classes) for task in scenario.tasks] == sizes
    assert [c for task in scenario.tasks for c in task.classes] == list(range(classes))
    assert all(set(data.train.labels[task.train]) == set(task.classes) for task in scenario.tasks)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"first": 10}, "--first-classes 10: toy has 10 classes, none for task 2"),
        ({"first": 12}, "--first-classes 12: toy has 10 classes, not 12"),
        ({"first": 8, "tasks": 4}, "--first-classes 8 --tasks 4: toy has 10 classes"),
        ({"first": 5, "tasks": 1}, "there must be a second task"),
        ({"sizes": (4, 7)}, "--task-sizes 4 7: toy has 10 classes, not 11"),
        ({"sizes": (4, 2), "tasks": 3}, "--tasks 3: --task-sizes 4 2 gives 4 tasks of toy; leave --tasks out"),
    ],
)
def test_sizes_that_do_not_fit(given, says):
    with pytest.raises(UserError, match=says):
        task_sizes(dataset(), **({"tasks": None} | given))


def test_the_most_populous_classes():
    labels = [0] * 3 + [1] * 5 + [2] * 3 + [3] * 1 + [4] * 4
    data = dataset(classes=5, train=split(labels), test=split([0, 1, 2, 3, 4, 4]), notes=("a copy",))
    top = data.most_populous(3)  # of 0 and 2, which have 3 images each, the earlier one
    assert top.class_names == ("class 0", "class 1", "class 4")
    assert top.train.labels.tolist() == [0] * 3 + [1] * 5 + [2] * 4
    assert top.train.ids == [f"{i}.png" for i in range(16) if labels[i] in (0, 1, 4)]
    assert top.test.labels.tolist() == [0, 1, 2, 2] and top.test.ids == ["0.png", "1.png", "4.png", "5.png"]
    assert top.notes == ("a copy", "--top-classes: the 3 of 5 classes with the most training images (3 or more)")
    assert data.most_populous(5).class_names == data.class_names
    with pytest.raises(UserError, match="--top-classes 6: toy has 5 classes; choose 1 to 5"):
        data.most_populous(6)


PUBLISHED = {  # classes: (first five of seed 1993, its sha256[:12], sha256[:12] of the natural order)
    31: ([21, 28, 2, 15, 10], "02b5eb34e913", "a8ccb3e32126"),
    65: ([22, 56, 44, 45, 13], "188209099068", "0cd80d5220fe"),
    100: ([68, 56, 78, 8, 23], "e90204efdce7", "51f2696d83d6"),
    196: ([59, 134, 162, 9, 42], "7e078ddfbad6", "257bfbab5d8e"),
    200: ([168, 136, 51, 9, 183], "b113214bc615", "050029a81b69"),
    300: ([169, 221, 146, 296, 92], "28f846a95c20", "3b5f74133aec"),
    345: ([214, 80, 343, 268, 224], "2f203e267c84", "a820c1228dd0"),
    1000: ([54, 7, 894, 512, 126], "1184d882ffd7", "3e726f1b6f58"),
}


@pytest.mark.parametrize("classes", PUBLISHED)
def test_class_orders_have_the_published_hashes(classes):
    first, pilot, natural = PUBLISHED[classes]
    names = [str(c) for c in range(classes)]
    order = read_order("1993", names, "class")
    assert list(order[:5]) == first and order_hash(order) == pilot
    assert order_hash(read_order("natural", names, "class")) == natural


@pytest.mark.parametrize("tasks", [1, 3, 10])
def test_class_incremental(tasks):
    data = dataset()
    scenario = build_scenario(data, "cil", tasks, "1993")
    assert [t.index for t in scenario.tasks] == list(range(tasks))
    assert tuple(c for t in scenario.tasks for c in t.classes) == scenario.class_order
    for part in ("train", "test"):
        images = np.concatenate([getattr(t, part) for t in scenario.tasks])
        assert sorted(images) == list(range(60))
        for task in scenario.tasks:
            rows = getattr(task, part)
            assert set(data.train.labels[rows]) == set(task.classes) and (np.diff(rows) > 0).all()
    for t in range(tasks):
        assert scenario.seen(t) == tuple(c for task in scenario.tasks[: t + 1] for c in task.classes)


def test_domain_incremental(tmp_path):
    data = dataset(domains=3)
    (tmp_path / "order").write_text("place 2\nplace 0\nplace 1\n")
    for spec, names in (("natural", ["place 0", "place 1", "place 2"]), (str(tmp_path / "order"), None)):
        names = names or ["place 2", "place 0", "place 1"]
        for tasks in (None, 3):
            scenario = build_scenario(data, "dil", tasks, spec)
            assert [t.name for t in scenario.tasks] == names
            for t, task in enumerate(scenario.tasks):
                assert {data.domain_names[d] for d in data.train.domains[task.train]} == {names[t]}
                assert scenario.seen(t) == task.classes == tuple(range(10))
            assert scenario.manifest()["domain_order"] == names
    assert sum(len(t.test) for t in scenario.tasks) == 60


@pytest.mark.parametrize(
    "text",
    [
        "[2, 0, 1]",
        '["sea lion", "ant", "bee"]',
        "2 0 1",
        "2\n0\n1\n",
        "sea lion\nant\nbee\n",
        "sea_lion ant bee",
        "sea_lion\r\n  ant\r\n2\n".replace("2", "bee"),
        "sea_lion\n0\nbee",
        "2, 0, 1",
        "sea lion, ant, bee",
        '"sea lion", "ant",\n"bee"  # the last task\n',
        "2,\n0,\n1,\n",
        "# order of the paper\n2\n0 # task 2\n\n1\n",
        "- sea lion\n- ant  # a comment\n- bee\n",
        "# comment\n- 2\n- 0\n- 1\n",
        "---\nclass_order: [2, 0, 1]\nseed: 3\n",
        "class_order:\n  - sea lion\n  - ant\n  - bee\n",
        "class_order: 2, 0, 1\n",
        "[sea lion, 'ant', bee]",
        '{"class_order": [2, 0, 1], "tasks": 3}',
        '# comment\n{"class_order": ["sea_lion", "ant", "bee"]}',
        '["2", "0", "1"]',
        "\ufeff[2, 0, 1]",
        "\ufeff2\r\n0\r\n1\r\n",
    ],
)
def test_order_files(tmp_path, text):
    (tmp_path / "order.txt").write_text(text, encoding="utf-8")
    assert read_order(str(tmp_path / "order.txt"), ("ant", "bee", "sea lion"), "class") == (2, 0, 1)


NAMED = ("sea lion", "Ant", "sealion", "bee", "sea-lion")  # natural order of five folders


def test_numberings_and_what_permutes_them(tmp_path):
    """Oracle: the tools' own words, sorted() of the folders' names, and the generators they call."""
    folders = [name.replace(" ", "_") for name in NAMED]
    by_name = [folders.index(folder) for folder in sorted(folders)]
    assert [NAMED[i] for i in by_name] == ["Ant", "bee", "sea-lion", "sea lion", "sealion"]
    assert read_order("name-sorted", NAMED, "class") == tuple(by_name)
    pilot = np.random.RandomState(1993).permutation(5).tolist()
    assert read_order("natural:1993", NAMED, "class") == read_order("1993", NAMED, "class") == tuple(pilot)
    assert read_order("name-sorted:1993", NAMED, "class") == tuple(by_name[i] for i in pilot)
    (tmp_path / "order.json").write_text("[3, 1, 4, 0, 2]")  # as in magmax: indices into the sorted names
    path = str(tmp_path / "order.json")
    assert read_order(f"name-sorted:{path}", NAMED, "class") == tuple(by_name[i] for i in (3, 1, 4, 0, 2))
    assert read_order(f"name-sorted:indices:{path}", NAMED, "class") == read_order(
        f"name-sorted:{path}", NAMED, "class"
    )
    (tmp_path / "names").write_text("bee\nAnt\nsealion\nsea-lion\nsea_lion\n")  # names do not depend on numbers
    expected = read_order(str(tmp_path / "names"), NAMED, "class")
    assert read_order(f"name-sorted:{tmp_path / 'names'}", NAMED, "class") == expected == (3, 1, 2, 4, 0)
    random.seed(3)
    coda = list(range(5))
    random.shuffle(coda)
    assert read_order("shuffle:3", NAMED, "class") == tuple(coda)
    order = np.random.RandomState(7).permutation(5)
    mapped = [int(order[c]) for c in range(5)]  # mammoth: class c is learned at place order[c]
    assert read_order("inverse:7", NAMED, "class") == tuple(sorted(range(5), key=mapped.__getitem__))


def test_wnid_sorted():
    keys = ("n03", "n01", "n02")
    keys = tuple(f"{key}000000" for key in keys)
    assert read_order("wnid-sorted", ("x", "y", "z"), "class", keys) == (1, 2, 0)
    fish = ("great white shark", "goldfish", "tench")  # folders with names: n01484850, n01443537, n01440764
    assert (
        read_order("wnid-sorted", fish, "class", ("a", "b", "c"))
        == read_order("wnid-sorted", fish, "class")
        == (2, 1, 0)
    )
    pilot = np.random.RandomState(1993).permutation(3)
    assert read_order("wnid-sorted:1993", fish, "class") == tuple(int(2 - i) for i in pilot)
    with pytest.raises(UserError, match="--class-order wnid-sorted: the WordNet id of class mermaid is unknown"):
        read_order("wnid-sorted", (*fish, "mermaid"), "class")
    with pytest.raises(UserError, match="the WordNet id of domain tench is unknown"):
        read_order("wnid-sorted", ("tench",), "domain")


@pytest.mark.parametrize(
    "spec, says",
    [
        ("name-sorted:", "expected a seed or a file after the colon, or no colon"),
        ("name-sort", "expected natural, name-sorted, wnid-sorted, .* Did you mean: name-sorted"),
        ("name-sorted:none", "--class-order name-sorted:none: expected"),
        ("shuffle:-1", "a seed must be between 0 and 2"),
        ("shuffle:x", "or an existing file"),
    ],
)
def test_orders_that_are_none(spec, says):
    with pytest.raises(UserError, match=says):
        read_order(spec, NAMED, "class")


def test_a_class_order_uses_the_folders_of_the_data(tmp_path):
    data = dataset(classes=3, names=("x", "y", "z"))
    data = Dataset(**{**vars(data), "keys": ("n00000003", "n00000001", "n00000002")})
    assert build_scenario(data, "cil", 3, "wnid-sorted").class_order == (1, 2, 0)
    (tmp_path / "order.txt").write_text("n00000001\nn00000003\nn00000002\n")
    assert build_scenario(data, "cil", 3, str(tmp_path / "order.txt")).class_order == (1, 0, 2)
    by_number = build_scenario(data, "cil", 3, f"wnid-sorted:{tmp_path / 'order.txt'}")  # says nothing of numbers
    assert by_number.class_order == (1, 0, 2)
    data = Dataset(**{**vars(data), "keys": ("2", "0", "1")})  # folders that are numbers are no names
    (tmp_path / "order.txt").write_text("0 2 1")
    assert build_scenario(data, "cil", 3, str(tmp_path / "order.txt")).class_order == (0, 2, 1)


def test_names_win_over_integers(tmp_path):
    (tmp_path / "order").write_text("10 2 1")
    assert read_order(str(tmp_path / "order"), ("1", "10", "2"), "class") == (1, 2, 0)


TOLD = ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")  # natural order of twelve folders


@pytest.mark.parametrize("form", ["{}", "[{}]", "- {}", '{{"class_order": [{}]}}', "class_order: {}"])
def test_numbers_that_are_names_and_indices_have_to_be_told_apart(tmp_path, form):
    path, numbers = tmp_path / "order", ["11", "2", "0", "1", "10", "3", "4", "5", "6", "7", "8", "9"]
    path.write_text("\n".join(map(form.format, numbers)) if form == "- {}" else form.format(", ".join(numbers)))
    with pytest.raises(UserError, match=f"--class-order names:{path} or --class-order indices:{path}"):
        read_order(str(path), TOLD, "class")
    assert read_order(f"names:{path}", TOLD, "class") == tuple(TOLD.index(n) for n in numbers)
    assert read_order(f"indices:{path}", TOLD, "class") == tuple(map(int, numbers))
    assert read_order(str(path), [f"class {n}" for n in TOLD], "class") == tuple(map(int, numbers))
    path.write_text("1 2 x")
    with pytest.raises(UserError, match="'x' is no index in 0..11"):
        read_order(f"indices:{path}", TOLD, "class")


def test_yaml_changes_no_name(tmp_path):
    names = ("1e3", "no", "null", "007", "2020-01-01")
    (tmp_path / "order").write_text("".join(f"- {name}\n" for name in names[::-1]))
    assert read_order(str(tmp_path / "order"), names, "class") == (4, 3, 2, 1, 0)


def test_domains_of_a_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text('{"class_order": [1, 0], "domain_order": ["b", "a"]}')
    assert read_order(str(tmp_path / "manifest.json"), ("a", "b"), "domain") == (1, 0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("0 1", ["1 of 3 missing", "sea lion"]),
        ("0 1 1 2", ["more than once", "bee"]),
        ("0 1 3", ["'3'", "0..2"]),
        ("[0, 1, 2.0]", ["2.0", "0..2"]),
        ("ant\nbee\nsea lino", ["'sea lino'", "Did you mean: sea lion"]),
        ("[0, 1", ["cannot read it as a list"]),
        ("", ["3 of 3 missing"]),
        ("[" * 100000, ["cannot read it as a list"]),
        ("- ant\n  x: 1\n :", ["cannot read it as a list"]),
        ('{"order": [0, 1, 2]}', ["an object without class_order; it has order"]),
        ('{"class_order": {"a": 1}}', ["expected a list"]),
        ("[[0, 1], [2]]", ["'[0, 1]'", "neither"]),
    ],
)
def test_order_files_that_are_no_permutation(tmp_path, text, says):
    (tmp_path / "order.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_order(str(tmp_path / "order.txt"), ("ant", "bee", "sea lion"), "class")
    assert all(part in str(caught.value) for part in [str(tmp_path / "order.txt"), *says]), caught.value


def test_ambiguous_name_in_an_order_file(tmp_path):
    (tmp_path / "order.txt").write_text("missile\nant\nmissile")
    with pytest.raises(UserError, match="more than one class is called 'missile'; list indices 0..2"):
        read_order(str(tmp_path / "order.txt"), ("ant", "missile", "missile"), "class")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("cil", 11, "natural"), "has 10 classes; choose 1 to 10 tasks"),
        (("cil", 0, "natural"), "choose 1 to 10 tasks"),
        (("cil", None, "natural"), "choose 1 to 10 tasks"),
        (("cil", 2, "natura"), "or an existing file. Did you mean: natural"),
        (("cil", 2, "-1"), "between 0 and 2"),
        (("cli", 2, "natural"), "unknown scenario 'cli'. Did you mean: cil"),
        (("datasets", None, "natural"), "one data set only; use --scenario cil"),
        (("dil", None, "natural"), "one domain only; use --scenario cil"),
    ],
)
def test_errors_say_what_is_possible(arguments, says):
    with pytest.raises(UserError) as caught:
        build_scenario(dataset(), *arguments)
    assert says in str(caught.value)


def test_number_of_domains_is_fixed():
    with pytest.raises(UserError, match="has 3 domains .place 0, place 1, place 2.; leave --tasks out"):
        build_scenario(dataset(domains=3), "dil", 4)


@pytest.mark.parametrize("kind", ["cil", "dil"])
def test_class_without_train_images_is_named(kind):
    data = dataset(classes=3, domains=2, train=split([0, 1, 0, 1], [0, 0, 1, 1]))
    with pytest.raises(UserError, match="no train image of class class 2.*add images"):
        build_scenario(data, kind, None if kind == "dil" else 2)


def test_task_without_test_images_is_named():
    with pytest.raises(UserError, match="no test image for task 2.*fewer tasks"):
        build_scenario(dataset(classes=2, test=split([0, 0])), "cil", 2)
    with pytest.raises(
        UserError, match="no test image for place 1.*Add images of this domain, or .*--split-file, or .*--validation"
    ):
        build_scenario(dataset(classes=2, domains=2, test=split([0, 1])), "dil", None)


def test_manifest():
    names = ("a", "b", "missile", "missile")
    data = dataset(classes=4, names=names, test=split([0, 1, 2, 3] * 5 + [0]), notes=("a copy",))
    manifest = build_scenario(data, "cil", 2, "1993").manifest()
    assert json.loads(json.dumps(manifest)) == manifest
    order = np.random.RandomState(1993).permutation(4).tolist()
    assert manifest["class_order"] == order and manifest["scenario"] == "cil" and manifest["dataset"] == "toy"
    assert manifest["order_sha256"] == hashlib.sha256(json.dumps(order).encode()).hexdigest()[:12]
    assert [t["classes"] for t in manifest["tasks"]] == [[names[c] for c in order[:2]], [names[c] for c in order[2:]]]
    assert (manifest["train"], manifest["test"]) == (24, 21)
    assert sum(t["test"] for t in manifest["tasks"]) == 21 and {t["train"] for t in manifest["tasks"]} == {12}
    copy, duplicates = manifest["warnings"]
    assert copy == "a copy" and "missile" in duplicates


def test_few_test_images_are_a_warning():
    data = dataset(classes=3, test=split([0] * 4 + [1] * 5 + [2]))
    (warning,) = build_scenario(data, "cil", 1).manifest()["warnings"]
    assert "class 0 (4)" in warning and "class 2 (1)" in warning and "class 1" not in warning


def test_split_hash_covers_names_labels_domains_and_their_part():
    base = split_hash(split([0, 1]), split([1]))
    assert base == split_hash(split([0, 1]), split([1]))
    renamed = Split(np.array([0, 1]), np.zeros(2, np.int64), ["0.png", "2.png"], no_pixels)
    for other in ((split([1, 1]), split([1])), (split([0, 1], [0, 1]), split([1])), (split([0]), split([1, 1]))):
        assert split_hash(*other) != base
    assert split_hash(renamed, split([1])) != base


def test_dataset_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="label outside 0..2"):
        dataset(classes=3, train=split([0, 3]))
    with pytest.raises(ValueError, match="exactly one"):
        Dataset("toy", ("a",), ("d",), split([0]), split([0]), ("no place",), True)
    with pytest.raises(ValueError, match="lengths must agree"):
        Split(np.zeros(2, np.int64), np.zeros(2, np.int64), ["one"], no_pixels)
    with pytest.raises(TypeError, match="int64"):
        Split(np.zeros(1, np.int32), np.zeros(1, np.int64), ["one"], no_pixels)
