"""Flags, config files and their errors: what a user types against what the run gets."""

import json

import pytest

from fastmerge.config import FREE, Config, differences, parse, resolve, to_dict
from fastmerge.errors import UserError


def test_documented_flags_reach_their_settings():
    flags = (
        "--dataset folder --data-root d --scenario dil --tasks 3 --class-order order.json --model ViT-B-32 --pretrained none"
        " --head linear --method finetune trm --seeds 3 4 --epochs 2 --merge-epochs 1 --batch-size 7 --lr 0.5 --device cpu"
        " --run-dir r --download --quiet --trm.replace none --skip-bad-images --eval-classes all"
    )
    c = parse(flags.split())
    assert (c.data.dataset, c.data.data_root, c.data.download, c.data.skip_bad_images) == ("folder", "d", True, True)
    assert (c.scenario.scenario, c.scenario.tasks, c.scenario.class_order) == ("dil", 3, "order.json")
    assert (c.model.model, c.model.pretrained, c.model.head) == ("ViT-B-32", "none", "linear")
    assert (c.training.method, c.training.seeds) == (("finetune", "trm"), (3, 4))
    assert (c.training.epochs, c.training.merge_epochs, c.training.batch_size, c.training.lr) == (2, 1, 7, 0.5)
    assert (c.run.device, c.run.run_dir, c.run.quiet) == ("cpu", "r", True)
    assert c.trm.replace == "none" and c.scenario.eval_classes == "all"


def test_defaults_are_the_papers_for_clip_and_small_for_the_embedded_model():
    clip = parse(["--dataset", "imagenet1k", "--tasks", "100"])
    assert (clip.model.model, clip.model.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert (clip.training.epochs, clip.training.merge_epochs, clip.training.batch_size) == (15, 5, 128)
    assert (clip.training.lr, clip.training.weight_decay) == (1e-5, 0.1)
    assert (clip.trm.lambda1, clip.trm.lambda2, clip.trm.replace_ratio) == (0.1, 0.01, 0.6)
    tiny = parse([])
    assert (tiny.model.model, tiny.model.pretrained, tiny.scenario.tasks) == ("tiny", "glyphs", 5)
    assert parse(["--scenario", "dil"]).scenario.class_order == "natural"


def test_config_file_repeats_a_run_and_flags_win(tmp_path):
    first = parse("--method trm --seeds 0 1 --lr 0.25 --trm.merge-first --flip True --trm.replace none".split())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(first)))
    assert parse(["--config", str(path)]) == first
    again = parse(["--config", str(path), "--lr", "0.5", "--trm.no-merge-first"])
    assert again.training.lr == 0.5 and not again.trm.merge_first and again.trm.replace == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected an object"),
        ('{"training": {"lrr": 1}}', r"training\.lrr.*Did you mean: lr"),
        ('{"trainin": {}}', r"trainin.*Did you mean: training"),
    ],
)
def test_bad_config_files(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse(["--config", str(path)])
    with pytest.raises(UserError, match="nowhere.json"):
        parse(["--config", "nowhere.json"])


@pytest.mark.parametrize("flags", ["--lrr 1", "--lr fast", "--scenario til", "--trm.replace some"])
def test_wrong_flags_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 2 and flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks 0", "--tasks 0: expected at least 1"),
        ("--batch-size 0", "--batch-size 0"),
        ("--lr -1", "--lr -1.0"),
        ("--crop-scale 0", "--crop-scale"),
        ("--seeds 1 1", "each seed once"),
        ("--method trm trm", "each method once"),
        ("--trm.replace-ratio 1.5", "between 0 and 1"),
        ("--trm.layer-b 0", "--trm.layer-b"),
        ("--model ViT-L-14", "--pretrained is not given for --model ViT-L-14"),
    ],
)
def test_values_out_of_range(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags.split())


def test_differences_name_what_changes_the_numbers():
    a, b = to_dict(resolve(Config())), to_dict(parse(["--lr", "1", "--quiet", "--seeds", "5"]))
    assert differences(json.loads(json.dumps(a)), b) == ["training.lr: 0.0006 -> 1.0"]
    groups = to_dict(Config())
    assert all(name.split(".")[1] in groups[name.split(".")[0]] for name in FREE)


def test_help_shows_groups_defaults_and_sources(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for expected in ("data options", "training options", "trm options", "--trm.lambda1", "(eq. 14)", "(default: 0.1)"):
        assert expected in text
