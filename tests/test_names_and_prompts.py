"""Class names, prompt templates, and trees that are not as one would wish. Oracle: names that the tests plant.

pytest tests/test_names_and_prompts.py
"""

from __future__ import annotations

import json
import os
import sys

import open_clip
import pytest
import torch
from image_trees import image_folder
from published_trees import BIRDS, TREES, WNIDS, both, images, plant

from fastmerge.__main__ import main
from fastmerge.data import load_dataset
from fastmerge.data.class_names import readable
from fastmerge.data.recognise import BENCHMARKS
from fastmerge.data.scenario import build_scenario
from fastmerge.errors import UserError
from fastmerge.models.text_embeddings import text_weights
from fastmerge.report import results_rows


def error_of(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "folders, names",
    [
        (BIRDS, ("Black footed Albatross", "Laysan Albatross")),
        (("001.a", "2nd"), ("001.a", "2nd")),  # a prefix only where all have it
        (("0.5", "1.5"), ("0.5", "1.5")),  # numbers are names
        (("back_pack", "T-Shirt"), ("T-Shirt", "back pack")),
        (WNIDS, ("goldfish", "great white shark", "flamingo")),
        (("n01443537", "zebra"), ("n01443537", "zebra")),
        (("2012 Acura_RL", "AM 2000"), ("2012 Acura RL", "AM 2000")),
    ],
)
def test_names_of_folders(tmp_path, folders, names):
    data = load_dataset("folder", plant(tmp_path, both("{part}/{}", folders)))
    assert data.class_names == names and data.keys == tuple(sorted(folders))


class Remembering:
    """A text tower that keeps its prompts."""

    def encode(self, prompts, **options):
        self.prompts = list(prompts)
        return torch.ones(len(prompts), 4)


TEMPLATES = [
    ("openai80", [t("x") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]),
    ("simple7", [t("x") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES]),
    ("an origami {}", ["an origami x"]),
    ("a {photo} of {} {", ["a {photo} of x {"]),  # braces are text
    ("FILE", ["a photo of a x.", "art of x"]),
    ("LIST", ["a photo of a x.", "art of x"]),
]


@pytest.mark.parametrize("name", ["glyphs", "folder"])
@pytest.mark.parametrize("spec, prompts", TEMPLATES)
def test_template(tmp_path, name, spec, prompts):
    (tmp_path / "FILE").write_text("a photo of a {}.\n\n'art of {}',\n")
    (tmp_path / "LIST").write_text(json.dumps(["a photo of a {}.", "art of {}"]))
    root = plant(tmp_path / "data", both("{part}/{}", ["a"])) if name == "folder" else None
    spec = str(tmp_path / spec) if spec in ("FILE", "LIST") else spec
    encoder = Remembering()
    text_weights(encoder, ["x"], load_dataset(name, root, template=spec).templates, str(tmp_path))
    assert encoder.prompts == prompts


@pytest.mark.parametrize(
    "spec, says",
    [
        ("openai8", ["one {}", "Did you mean: openai80"]),
        ("a {} and a {}", ["one {}"]),
        ("EMPTY", ["has no template"]),
        ("BAD", ["template 2, 'no place'", "exactly one {}"]),
        ("BROKEN", ["cannot read it"]),
    ],
)
def test_bad_templates(tmp_path, spec, says):
    for file, text in {"EMPTY": "\n", "BAD": "a {}\nno place\n", "BROKEN": "[1,"}.items():
        (tmp_path / file).write_text(text)
    message = error_of("glyphs", template=str(tmp_path / spec) if spec.isupper() else spec)
    assert all(part in message for part in [f"--template {tmp_path / spec if spec.isupper() else spec}", *says])


@pytest.mark.parametrize(
    "known", [b for b in BENCHMARKS if b.name in {name for name, _ in TREES}], ids=lambda b: b.name
)
def test_templates_of_the_data_sets(tmp_path, known):
    tree = next(tree for (name, _), (tree, *_) in TREES.items() if name == known.name)
    templates = load_dataset(known.name, plant(tmp_path, tree)).templates
    assert len(templates) == {"imagenet-r": 80, "cub200": 80, "domainnet": 80, "tiny-imagenet": 80, "cars": 8}.get(
        known.name, 1
    )
    assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize(
    "text",
    [
        "gold\nshark\npink bird\n",
        json.dumps(["gold", "shark", "pink bird"]),
        json.dumps({"n02007558": "pink bird", "n01443537": "gold", "n01484850": "shark"}),
        "ImageNet-R\n\nn02007558 pink_bird\nn01443537 gold\nn01484850 shark\nn99999999 other\n",  # the README's form
        "n02007558\tpink bird\nn01443537\tgold\tfish\nn01484850\tshark\n",  # Tiny-ImageNet's words.txt
        "1 001.gold\n2 002.shark\n3 003.pink_bird\n",  # CUB's classes.txt
    ],
)
def test_class_names_file(tmp_path, text):
    (tmp_path / "names").write_text(text)
    root = plant(tmp_path / "data", both("{part}/{}", WNIDS))
    data = load_dataset("folder", root, class_names=str(tmp_path / "names"))
    assert data.class_names[1:] == ("shark", "pink bird") and data.class_names[0].startswith("gold")


@pytest.mark.parametrize(
    "text, says",
    [
        ("gold\nshark\n", "2 names for 3 classes"),
        ("gold\nshark\ngold\n", "'gold' is the name of several classes"),
        ("n01443537 gold\n", "2 of 3 classes without a name in it, such as 'great white shark'"),
        ('["gold", "shark", 3]', "3 is not a name"),
        ("[1", "cannot read it"),
    ],
)
def test_bad_class_names(tmp_path, text, says):
    (tmp_path / "names").write_text(text)
    root = plant(tmp_path / "data", both("{part}/{}", WNIDS))
    message = error_of("folder", root, class_names=str(tmp_path / "names"))
    assert says in message and f"--class-names {tmp_path}/names" in message


def test_zero_shot_under_its_prompt_is_continual_clip():
    zero_shot = dict.fromkeys(("final_accuracy", "aaa"), 50.0)
    for templates, name in (
        (["a good photo of a {}."], "zero-shot (Continual-CLIP)"),
        (["a bad photo of a {}."], "zero-shot (Continual-CLIP)"),
        (["a photo of a {}."], "zero-shot"),
        (None, "zero-shot"),  # of an older version
    ):
        assert results_rows({}, zero_shot | {"templates": templates})[1][0] == name


def test_a_run_says_what_it_found_and_names_what_it_compares_with(tmp_path, capsys):
    """Header, manifest, and row of a whole run; then the same names in `fastmerge evaluate`."""
    root, run = tmp_path / "office31", tmp_path / "run"
    for domain in ("amazon", "dslr", "webcam"):
        image_folder(tmp_path / "made" / domain, classes=2, train=5, test=1)
        (root / domain).mkdir(parents=True)
        os.rename(tmp_path / "made" / domain / "train", root / domain / "images")
    (tmp_path / "names.txt").write_text("a big dot\na small dot\n")
    flags = f"--dataset office31 --data-root {tmp_path} --class-names {tmp_path}/names.txt --model tiny --scenario dil"
    flags += f" --method finetune --epochs 1 --no-nearest-mean --device cpu --batch-size 8 --run-dir {run}"
    assert main([*flags.split(), "--template", "a good photo of a {}."]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"layout: official, in {root}" in shown and "split: our own, 20 %" in shown
    assert "comparable with: no published result" in shown and "zero-shot (Continual-CLIP)" in shown
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["origin"]["split"] in shown and manifest["tasks"][0]["classes"] == ["a big dot", "a small dot"]
    assert main(["evaluate", str(run / "finetune-seed0"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["per_class"]) == {"a big dot", "a small dot"}
    again = [*flags.split(), "--template", "a photo of a {}."]  # other prompts, other numbers: not the same run
    assert main(again) == 2 and "class names: " in capsys.readouterr().err


# awkward truths


@pytest.mark.parametrize("unlabelled", ["test", "test/images"])
def test_an_unlabelled_test_part_gives_way_to_a_labelled_one(tmp_path, unlabelled):
    for part in ("val", "valid", "validation"):
        root = plant(tmp_path / part, images("train/ant", f"{part}/ant", unlabelled))
        data = load_dataset("folder", root)
        assert data.test.ids[0] == f"{part}/ant/0.jpg" and len(data.notes) == 1
        assert f"{root}/{part} is used for testing: the images of test are in no class folders" in data.notes[0]
    assert "images are in no class folder" in error_of("folder", plant(tmp_path / "x", images("train/ant", unlabelled)))
    assert "no class folder" in error_of("folder", tmp_path / "val", test_part="test")


def test_several_labelled_test_parts(tmp_path):
    root = plant(tmp_path, images("train/ant", "test/ant", "val/ant", "Validation/ant"))
    data = load_dataset("folder", root)
    assert data.test.ids[0] == "test/ant/0.jpg" and "--test-part val uses it" in data.notes[0]
    assert load_dataset("folder", root, test_part="validation").test.ids[0] == "Validation/ant/0.jpg"


def test_a_folder_images_inside_classes_or_domains(tmp_path):
    root = plant(tmp_path / "a", both("{part}/{}/images", ["ant", "bee"]))
    data = load_dataset("folder", root)
    assert data.class_names == ("ant", "bee") and data.train.ids[0] == "train/ant/images/0.jpg"
    data = load_dataset("folder", plant(tmp_path / "b", both("{part}/{}/images/ant", ["photo", "sketch"])))
    assert data.class_names == ("ant",) and data.domain_names == ("photo", "sketch")


def test_wnids_are_never_domains(tmp_path):
    message = error_of("folder", plant(tmp_path, both("{part}/{}/boxes", WNIDS)))
    assert "empty class folder" in message and "but the folders boxes" in message


def test_a_domain_that_lacks_a_class_is_told(tmp_path):
    root = plant(tmp_path, both("{part}/{}/ant", ["photo", "sketch"]) | both("{part}/{}/bee", ["sketch"]))
    data = load_dataset("folder", root)
    assert data.class_names == ("ant", "bee") and data.train.labels.tolist() == [0] * 6 + [1] * 3
    plant(tmp_path, both("{part}/{}/cat", ["video"]))
    assert any("no class is in every domain" in note for note in load_dataset("folder", root).notes)


def test_names_that_differ_only_in_case(tmp_path):
    apart = load_dataset("folder", plant(tmp_path / "a", images("train/Bee", "test/bee")))
    assert apart.class_names == ("Bee",) and len(apart.test) == 3
    assert any("Bee and bee differ only in case and are one class" in note for note in apart.notes)
    domains = load_dataset("folder", plant(tmp_path / "b", both("{part}/{}", ["photo/Bee", "sketch/bee"])))
    assert domains.class_names == ("Bee",) and domains.train.domains.tolist() == [0, 0, 0, 1, 1, 1]
    if not os.path.exists(tmp_path / "a/TRAIN"):  # the file system tells them apart
        together = load_dataset("folder", plant(tmp_path / "c", both("{part}/{}", ["Bee", "bee"])))
        assert together.class_names == ("Bee", "bee")
        assert any("so they stay two classes" in note for note in together.notes)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 only")
def test_names_that_are_no_utf8(tmp_path, capsys):
    """A folder and files from an old file system: read, named, hashed, written into the results."""
    root = image_folder(tmp_path / "data", classes=2, train=2, test=1)
    for part in ("train", "test"):
        os.rename(os.path.join(root, part, "colour_0"), os.fsencode(root / part) + b"/caf\xe9_0")
        folder = os.fsencode(root / part) + b"/caf\xe9_0/"
        os.rename(folder + b"0.jpg", folder + b"\xfc.jpg")
    data = load_dataset("folder", root)
    assert data.class_names == ("café 0", "colour 1") and readable("plain") == "plain"
    build_scenario(data, "cil", 1).manifest()
    flags = f"--dataset folder --data-root {root} --model tiny --tasks 1 --method finetune --epochs 1 --no-nearest-mean"
    assert main([*flags.split(), "--device", "cpu", "--batch-size", "4", "--run-dir", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run/finetune-seed0"), "--out", str(tmp_path / "out")]) == 0
    assert b"caf\xe9_0/\xfc.jpg" in (tmp_path / "out/predictions.csv").read_bytes()
    listed = tmp_path / "split.txt"
    listed.write_bytes(b"train caf\xe9_0/1.jpg\ntest caf\xe9_0/\xfc.jpg\ntrain colour_1/0.jpg\n")
    data = load_dataset("folder", root / "train", split_file=str(listed))
    assert (len(data.train), len(data.test)) == (2, 1)


def test_classes_of_three_test_images_are_told(tmp_path):
    data = load_dataset("folder", plant(tmp_path, both("{part}/{}", ["ant", "bee"])))
    (warning,) = build_scenario(data, "cil", 1).manifest()["warnings"]
    assert "2 classes have fewer than 5 test images" in warning and "(micro)" in warning and "(macro)" in warning


@pytest.mark.parametrize("known", BENCHMARKS, ids=lambda b: b.name)
def test_every_data_set_in_folders_takes_the_options(known):
    message = error_of(known.name, "/nowhere", split_file="x", test_part="val", skip_bad_images=True)
    assert "/nowhere does not exist" in message and known.name in message
