"""`--preset`. Oracle: the papers' set-ups, written down here a second time."""

import json

import pytest
from published_trees import TREES, plant

from fastmerge.__main__ import main
from fastmerge.config import Config, check, declarations, to_dict
from fastmerge.data import DATASETS
from fastmerge.errors import UserError
from fastmerge.flags import as_flags, parse
from fastmerge.presets import PRESETS, USED, about, explained

CASES = [(name, dataset) for name in PRESETS for dataset in (*USED[name], "cifar10", "glyphs", "folder")]


@pytest.mark.parametrize(("name", "dataset"), CASES)
def test_every_preset_gives_a_valid_config_for_every_data_set(name, dataset):
    config = parse(["--preset", name, "--dataset", dataset])
    check(config)
    assert config.training.preset == name and config.training.method == (name,)
    assert set(USED[name]) <= set(DATASETS)
    text = about(config)
    assert not any("overridden" in line for line in text)
    assert any("does not use" in line for line in text) == (dataset not in USED[name])
    for row in PRESETS[name]:
        group, _, setting = row.setting.partition(".")
        assert setting in declarations()[group], row
        assert set(row.datasets) <= set(USED[name]), row
        assert row.scenario is None or row.scenario in ("cil", "dil"), row
        described = f"({row.where})" in text[0]
        applies = not row.datasets or dataset in row.datasets
        assert described or not applies or row.scenario == "cil", row
    values = json.loads(json.dumps(to_dict(config)))
    assert parse(as_flags(values, "test")) == config


@pytest.mark.parametrize(
    ("name", "dataset", "epochs", "tasks", "scenario"),
    [
        ("trm", "cifar100", 15, 10, "cil"),
        ("trm", "imagenet-r", 15, 10, "cil"),
        ("trm", "cars", 15, 10, "cil"),
        ("trm", "domainnet", 15, 6, "cil"),
        ("trm", "imagenet1k", 15, 100, "cil"),
        ("cmm", "cifar100", 10, 10, "cil"),
        ("cmm", "imagenet-r", 10, 10, "cil"),
        ("cmm", "cub200", 30, 10, "cil"),
        ("cmm", "cars", 30, 10, "cil"),
        ("cmm", "office31", 10, None, "dil"),
        ("cmm", "office-home", 10, None, "dil"),
        ("cmm", "domainnet", 10, None, "dil"),
        ("pam", "imagenet-r", 10, 10, "cil"),
        ("pam", "imagenet-a", 10, 10, "cil"),
        ("pam", "domainnet", 5, 5, "cil"),
        ("pam", "cifar100", 10, 10, "cil"),
        ("pam", "cub200", 10, 10, "cil"),
    ],
)
def test_what_the_papers_choose_per_data_set(name, dataset, epochs, tasks, scenario):
    config = parse(["--preset", name, "--dataset", dataset])
    assert (config.training.epochs, config.scenario.tasks, config.scenario.scenario) == (epochs, tasks, scenario)


def test_what_the_papers_choose_for_all():
    trm, cmm, pam = (parse(["--preset", name, "--dataset", "cifar100"]) for name in ("trm", "cmm", "pam"))
    for clip in (trm, cmm):
        assert (clip.model.model, clip.model.pretrained, clip.model.head) == ("ViT-B-16-quickgelu", "openai", "text")
        assert (clip.training.batch_size, clip.training.lr, clip.training.weight_decay) == (128, 1e-5, 0.1)
    assert (trm.training.merge_epochs, trm.trm.lambda1, trm.trm.lambda2, trm.trm.replace_ratio) == (5, 0.1, 0.01, 0.6)
    assert (pam.model.model, pam.model.head) == ("vit_base_patch16_224", "linear")
    assert (pam.training.batch_size, pam.training.head_lr, pam.pam.lr) == (256, 1e-2, 1e-3)
    assert (pam.pam.rank, pam.pam.epsilon, pam.pam.p0) == (10, 0.5, 1 / 3)


def test_flags_override_a_preset_and_the_header_tells():
    config = parse("--preset cmm --dataset cub200 --epochs 3 --method cmm magmax --task-sizes 100 10".split())
    assert (config.training.epochs, config.training.method) == (3, ("cmm", "magmax"))
    assert (config.scenario.tasks, config.scenario.task_sizes) == (None, (100, 10))
    used, instead = about(config)
    assert used.startswith(
        "preset cmm, from the paper: model ViT-B-16-quickgelu, pretrained openai, head text, batch-size"
    )
    assert "lr 1e-05" in used and "epochs" not in used
    assert instead == "preset cmm, overridden: method cmm magmax instead of cmm, epochs 3 instead of 30"


def test_an_own_model_brings_its_own_weights_and_head():
    config = parse("--preset trm --model tiny".split())
    assert "head as the model has it instead of text" in about(config)[1]
    assert (config.model.pretrained, config.model.head) == ("glyphs", None)
    assert config.training.lr == 1e-5  # the paper's, not that of the tiny model
    own = parse("--preset pam --dataset domainnet --scenario dil".split())
    assert (own.scenario.scenario, own.scenario.tasks, own.training.epochs) == ("dil", None, 5)


def test_several_data_sets_have_what_the_paper_chooses_for_all_of_them():
    fine = parse("--preset cmm --dataset cars cub200".split())
    assert (fine.training.epochs, fine.scenario.scenario) == (30, "datasets")
    mixed = parse("--preset cmm --dataset cars cifar100".split())
    assert (mixed.training.epochs, mixed.training.batch_size) == (Config().training.epochs, 128)
    domains = parse("--preset cmm --dataset office31 office-home".split())
    assert (domains.scenario.scenario, domains.training.epochs) == ("datasets", 10)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="--preset tmr: expected trm | cmm | pam Did you mean: trm"):
        parse(["--preset", "tmr"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--preset trm",
            "--tasks 10: imagenet-r has 3 classes; choose 1 to 3 tasks. --tasks 10 is --preset trm's (Table 1, of 5, 10 and "
            "20): give --tasks another value.",
        ),
        ("--preset trm --tasks 100", "--tasks 100: imagenet-r has 3 classes; choose 1 to 3 tasks."),
        ("--method trm --tasks 10", "--tasks 10: imagenet-r has 3 classes; choose 1 to 3 tasks."),
    ],
)
def test_an_error_about_a_flag_that_nobody_typed_names_the_preset(flags, says, tmp_path, capsys):
    root = plant(tmp_path, TREES["imagenet-r", "LAMDA zip"][0])
    place = ["--dataset", "imagenet-r", "--data-root", str(root), "--model", "tiny", "--run-dir", str(tmp_path / "run")]
    assert main([*flags.split(), *place]) == 2
    assert capsys.readouterr().err.strip() == f"error: {says}"
    assert not (tmp_path / "run").exists()


def test_all_flags_of_a_preset_in_an_error_are_named():
    config = parse("--preset cmm --dataset cub200 --lr 0.1".split())
    named = explained("--tasks 10 and --epochs 30, not --lr 0.1, --epochs 300 or --batch-size 12.", config)
    assert named.endswith(
        "--batch-size 12. --epochs 30 is --preset cmm's (Implementation details); --tasks 10 is --preset cmm's (Datasets, "
        "of 5, 10 and 20): give --epochs and --tasks another value."
    )
    assert explained("no flag", config) == "no flag"
