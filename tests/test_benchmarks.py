"""Published data sets: every layout of every one. Oracle: the names that the tests plant.

pytest tests/test_benchmarks.py
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import test_data_suite as suite
import torch
from image_trees import write_tree
from published_trees import (
    BIRDS,
    MODELS,
    RENDITIONS,
    TREES,
    WNIDS,
    both,
    cars,
    cub,
    domainnet,
    everything,
    images,
    pacs,
    plant,
)

from fastmerge.data import DATASETS, imagenet_r, load_dataset, wordnet
from fastmerge.data.benchmark import usual_domain
from fastmerge.data.recognise import BENCHMARKS
from fastmerge.data.scenario import build_scenario
from fastmerge.data.split import by_hash, digest
from fastmerge.data.tree import ClassFolder
from fastmerge.errors import UserError

SUITE = ("eurosat", "resisc45", "sun397", "dtd", "gtsrb")  # tested in test_data_suite.py
LAYOUTS = [(b.name, layout.name) for b in BENCHMARKS if b.name not in SUITE for layout in b.layouts]
SLOWLY_MADE = {("cars", "official")}  # needs .mat files; tested below


def error_of(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(*args, **options)
    return str(caught.value)


def listed(data):
    """(file, class name, domain) of the train and of the test images."""
    return [
        sorted(
            (image, data.class_names[label], data.domain_names[domain])
            for image, label, domain in zip(split.ids, split.labels, split.domains, strict=True)
        )
        for split in (data.train, data.test)
    ]


def test_every_data_set_is_in_the_table_and_every_layout_has_a_tree():
    assert {b.name for b in BENCHMARKS} <= set(DATASETS)
    assert set(TREES) | SLOWLY_MADE == set(LAYOUTS)


def test_the_page_about_data_has_a_row_for_every_data_set_and_a_word_for_every_layout():
    page = (Path(__file__).parent.parent / "docs" / "DATA.md").read_text()
    rows = {row.split("|")[1].strip().strip("`"): row for row in page.splitlines() if row.startswith("| `")}
    assert {name for key in rows for name in key.replace("`", "").split(", ")} >= set(DATASETS)
    for known in BENCHMARKS:
        row = rows[known.name]
        for layout in known.layouts:
            who = re.findall(r"LAMDA|MagMax|CMM|CoOp|official|DomainBed|Dassl", layout.name)
            assert all(name in row for name in who), (known.name, layout.name)


@pytest.mark.parametrize("name, layout", TREES, ids=str)
def test_layout(tmp_path, name, layout):
    tree, class_names, domains, train, test = TREES[name, layout]
    plant(tmp_path, tree)
    before = everything(tmp_path)
    data = load_dataset(name, tmp_path)
    assert everything(tmp_path) == before
    assert (data.name, data.class_names, data.domain_names) == (name, class_names, domains)
    assert (len(data.train), len(data.test)) == (train, test)
    assert data.origin.layout.startswith(f"{layout}, in {tmp_path}")
    assert all((tmp_path / data.origin.layout.partition(", in ")[2] / image).is_file() for image in data.train.ids)
    assert not {*data.train.ids} & {*data.test.ids} and data.flip
    for image, class_name, domain in sum(listed(data), []):  # every label is that of the file's own path
        path = image.lower().replace("_", " ")
        if len(domains) > 1 and name != "imagenet-r":
            assert domain.lower().replace("_", " ")[:4] in path
        if name not in ("imagenet-r", "imagenet-a", "tiny-imagenet") and "cars_" not in image:
            assert class_name.lower().replace("/", "-").replace("_", " ") in path
    root = tmp_path / data.origin.layout.partition(", in ")[2]
    again = load_dataset(name, root)  # the folder itself as the root, from which ids are relative
    assert listed(again) == listed(data)


@pytest.mark.parametrize("known", BENCHMARKS, ids=lambda b: b.name)
def test_nothing_found_says_where_it_looked_and_what_is_nearest(tmp_path, known):
    message = error_of(known.name, tmp_path)
    for layout in known.layouts:
        assert layout.shape in message and layout.name in message
        assert all(f"{tmp_path}/{place}" in message for place in layout.places)
    (tmp_path / known.layouts[0].places[0]).mkdir(parents=True)
    assert f"Nearest: {known.layouts[0].name} in {tmp_path}" in error_of(known.name, tmp_path)


def test_archives_are_named_with_the_command_that_unpacks_them(tmp_path):
    (tmp_path / "images of cub.tgz").touch()
    (tmp_path / "cars.zip").touch()
    for name in ("cub200", "folder", "imagenet1k", "cifar100"):
        message = error_of(name, tmp_path)
        assert f"tar -xf '{tmp_path}/images of cub.tgz' -C {tmp_path}" in message
        assert f"unzip -d {tmp_path} {tmp_path}/cars.zip" in message
        assert f"unzip -d {tmp_path} {tmp_path}/cars.zip" in error_of(name, tmp_path / "cars.zip")


def test_cub_needs_its_lists_to_agree(tmp_path):
    plant(tmp_path, cub())
    labels = tmp_path / "CUB_200_2011/image_class_labels.txt"
    labels.write_text(labels.read_text().replace("2 1\n", "2 2\n"))
    assert "images.txt, image 2: 001.Black_footed_Albatross has label 2 here, but 1 before" in error_of(
        "cub200", tmp_path
    )
    labels.write_text("1 1\n")
    assert "image 2: expected a class in image_class_labels.txt" in error_of("cub200", tmp_path)
    (tmp_path / "CUB_200_2011/train_test_split.txt").unlink()
    assert "which lacks train_test_split.txt" in error_of("cub200", tmp_path)


def test_counts_tell_the_official_cub_from_the_other_split():
    cub200 = next(b for b in BENCHMARKS if b.name == "cub200")
    assert "CMM" in cub200.comparable(200, 5994, 5794, "official").partition("not with")[0]
    assert "P&M" in cub200.comparable(200, 9430, 2358, "folders").partition("not with")[0]
    assert cub200.comparable(200, 5994, 5793, "official").startswith("no published result")
    assert "100 of 200 classes" in cub200.comparable(100, 5994, 5794, "official")


@pytest.mark.parametrize("known", BENCHMARKS, ids=lambda b: b.name)
def test_published_counts_are_said_only_for_the_split_they_belong_to(known):
    for p in known.published:
        kinds = p.kinds or ("official", "folders")
        assert all(known.comparable(known.classes, p.train, p.test, k) for k in kinds)
        assert known.comparable(known.classes, p.train, p.test, kinds[0]) == p.who
        if p.kinds:
            assert known.comparable(known.classes, p.train, p.test, "hash").startswith("no published")


def test_official_cars(tmp_path):
    data = load_dataset("cars", cars(tmp_path))
    assert data.class_names == MODELS and "official" in data.origin.layout and len(data.templates) == 8
    train = {image: name for image, name, _ in listed(data)[0]}
    assert train["cars_train/00003.jpg"] == "Ram C/V Cargo Van Minivan 2012" and len(train) == len(data.test) == 6
    (tmp_path / "stanford_cars/cars_test/00002.jpg").unlink()
    assert "cars_test/00002.jpg does not exist" in error_of("cars", tmp_path)
    (tmp_path / "stanford_cars/devkit/cars_meta.mat").write_bytes(b"no mat")
    assert "cars_meta.mat cannot be read" in error_of("cars", tmp_path)


@pytest.mark.parametrize("slash", ["-", "_", " ", "", "/"])
def test_the_car_with_a_slash_in_its_name(tmp_path, slash):
    plant(tmp_path, both("{part}/{}", [f"Ram C{slash}V Cargo Van Minivan 2012", MODELS[0]]))
    data = load_dataset("cars", tmp_path)
    assert data.class_names == (MODELS[0], MODELS[2])


def test_a_domain_that_lacks_a_class_shifts_no_label(tmp_path):
    data = load_dataset("domainnet", plant(tmp_path, domainnet()))
    assert any("quickdraw has no training image of 1 class: airplane" in note for note in data.notes)
    assert data.class_names[data.train.labels[data.train.domains == 3].min()] == "The Eiffel Tower"
    assert data.keys == ("airplane", "The_Eiffel_Tower", "train")  # the order of the lists' labels
    scenario = build_scenario(data, "dil", None, "natural")
    assert [len(task.train) for task in scenario.tasks] == [6, 6, 6, 4, 6, 6]


@pytest.mark.parametrize("known", [b for b in BENCHMARKS if b.domains], ids=lambda b: b.name)
def test_ways_to_write_a_domain(known):
    for domain in known.domains:
        ways = {
            domain.lower(),
            domain.upper(),
            domain.replace(" ", "_"),
            domain.replace(" ", ""),
            domain.replace("_", "-"),
        }
        assert {usual_domain(way, known.domains) for way in ways} == {domain}
    assert usual_domain("images", known.domains) is usual_domain("", known.domains) is None


@pytest.mark.parametrize("name, layout", TREES, ids=str)
def test_a_part_of_the_data_says_so(tmp_path, name, layout):
    """--top-classes and --validation change what results are comparable; labels, keys and names still belong together."""
    data = load_dataset(name, plant(tmp_path, TREES[name, layout][0]))
    held = data.held_out(0.5)
    assert held.origin.comparable.startswith("none, since") and data.origin.comparable in held.origin.comparable
    top = data.most_populous(1)
    assert top.keys == (data.keys[data.class_names.index(top.class_names[0])],)
    assert top.origin.comparable.startswith("results on the same 1 class only") and not top.test.labels.any()


def test_domains_that_are_not_on_disk_are_left_out_of_the_lists(tmp_path):
    tree = {path: text for path, text in domainnet().items() if not path.startswith("domainnet/real/")}
    data = load_dataset("domainnet", plant(tmp_path, tree))
    assert "real" not in data.domain_names and any(note.startswith("only 5 of the 6 domains") for note in data.notes)


def test_the_fifteen_renditions_are_the_domains(tmp_path):
    data = load_dataset("imagenet-r", plant(tmp_path, both("imagenet-r/{part}/{}", WNIDS, names=RENDITIONS)))
    assert all(domain in image for image, _, domain in listed(data)[0])
    assert [task.name for task in build_scenario(data, "dil", None, "natural").tasks] == list(data.domain_names)
    plant(tmp_path, {f"imagenet-r/train/{WNIDS[0]}/photo_1.jpg": None})
    data = load_dataset("imagenet-r", tmp_path)
    assert data.domain_names == ("imagenet-r",) and any("photo_1.jpg is not named after" in n for n in data.notes)


def test_all_folders_of_the_readme_become_wnids(tmp_path):
    """MagMax's conversion renames all 200 folders after the README; where it is gone, WordNet's own words do."""
    wnids = wordnet.subset("imagenet_r")
    names = {wnid: f"name_{i}" for i, wnid in enumerate(wnids)}
    plant(tmp_path / "a", both("imagenet-r/{part}/{}", names.values(), names=["art_0.jpg"]))
    assert any("neither wnids nor names" in n for n in load_dataset("imagenet-r", tmp_path / "a").notes)
    readme = "ImageNet-R(endition)\n\n" + "".join(f"{wnid} {name}\n" for wnid, name in names.items())
    plant(tmp_path / "a", {"imagenet-r/README.txt": readme})
    assert load_dataset("imagenet-r", tmp_path / "a").keys == tuple(wnids)
    lemmas = wordnet.lemmas()
    words = {wnid: lemmas[wnid][0].replace(" ", "_") for wnid in wnids if wnid != "n03495258"}  # there are two harps
    plant(tmp_path / "b", both("imagenet-r/{part}/{}", words.values(), names=["art_0.jpg"]))
    assert load_dataset("imagenet-r", tmp_path / "b").keys == tuple(words)


def test_own_split_depends_on_names_only_and_is_stratified(tmp_path):
    classes = {w: [f"misc_{k}.jpg" for k in range(n)] for w, n in zip(WNIDS, (10, 5, 1), strict=True)}
    for w, names in classes.items():
        plant(tmp_path / "here", images(f"imagenet-r/{w}", names=names))
        plant(tmp_path / "there/imagenet-rendition", images(f"imagenet-r/{w}", names=reversed(names)))
    here, there = (load_dataset("imagenet-r", tmp_path / place) for place in ("here", "there"))
    assert listed(here) == listed(there) and np.bincount(here.test.labels).tolist() == [2, 1]
    digest = here.origin.split.partition("digest ")[2][:12]
    assert len(digest) == 12 and digest in there.origin.split
    assert digest in build_scenario(here, "cil", 1).manifest()["origin"]["split"]
    plant(tmp_path / "here", images(f"imagenet-r/{WNIDS[0]}", names=[f"misc_{k}.jpg" for k in range(10, 20)]))
    more = load_dataset("imagenet-r", tmp_path / "here")
    assert digest not in more.origin.split and "no published result" in more.origin.comparable


def test_own_split_of_domains_is_by_domain_and_class(tmp_path):
    tree = images(
        *(f"{d}/images/{c}" for d in ("amazon", "dslr") for c in ("bike", "mug")), names=[f"{k}.jpg" for k in range(10)]
    )
    data = load_dataset("office31", plant(tmp_path, tree))
    assert np.bincount(data.test.labels * 2 + data.test.domains).tolist() == [2, 2, 2, 2]


def test_own_split_leaves_no_domain_without_test_images(tmp_path):
    """Of 10 renditions in each of 3 classes, 6 images are for testing, so renditions are left; each gets one image."""
    plant(
        tmp_path,
        images(*(f"imagenet-r/{w}" for w in WNIDS[:3]), names=[f"{r}_1.jpg" for r in imagenet_r.RENDITIONS[:10]]),
    )
    data = load_dataset("imagenet-r", tmp_path)
    tests, trains = (np.bincount(s.domains, minlength=len(data.domain_names)) for s in (data.test, data.train))
    assert len(data.domain_names) == 10 and tests.min() >= 1 and trains.min() >= 1
    assert np.bincount(data.train.labels).min() >= 1
    assert len(build_scenario(data, "dil", None).tasks) == 10


def test_own_split_takes_for_a_domain_what_class_and_domain_can_spare():
    def folders(*of):
        return [ClassFolder(domain, name, f"{domain}/{name}", [f"{k}.jpg" for k in range(n)]) for domain, name, n in of]

    def counts(part):
        return {(f.domain, f.name): len(f.images) for f in part}

    spare = folders(("a", "bee", 5), ("b", "bee", 1), ("b", "cat", 1), ("a", "cat", 5))
    train, test = map(counts, by_hash(spare))
    assert sum(test.values()) == 3 and sum(train.values()) == 9
    assert {d for d, _ in test} == {d for d, _ in train} == {"a", "b"}
    only = folders(
        ("a", "bee", 5), ("b", "cat", 1), ("b", "dog", 1), ("c", "bee", 1)
    )  # the only cat, dog and image of c
    assert counts(by_hash(only)[1]) == {("a", "bee"): 1}


def test_own_split_of_one_domain_is_what_it_was():
    """The digest was written down before domains without test images were thought of."""
    classes = [ClassFolder("", f"class {c}", f"class {c}", [f"{k}.jpg" for k in range(c + 1)]) for c in range(12)]
    assert digest(by_hash(classes)[1]) == "79fb1ce382cc"
    domains = [folder._replace(domain=domain) for folder in classes for domain in ("real", "sketch")]
    assert digest(by_hash(domains)[1]) == "5a643a17d53b"


CHOSEN = {"train": [f"{w}/{r}" for w in WNIDS for r in RENDITIONS[:3]], "test": [f"{w}/{RENDITIONS[3]}" for w in WNIDS]}


def write_list(folder, form: str):
    """`CHOSEN` in one of the published forms; returns what is given as --split-file."""
    folder.mkdir()
    if form == "JSON":
        (folder / "s.json").write_text(json.dumps(CHOSEN))
        return folder / "s.json"
    if form == "lines":
        (folder / "s.txt").write_text("".join(f"{part} {path}\n" for part, paths in CHOSEN.items() for path in paths))
        return folder / "s.txt"
    if form == "text with sections":  # RAPF, with its stray line
        text = "train\n" + "\n".join(CHOSEN["train"]) + "\nn02437616/test_img_R.py\ntest\n" + "\n".join(CHOSEN["test"])
        (folder / "imgr_train_test_split.txt").write_text(text)
        return folder / "imgr_train_test_split.txt"
    if form == "CoOp JSON":
        both = {part: [[p, WNIDS.index(p[:9]), p[:9]] for p in paths] for part, paths in CHOSEN.items()}
        (folder / "split_zhou.json").write_text(json.dumps(both | {"val": [["n01443537/videogame_12.jpg", 0, "x"]]}))
        return folder / "split_zhou.json"
    for part, paths in CHOSEN.items():
        prefixed = [f"data/imagenet-r/{'test' if k % 2 else 'train'}/{path}" for k, path in enumerate(paths)]
        labels = [2 - WNIDS.index(path[:9]) for path in paths]  # another order than that of the wnids
        if form == "YAML lists":  # CODA-Prompt; the prefix says another part than the list
            lines = ["data:", *(f"- {p}" for p in prefixed), "targets:", *(f"- {k}" for k in labels)]
            (folder / f"imagenet-r_{part}.yaml").write_text("\n".join(lines))
        else:
            (folder / f"imagenet-r_{part}.txt").write_text(
                "".join(f"{p} {k}\n" for p, k in zip(prefixed, labels, strict=True))
            )
    return folder / f"imagenet-r_train.{'yaml' if form == 'YAML lists' else 'txt'}"


FORMS = ("JSON", "lines", "text with sections", "CoOp JSON", "YAML lists", "path label lists")


@pytest.mark.parametrize("copy", ["official", "LAMDA zip", "MagMax's and CMM's conversion"])
@pytest.mark.parametrize("form", FORMS)
def test_a_published_list_divides_any_copy(tmp_path, form, copy):
    """CoOp's, CODA-Prompt's, RAPF's ... list on a copy whose folders, parts and prefix differ from the list's."""
    tree = TREES["imagenet-r", copy][0]
    if copy != "official":  # no image may be in two parts
        tree = {path: None for path in tree if ("train" in path) == (RENDITIONS.index(path.rpartition("/")[2]) != 1)}
    plant(tmp_path / "data", tree)
    data = load_dataset("imagenet-r", tmp_path / "data", split_file=str(write_list(tmp_path / "list", form)))
    names = {w: name for w, name in wordnet.class_names().items() if w in WNIDS}
    found = [{(name, image.rpartition("/")[2]) for image, name, _ in part} for part in listed(data)]
    assert found == [{(names[p[:9]], p[10:]) for p in CHOSEN[part]} for part in ("train", "test")]
    turned = form in ("YAML lists", "path label lists")  # the natural order is that of the list's labels
    assert data.keys == (WNIDS[::-1] if turned else WNIDS)
    assert (form if form != "lines" else "text") in data.origin.split
    assert any("left out, such as n02437616/test_img_R.py" in n for n in data.notes) == (form == "text with sections")
    assert any("3 images of val are left out" in n or "1 image of val is left out" in n for n in data.notes) == (
        form == "CoOp JSON"
    )


@pytest.mark.parametrize("name, layout", [key for key in TREES if key[0] in ("cub200", "domainnet", "pacs")], ids=str)
def test_the_numbered_files_and_folders_of_lists_as_split_files(tmp_path, name, layout):
    source = {"cub200": cub, "domainnet": domainnet, "pacs": pacs}[name]()
    plant(tmp_path / "lists", {path: text for path, text in source.items() if text is not None})
    images_of = {"cub200": "CUB_200_2011/images", "domainnet": "domainnet", "pacs": "PACS/kfold"}[name]
    alone = {path: None for path in source if path.startswith(images_of) and path.endswith("jpg")}
    plant(tmp_path / "data", alone)
    lists = tmp_path / "lists" / images_of.split("/")[0]
    data = load_dataset("folder", tmp_path / "data", split_file=str(lists))
    official = load_dataset(name, plant(tmp_path / "official", source))
    ends = [[[("/".join(i.split("/")[-3:]), c) for i, c, _ in part] for part in listed(d)] for d in (data, official)]
    short = [[[(i.split("/")[-2:], c) for i, c in part] for part in d] for d in ends]
    assert short[0] == short[1] and data.class_names == official.class_names


def test_the_only_test_part_of_a_layout_may_be_named(tmp_path):
    root = plant(tmp_path, TREES["tiny-imagenet", "official"][0])
    named = load_dataset("tiny-imagenet", root, test_part="val")
    assert named.test.ids == load_dataset("tiny-imagenet", root).test.ids
    assert "is tested on its val images only" in error_of("tiny-imagenet", root, test_part="test")


@pytest.mark.parametrize("slash", ["/", "//", "/."])
def test_a_slash_behind_the_root_finds_nothing_more(tmp_path, slash):
    plant(tmp_path, TREES["imagenet-r", "LAMDA zip"][0])
    root = tmp_path / "imagenet-r"
    assert load_dataset("imagenet-r", f"{root}{slash}").notes == load_dataset("imagenet-r", root).notes


def test_the_header_names_the_folder_that_is_tested_on(tmp_path):
    key = "cub200", "MagMax's and CMM's conversion"
    assert load_dataset("cub200", plant(tmp_path, TREES[key][0])).origin.split == "the train and val folders"


def test_a_root_inside_the_data_set(tmp_path):
    plant(tmp_path, TREES["pacs", "official"][0])
    pacs = next(path.parent for path in tmp_path.rglob("photo_train_kfold.txt"))
    notes = load_dataset("pacs", pacs / "kfold").notes  # without its lists
    assert f"also found, and not used: official in {pacs}; --data-root with that folder uses it" in notes
    assert f"It is in a folder above: --data-root {pacs} (official)" in error_of("pacs", pacs / "kfold" / "photo")


def test_test_part(tmp_path):
    plant(tmp_path, both("{part}/{}", BIRDS) | images(*(f"val/{b}" for b in BIRDS), names=["9.jpg"]))
    assert len(load_dataset("cub200", tmp_path).test) == 6
    assert load_dataset("cub200", tmp_path, test_part="val").test.ids == [
        "val/001.Black_footed_Albatross/9.jpg",
        "val/002.Laysan_Albatross/9.jpg",
    ]
    assert "has no such folder for testing. It has: test, val" in error_of("cub200", tmp_path, test_part="valid")
    assert "not divided" in error_of(
        "imagenet-r", plant(tmp_path / "r", TREES["imagenet-r", "official"][0]), test_part="val"
    )
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"train": ["a/0.jpg"], "val": ["a/1.jpg"], "test": ["a/2.jpg"]}))
    plant(tmp_path / "f", images("a"))
    for part, image in (("val", "a/1.jpg"), (None, "a/2.jpg")):
        assert load_dataset("folder", tmp_path / "f", split_file=str(file), test_part=part).test.ids == [image]
    assert "has no such part. It has: test, val" in error_of(
        "folder", tmp_path / "f", split_file=str(file), test_part="valid"
    )


def in_capitals(name, root):
    """Rename whatever the layout needs, without wildcards, to capitals; return whether there is anything."""
    known = next(b for b in BENCHMARKS if b.name == name)
    found, _ = known.find(str(root))
    needs = [one for need in found.layout.needs for one in need.split("|") if not re.search(r"[*?\[]", one)]
    for parts in sorted((need.lower().split("/") for need in needs), key=len, reverse=True):
        for depth in range(len(parts), 0, -1):
            for path in [p for p in Path(found.base).rglob("*") if len(p.relative_to(found.base).parts) == depth]:
                if [part.lower() for part in path.relative_to(found.base).parts] == parts[:depth]:
                    path.rename(path.with_name(path.name.upper()))
    return bool(needs)


@pytest.mark.parametrize("name, layout", [*TREES, *((name, "") for name in SUITE), ("cars", "official")], ids=str)
def test_a_layout_is_read_whatever_its_case(tmp_path, name, layout):
    if name in SUITE:
        suite.TREES[name](tmp_path)
    elif (name, layout) in SLOWLY_MADE:
        pytest.importorskip("scipy")
        cars(tmp_path)
    else:
        plant(tmp_path, TREES[name, layout][0])
    before = load_dataset(name, tmp_path)
    if not in_capitals(name, tmp_path):
        return
    after = load_dataset(name, tmp_path)
    assert {image.lower() for image in before.train.ids + before.test.ids} == {
        image.lower() for image in after.train.ids + after.test.ids
    }
    assert len(before.train) == len(after.train)
    assert {key.lower() for key in before.keys} == {key.lower() for key in after.keys}


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a"])
def test_folders_beside_the_wnids_are_ignored(tmp_path, name):
    plant(tmp_path, TREES[name, "official"][0])
    usual = listed(load_dataset(name, tmp_path))
    plant(tmp_path / name, {"lists/train.txt": "", "__MACOSX/._x": "", "samples/deep/0.jpg": None})
    assert listed(load_dataset(name, tmp_path)) == usual


@pytest.mark.parametrize("name, layout", TREES, ids=str)
def test_a_part_for_testing_of_any_name(tmp_path, name, layout):
    plant(tmp_path, TREES[name, layout][0])
    usual = load_dataset(name, tmp_path)
    if not usual.origin.split.endswith("folders"):  # other layouts have no such part
        return
    named = usual.origin.split.split()[-2]
    for part in [path for path in tmp_path.rglob("*") if path.name == named]:
        part.rename(part.with_name("test_small"))
        plant(part, images("any"))
    data = load_dataset(name, tmp_path, test_part="Test_Small")
    assert data.test.ids == [re.sub(f"(^|/){named}/", r"\1test_small/", image) for image in usual.test.ids]
    assert data.origin.split == "the train and test_small folders"


def test_a_list_that_names_the_part_tells_files_of_the_same_name_apart(tmp_path):
    plant(tmp_path / "data", both("{part}/{}", ["a"], names=["0.jpg"]))
    (tmp_path / "s.txt").write_text("train old/place/test/a/0.jpg\ntest old/place/train/a/0.jpg\n")
    data = load_dataset("folder", tmp_path / "data", split_file=str(tmp_path / "s.txt"))
    assert (data.train.ids, data.test.ids) == (["test/a/0.jpg"], ["train/a/0.jpg"])


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda y: y.replace("sketch_0.jpg", "sketch_9.jpg", 1),
            ["data[2]", "does not exist", "a prefix does not matter"],
        ),
        (lambda y: y.replace("targets:\n- 2", "targets:\n- 1"), ["is n01443537", "Correct the list"]),
        (lambda y: y.replace("targets:\n- 2\n", "targets:\n"), ["9 paths in data and 8 labels"]),
        (lambda y: "data: [", ["is not YAML"]),
        (lambda y: y.replace("art_1", "art_0", 1), ["data[1]", "twice"]),
    ],
)
def test_damaged_lists(tmp_path, change, says):
    plant(tmp_path / "data", TREES["imagenet-r", "official"][0])
    file = write_list(tmp_path / "list", "YAML lists")
    file.write_text(change(file.read_text()))
    message = error_of("imagenet-r", tmp_path / "data", split_file=str(file))
    assert all(part in message for part in [str(file), *says]), message


def test_a_list_without_its_other_part(tmp_path):
    plant(tmp_path / "data", TREES["imagenet-r", "official"][0])
    file = write_list(tmp_path / "list", "YAML lists")
    (tmp_path / "list/imagenet-r_test.yaml").unlink()
    assert "no image for test" in error_of("imagenet-r", tmp_path / "data", split_file=str(file))
    os.rename(file, tmp_path / "list/mine.yaml")
    assert "does not say train or test" in error_of(
        "imagenet-r", tmp_path / "data", split_file=str(tmp_path / "list/mine.yaml")
    )
    assert "folder without lists" in error_of("imagenet-r", tmp_path / "data", split_file=str(tmp_path))


# How `--dataset folder` tells each layout: by an error, or, where it can read the tree, by a note
@pytest.mark.parametrize("name, layout", TREES, ids=str)
def test_folder_names_the_flag(tmp_path, name, layout):
    root = plant(tmp_path, TREES[name, layout][0])
    base = load_dataset(name, root).origin.layout.partition(", in ")[2]
    try:
        told = " ".join(load_dataset("folder", base).notes)
    except UserError as error:
        told = str(error)
        assert f"--dataset {name} --data-root {base} reads it" in error_of("folder", root)
    generic = ("MagMax's and CMM's conversion", "copy by class")  # `images_train_test` and the like say nothing
    assert f"--dataset {name} reads it" in told or layout in generic


def test_the_200_wnids_of_a_set_are_known_whatever_the_folder_is_called(tmp_path):
    for name, synsets in (("imagenet-r", "imagenet_r"), ("imagenet-a", "imagenet_a")):
        root = plant(tmp_path / f"set{name[-1]}", both("{part}/{}", wordnet.subset(synsets), names=["misc_0.jpg"]))
        assert any(f"--dataset {name} reads it" in note for note in load_dataset("folder", root).notes)


@pytest.mark.parametrize(
    "name, place",
    [("cifar100", "cifar-100-python"), ("cifar10", "cifar-10-batches-py"), ("imagenet1k", "ilsvrc/Data/CLS-LOC")],
)
def test_data_sets_that_are_no_benchmark_here_are_known_too(tmp_path, name, place):
    (tmp_path / place).mkdir(parents=True)
    assert f"--dataset {name} reads it" in error_of("folder", tmp_path)


def test_a_thousand_wnids_are_imagenet(tmp_path):
    root = plant(tmp_path, both("{part}/{}", wordnet.class_names(), "val", names=["0.JPEG"]))
    assert any("--dataset imagenet1k reads it" in note for note in load_dataset("folder", root).notes)


def test_images_are_read(tmp_path):
    root = write_tree(tmp_path, *(f"{d}/images/mug" for d in ("amazon", "dslr", "webcam")), images=3, suffix=".jpg")
    data = load_dataset("office31", root)
    pixels, good = data.train.read(np.arange(len(data.train)), 8, torch.device("cpu"))
    assert pixels.shape == (6, 3, 8, 8) and good.all() and len(data.train.contents()) == 64


def test_imagenet_is_found_whatever_the_case_of_its_folders(tmp_path):
    plant(tmp_path, both("ilsvrc/DATA/cls-loc/{part}/{}", WNIDS, "val"))
    assert len(load_dataset("imagenet1k", tmp_path).test) == 9
