"""Numbers, images and tasks that a run cannot use: what is said, and that nothing is written or lost."""

import re

import pytest
from test_cli import bad, image_folder, run, truncate

from fastmerge.config import declarations, flag_of
from fastmerge.declaration import FP32, Declaration
from fastmerge.errors import UserError
from fastmerge.flags import parse, settled
from fastmerge.report import header, single_class_warning
from fastmerge.setup import Setup

FLOATS = [
    (group, name)
    for group, settings in declarations().items()
    for name, (_, default) in settings.items()
    if isinstance(default, float)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "tree", classes=6, train=4, test=2)


def test_every_number_is_one_that_fp32_holds():
    for group, name in FLOATS:
        declaration: Declaration = declarations()[group][name][0]
        for value in (1e39, -1e39, 1e-39, float("inf"), float("nan")):
            with pytest.raises(UserError, match=f"--{flag_of(group, name)} "):
                declaration.check(f"--{flag_of(group, name)}", value)
    assert len(FLOATS) > 30 and FP32[0] < 1.2e-38 and 3.4e38 < FP32[1]


def test_the_command_line_makes_this_check():
    with pytest.raises(UserError, match=r"--cache-gb 1e\+308: fp32 holds"):
        parse(["--cache-gb", "1e308"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--method finetune pam --pam.rank 100000 --head linear", "--pam.rank 100000: .*at most 128"),
        ("--method finetune --lora-rank 129", "--lora-rank 129: .*at most 128"),
        ("--method finetune trm --trm.layer-b 99", "--trm.layer-b 99: tiny has 4 layers; expected 1 to 4"),
        ("--method finetune trm:layer_b=99", "--trm.layer-b 99"),
        ("--method finetune trm --model test_efficientnet --pretrained none", "no class token.*--trm.lambda1 0"),
        ("--method finetune --lora-rank 2 --model test_efficientnet --pretrained none", "no key or value projection"),
        ("--head text --method finetune coop --coop.tokens 99", "--coop.tokens: 99 context vectors .* has room for"),
        ("--head text --method finetune vpt:tokens=99", "--vpt.tokens: 99 context vectors"),
        ("--head text --method finetune maple:tokens=99", "--maple.tokens: 99 context vectors"),
        ("--head text --method finetune attriclip:tokens=33,top=3", "--attriclip.tokens: 99 context vectors"),
    ],
)
def test_what_the_model_cannot_serve_is_said_before_anything_is_trained(capsys, data, tmp_path, flags, says):
    text = bad(capsys, "--dataset", "folder", "--data-root", data, "--run-dir", tmp_path / "r", *flags.split())

    assert re.search(says, text) and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ("3e38", "phase merge: the model has values that are not finite (learner.theta"),
        ("1e30", "the logits of 4 test images are not finite"),
    ],
)
def test_a_model_that_is_not_finite_fails(capsys, data, tmp_path, scale, says):
    flags = ("--dataset", "folder", "--data-root", data, "--run-dir", tmp_path / "r", "--lr", "4")
    flags += ("--method", "task-arithmetic", "--protocol", "full", "--task-arithmetic.scale", scale)
    text = bad(capsys, *flags)
    assert says in text, text
    assert not list((tmp_path / "r").rglob("result*.json"))


def test_skipped_images_are_counted_and_a_lost_class_is_a_warning(capsys, tmp_path):
    root = image_folder(tmp_path / "tree", classes=4, train=2, test=2)
    for path in [*sorted((root / "train" / "colour_1").iterdir()), next((root / "test" / "colour_3").iterdir())]:
        truncate(path)
    flags = ("--dataset", "folder", "--data-root", root, "--method", "finetune", "nearest-mean", "--head", "prototype")
    flags += ("--class-order", "natural", "--skip-bad-images", "--run-dir", tmp_path / "r")
    assert run(*flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "task 1: 2 of 4 training images cannot be read and are left out" in out
    assert "no training image is left of class colour 1, so the model cannot learn it" in out
    assert "task 2: 1 of 4 test images cannot be read and is left out" in out
    rows = [line.split("|") for line in (tmp_path / "r" / "results.md").read_text().splitlines()]
    assert {row[1].strip(): row[-2].strip() for row in rows if "-" * 3 not in row[1]} == {
        "method": "skipped images", "finetune": "3", "nearest-mean": "3",
    }  # fmt: skip
    for path in (root / "train" / "colour_0").iterdir():
        truncate(path)
    assert "none of 4 images can be read" in bad(capsys, *flags[:-1], tmp_path / "s")


@pytest.mark.parametrize(("classes", "tasks"), [(1, 1), (3, 1), (8, 4), (19, 9), (20, 10), (21, 10)])
def test_default_number_of_tasks(classes, tasks):
    assert parse(["--dataset", "folder"]).scenario.tasks is None
    assert settled(parse(["--dataset", "folder"]), classes).scenario.tasks == tasks
    assert settled(parse(["--dataset", "folder", "--tasks", "7"]), classes).scenario.tasks == 7
    assert settled(parse(["--scenario", "dil"]), classes).scenario.tasks is None
    assert settled(parse([]), 50).scenario.tasks == 5


def test_the_header_says_fewer_tasks_and_warns_of_single_classes(data):
    flags = ["--dataset", "folder", "--data-root", str(data), "--model", "tiny", "--head", "linear"]
    setup = Setup(parse(flags))
    said = header(setup, setup.scenario.manifest(), "r")
    assert "3 tasks (10 by default, fewer for so few classes) with 3 x 2 classes" in said[1]
    assert setup.config.scenario.tasks == 3 and single_class_warning(setup.scenario.tasks) is None
    setup = Setup(parse([*flags, "--tasks", "4"]))
    assert "4 tasks with 2 x 2, 2 x 1 classes" in header(setup, setup.scenario.manifest(), "r")[1]
    warning = single_class_warning(setup.scenario.tasks * 2)
    assert warning.startswith("task 3, task 4: a single class. The loss is over the classes of the task alone")
    assert single_class_warning(setup.scenario.joined().tasks) is single_class_warning([]) is None
