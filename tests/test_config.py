"""Flags and config files: what the user types, the configuration of the run, and the errors."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import re
import typing

import pytest

from fastmerge.__main__ import main
from fastmerge.commands import COMMANDS
from fastmerge.config import FREE, Config, check, declarations, flag_of, to_dict
from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.flags import as_flags, parse, settled
from fastmerge.help import FIRST
from fastmerge.methods.trm import TRM, Search
from fastmerge.setup import Setup

SETTINGS = [(group, name) for group, settings in declarations().items() for name in settings]


def test_documented_flags_reach_their_settings():
    flags = (
        "--dataset folder --data-root d --scenario dil --tasks 3 --class-order order.json --model ViT-B-32 --pretrained none"
        " --head linear --method finetune trm --seeds 3 4 --epochs 2 --merge-epochs 1 --batch-size 7 --lr 0.5 --device cpu"
        " --run-dir r --download --quiet --trm.replace none --skip-bad-images --eval-classes all"
    )
    c = parse(flags.split())
    assert (c.data.dataset, c.data.data_root, c.data.download, c.data.skip_bad_images) == (
        ("folder",),
        ("d",),
        True,
        True,
    )
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


def test_config_file_repeats_a_run_and_flags_override_it(tmp_path):
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lrr 1", "unknown flag --lrr. Did you mean: --lr"),
        ("--lr fast", "--lr fast: expected a number"),
        ("--lr", "--lr needs a value"),
        ("--epochs 1.5", "--epochs 1.5: expected a whole number"),
        ("--seeds 0 b", "--seeds b: expected a whole number"),
        ("--scenario til", "--scenario til: expected cil | dil | datasets Did you mean: dil"),
        ("--trm.replace some", "--trm.replace some: expected anchored | literal | none"),
        ("--flip maybe", "--flip maybe: expected True or False"),
        ("--download yes", "'yes' is not expected here"),
        ("--quiet fast", "'fast' is not expected here"),
        ("fast", "unknown command 'fast'"),
        ("--config", "--config needs a value"),
        ("--mean 0.5 0.5", "--mean expected 3 arguments"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, capsys):
    assert main(flags.split()) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {message}") and text.count("\n") == 1


def test_ways_to_write_a_value():
    c = parse(
        "--trm.alpha -1e-3 --trm.beta=-.5 --batch_size 7 --tasks None --no-flip --pam.no-merge --data-root=-d".split()
    )
    assert (c.trm.alpha, c.trm.beta, c.training.batch_size, c.scenario.tasks) == (-0.001, -0.5, 7, 5)
    assert (c.data.flip, c.pam.merge, c.data.data_root) == (False, False, ("-d",))
    assert [parse(f.split()).data.flip for f in ("", "--flip", "--flip False", "--flip None", "--flip --quiet")] == [
        None, True, False, None, True,
    ]  # fmt: skip


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
        ("--lr nan", "--lr nan: expected a finite number"),
        ("--batch-size 99999999999999999999", "--batch-size"),
        ("--mean 0.5 0.5 0.5", "--mean and --std belong together"),
        ("--compile --checkpoint-gradients", "--compile --checkpoint-gradients: a compiled backbone"),
        ("--mean 0.5 0.5 127 --std 1 1 1", "--mean 127.0: expected between 0 and 1"),
        ("--first-classes 3 --task-sizes 3 2", "--first-classes and --task-sizes: give one of them"),
        ("--scenario dil --first-classes 3", "--first-classes is for --scenario cil"),
        ("--scenario dil --task-sizes 3", "--task-sizes is for --scenario cil"),
        ("--task-sizes", "--task-sizes: expected at least one number"),
        ("--task-sizes 3 0", "--task-sizes 0: expected at least 1"),
        ("--top-classes 0", "--top-classes 0: expected at least 1"),
        ("--model ViT-L-14", "--pretrained is not given for --model ViT-L-14"),
    ],
)
def test_values_out_of_range(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags.split())


def test_free_settings_exist():
    groups = to_dict(Config())
    assert all(name.split(".")[1] in groups[name.split(".")[0]] for name in FREE)


@functools.cache
def parsed(*flags):
    return parse(list(flags))


def value(group, name, *flags):
    return getattr(getattr(parsed(*flags), group), name)


def printed(*flags):
    """What the command line prints before it exits with code 0."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        parse(list(flags))
    assert stop.value.code == 0
    return out.getvalue()


def test_the_short_help_has_one_line_for_each_of_twenty_settings(monkeypatch):
    """The defaults are those that the rest of the command leaves; a wrong command is no reason to refuse help."""
    monkeypatch.setenv("COLUMNS", "100")
    assert len(FIRST) == 20
    for flags in ([], ["--dataset", "imagenet1k"], ["--scenario", "dil"], ["--tasks", "0"]):
        lines = printed("--help", *flags).splitlines()
        assert max(map(len, lines)) <= 100
        rows = {line.split()[0].rstrip(",").removeprefix("--"): line for line in lines if line.startswith("  ")}
        assert list(rows) == [flag_of(*p.split(".")) for p in FIRST] + ["config", "help", "help-all", *COMMANDS]
        config = parse([] if "--tasks" in flags else flags)
        for place, text in zip(FIRST, rows.values(), strict=False):
            group, name = place.split(".")
            used = getattr(getattr(config, group), name)
            shown = " ".join(map(str, used)) if isinstance(used, tuple) else used
            assert shown in (None, False, 0.0) or text.endswith(f" ({shown})")
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, printed("--help").splitlines()[4:-2])) <= 60


@pytest.fixture(scope="module")
def help_of():
    """The printed help of every flag, with the line breaks removed."""
    text = " ".join(printed("--help-all").split())
    starts = {flag: re.search(rf" --{re.escape(flag)}[ ,]", text) for flag in map(lambda s: flag_of(*s), SETTINGS)}
    assert all(starts.values()), [flag for flag, start in starts.items() if start is None]
    ends = sorted(start.start() for start in starts.values()) + [len(text)]
    return {flag: text[start.start() : ends[ends.index(start.start()) + 1]] for flag, start in starts.items()}


@pytest.mark.parametrize(("group", "name"), SETTINGS)
def test_the_printed_help_tells_what_a_setting_does_and_its_default(group, name, help_of):
    declaration, default = declarations()[group][name]
    text = help_of[flag_of(group, name)]
    assert " ".join(declaration.help.split()) in text
    for word in (declaration.unit, declaration.expected(), declaration.source, declaration.derived):
        assert not word or word in text
    if declaration.derived is not None or default is None:
        return  # the tests below
    small = default if declaration.tiny is None else declaration.tiny
    for flags, used, where in (([], small, "tiny"), (["--dataset", "imagenet1k"], default, "others")):
        if name != "dataset" or where == "tiny":
            assert value(group, name, *flags) == used
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    assert f"(default: {shown}" in text if shown else "(default" not in text
    if declaration.tiny is not None:
        assert f"; {declaration.tiny} with the tiny model)" in text


def test_derived_defaults_are_what_the_help_says():
    def text(group, name):
        return declarations()[group][name][0].derived

    small, large, domains = [], ["--dataset", "imagenet1k"], ["--scenario", "dil"]
    assert text("scenario", "tasks").startswith("10, embedded data 5, fewer where a task would have less than two")
    many = [settled(parsed(*flags), 1000).scenario.tasks for flags in (small, large, domains)]
    assert many == [5, 10, None]
    several = ["--dataset", "glyphs", "folder"]
    paper = ["--preset", "cmm", "--dataset", "office31"]
    assert text("scenario", "scenario") == "cil; with several data sets datasets; with a preset as in the paper"
    assert [value("scenario", "scenario", *f) for f in (small, several, paper)] == ["cil", "datasets", "dil"]
    assert text("scenario", "class_order") == "1993; with --scenario dil and datasets natural"
    orders = [value("scenario", "class_order", *f) for f in (small, domains, several)]
    assert orders == ["1993", "natural", "natural"]
    assert text("model", "model") == "tiny for embedded data, else ViT-B-16-quickgelu"
    assert [value("model", "model", *f) for f in (small, large)] == ["tiny", "ViT-B-16-quickgelu"]
    assert text("model", "pretrained") == "glyphs for tiny, openai for ViT-B-16-quickgelu"
    assert [value("model", "pretrained", *f) for f in (small, large)] == ["glyphs", "openai"]
    assert text("training", "method") == "trm; for embedded data also finetune"
    assert [value("training", "method", *f) for f in (small, large)] == [("trm", "finetune"), ("trm",)]
    assert text("run", "run_dir").startswith("runs/<dataset>-<scenario><tasks>-<model>, or")
    assert value("run", "run_dir") == "runs/glyphs-cil5-tiny"
    hard = ["--dataset", "glyphs-hard"]
    assert value("run", "run_dir", *hard) == "runs/glyphs-hard-cil5-tiny"
    assert value("training", "method", *hard) == ("trm", "finetune")
    for flags, folder in (
        ("--first-classes 30", "glyphs-cil30-10-tiny"),
        ("--first-classes 30 --tasks 5 --top-classes 40", "glyphs-cil30+4-top40-tiny"),
        ("--task-sizes 5 20", "glyphs-cil5-20-tiny"),
    ):
        assert value("run", "run_dir", *flags.split()) == f"runs/{folder}"


def number_type(group, name):
    """int or float for a setting that is a number, several numbers or an optional number; None for the others."""
    hint = typing.get_type_hints(typing.get_type_hints(Config)[group])[name]
    kinds = {hint, *typing.get_args(hint)} & {int, float}
    return kinds.pop() if kinds else None


@pytest.mark.parametrize(("group", "name"), [s for s in SETTINGS if number_type(*s)])
def test_numbers_outside_their_bounds_are_refused(group, name):
    declaration, flag = declarations()[group][name][0], f"--{flag_of(group, name)}"

    def checked(number):
        given = (number,) if isinstance(value(group, name), tuple) else number
        settings = dataclasses.replace(getattr(parsed(), group), **{name: given})
        check(dataclasses.replace(parsed(), **{group: settings}))

    bad = [10**20, -(10**20)] if number_type(group, name) is int else [math.nan, math.inf, -math.inf]
    bad += [bound + step for bound, step in ((declaration.at_least, -1), (declaration.at_most, 1)) if bound is not None]
    bad += [bound for bound in (declaration.above, declaration.below) if bound is not None]
    for number in bad:
        with pytest.raises(UserError, match=f"{flag} .*: expected"):
            checked(number)
    for bound in (declaration.at_least, declaration.at_most):
        if bound is not None:
            checked(bound)


def test_a_seed_may_be_as_large_as_torch_takes_it():
    assert parse(["--seeds", str(2**63 - 1)]).training.seeds == (2**63 - 1,)
    with pytest.raises(UserError, match="--seeds 9223372036854775808: expected at most 9223372036854775807"):
        parse(["--seeds", str(2**63)])


def test_defaults_that_the_data_and_the_model_decide():
    """These settings have no value before the data and the model are known."""
    derived = {key: declarations()[key[0]][key[1]][0].derived for key in SETTINGS if value(*key) is None}
    assert derived == {
        ("data", "data_root"): None,
        ("data", "split_file"): None,
        ("data", "test_part"): "test if it has labels, else val, valid or validation",
        ("data", "template"): "those published for the data set",
        ("data", "class_names"): "from the folders, or those published",
        ("data", "cache_gb"): declarations()["data"]["cache_gb"][0].derived,
        ("data", "retain"): None,
        ("data", "flip"): "as the data set says: on for published photos, else off",
        ("run", "continue_from"): None,
        ("training", "init_rule"): declarations()["training"]["init_rule"][0].derived,
        ("training", "deploy_rule"): "the method's rule",
        ("scenario", "first_classes"): None,
        ("scenario", "task_sizes"): None,
        ("scenario", "top_classes"): None,
        ("training", "preset"): None,
        ("model", "mean"): "as the weights were trained",
        ("model", "std"): "as the weights were trained",
        ("training", "compile"): "on with a GPU, off where gradients are checkpointed",
        ("training", "precision"): "bf16 on a GPU that computes in it, else fp32",
        ("model", "head"): "text where the model has a text tower, else prototype",
        ("trm", "layer_b"): "half the layers",
        ("fisher", "images"): "all",
        ("clg_cbm", "concepts"): None,
    }
    setup = Setup(parse([]))
    learner = setup.learner(0)
    assert learner.flip is setup.dataset.flip and learner.head.kind == "text"
    timm_model = ["--model", "test_vit", "--pretrained", "none"]
    assert Setup(parse(timm_model)).head.kind == "prototype"
    flip = Setup(parse(["--flip", str(not setup.dataset.flip)])).learner(0).flip
    assert flip is not setup.dataset.flip
    task = setup.scenario.tasks[0]
    images = setup.cache.get(setup.dataset.train, task.train)

    def layers(*flags):
        learner = setup.learner(0, config=parse(list(flags)))
        return Search(TRM(learner), task, images, learner.theta.clone()).objective.weights.tolist()

    assert layers() == layers("--trm.layer-b", str(learner.backbone.layers // 2)) != layers("--trm.layer-b", "1")
    assert FisherPass(learner, task, images).total == len(images)
    assert FisherPass(setup.learner(0, config=parse(["--fisher.images", "5"])), task, images).total == 5


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--dataset", "imagenet1k"],
        ["--scenario", "dil", "--flip", "False"],
        ["--task-sizes", "5", "10", "--top-classes", "40"],
        ["--dataset", "folder", "glyphs", "--data-root", "a", "b"],
        ["--dataset", "folder", "--data-root=-d"],
        ["--preset", "pam", "--dataset", "domainnet", "--epochs", "7"],
    ],
)
def test_a_config_survives_the_way_through_flags(flags):
    config = parse(flags)
    assert parse(as_flags(json.loads(json.dumps(to_dict(config))), "test")) == config


def test_a_resolved_config_has_none_only_where_none_is_a_value():
    left = {
        f"{group}.{name}" for group, settings in to_dict(parse([])).items() for name, x in settings.items() if x is None
    }
    assert left == {
        "data.data_root", "data.split_file", "data.test_part", "data.template", "data.class_names", "data.cache_gb",
        "data.flip", "data.retain", "model.mean", "model.std", "model.head", "run.continue_from", "scenario.first_classes",
        "scenario.task_sizes", "scenario.top_classes", "training.compile", "training.precision", "training.preset",
        "training.init_rule", "training.deploy_rule", "trm.layer_b", "fisher.images", "clg_cbm.concepts",
    }  # fmt: skip
