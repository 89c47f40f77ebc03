"""Forward transfer and zero-shot retention against values worked out by hand, and in a run against plain evaluations."""

import json
import types

import pytest
import torch
import toy

from fastmerge.__main__ import main
from fastmerge.commands.table import joined_rows
from fastmerge.config import Config
from fastmerge.data import load_dataset
from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.loop import Images
from fastmerge.methods import METHODS
from fastmerge.models.heads import AttributeHead
from fastmerge.report import results_rows
from fastmerge.results import read_run
from fastmerge.setup import Setup
from fastmerge.transfer import forward_transfer, load_retained, retention


def hard(root=None, **options):
    """A loader: a few classes of another data set."""
    return load_dataset("glyphs-hard").most_populous(6)


FAST = ["--tasks", "3", "--epochs", "1", "--merge-epochs", "1", "--top-classes", "9", "--device", "cpu", "--quiet"]


def test_forward_transfer_by_hand():
    starting = [[50.0, None, None], [40.0, 30.0, None], [35.0, 20.0, 10.0]]
    assert forward_transfer([None, 36.0, 14.0], starting) == ((36 - 30) + (14 - 10)) / 2
    assert forward_transfer([99.0, 24.0, 10.0], starting) == -3.0  # the first task has nothing before it
    assert forward_transfer([None, None, 14.0], starting) == 4.0  # over what is known
    assert forward_transfer([None], [[42.0]]) is None and forward_transfer([], starting) is None
    assert forward_transfer([None, 36.0], None) is None  # no zero-shot model


def test_retention_by_hand():
    assert retention([60.0, 55.0], 58.0) == -3.0 and retention([60.0], 58.0) == 2.0
    assert retention([60.0, None], 58.0) is None and retention([], 58.0) is None and retention([60.0], None) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A class-incremental run whose models after every task are kept."""
    folder = tmp_path_factory.mktemp("run")
    flags = [
        *FAST,
        "--retain",
        "test_transfer:hard",
        "--keep-models",
        "--method",
        "finetune",
        "joint",
        "coop",
        "ranpac",
    ]
    assert main([*flags, "--run-dir", str(folder)]) == 0
    return folder, parse(flags)


@pytest.mark.parametrize("flags", [("--prompt-length", "4"), ("--lora-rank", "2")], ids=str)
def test_the_starting_model_has_nothing_that_is_trained(flags, run, tmp_path):
    """No random prefix and no adapter: zero-shot accuracy, and with it both metrics, are those of the plain command."""
    words = [*FAST, "--retain", "test_transfer:hard", "--method", "finetune", "--no-nearest-mean", *flags]
    assert main([*words, "--run-dir", str(tmp_path / "r")]) == 0
    expected = json.loads((run[0] / "results.json").read_text())["zero_shot"]
    assert json.loads((tmp_path / "r" / "results.json").read_text())["zero_shot"] == expected


def accuracy(model, pixels, labels, rows, classes):
    """Percent right among `classes`; rows: text embeddings of them."""
    with torch.no_grad():
        features = model.backbone((pixels.float() / 255 - model.mean) / model.std)
    logits = torch.nn.functional.normalize(features, dim=1) @ rows.T
    return 100 * (torch.tensor(classes)[logits.argmax(1)] == labels).float().mean().item()


def test_a_run_measures_both(run):
    import fastmerge

    folder, config = run
    setup = Setup(config)
    images = Images(setup.scenario, setup.cache)
    tests, hard = images.tests(2), setup.retained.dataset
    unseen = setup.cache.get(hard.test, torch.arange(len(hard.test)).numpy())
    everything = json.loads((folder / "results.json").read_text())
    result, starting = everything["methods"]["finetune"]["0"], everything["zero_shot"]

    def both(model, t):
        """On task t among the classes seen up to it; on the other data."""
        seen = list(setup.scenario.seen(t))
        of_task = accuracy(model, tests[t].images, tests[t].labels, setup.head.weight[seen], seen)
        rows = setup.retained.head.weight
        return of_task, accuracy(model, unseen.images, unseen.labels, rows, range(len(rows)))

    start = types.SimpleNamespace(
        backbone=setup.backbone, mean=torch.tensor(setup.backbone.mean).view(3, 1, 1),
        std=torch.tensor(setup.backbone.std).view(3, 1, 1),
    )  # fmt: skip
    assert starting["retained"] == pytest.approx(both(start, 0)[1], abs=0.1)
    gains, before, retained = [], [None], []
    for t in range(3):
        kept = fastmerge.load(folder / f"finetune-seed0/models/task-{t + 1}.safetensors")
        model = types.SimpleNamespace(backbone=kept.backbone, mean=start.mean, std=start.std)
        retained.append(both(model, t)[1])
        if t < 2:
            before.append(both(model, t + 1)[0])
            gains.append(before[-1] - both(start, t + 1)[0])
    assert result["before_training"] == [None, *(pytest.approx(x, abs=0.1) for x in before[1:])]
    assert result["retained"] == [pytest.approx(x, abs=0.1) for x in retained]
    assert result["forward_transfer"] == pytest.approx(sum(gains) / 2, abs=0.2)
    assert result["retention"] == pytest.approx(retained[-1] - starting["retained"], abs=0.1)
    assert result["retention"] != 0 != result["forward_transfer"]


def test_both_are_absent_where_they_have_no_meaning(run):
    folder, _ = run
    methods, starting = read_run(folder)
    found = {name: (seeds["0"]["forward_transfer"], seeds["0"]["retention"]) for name, seeds in methods.items()}
    assert found["ranpac"] == found["nearest-mean"] == (None, None)  # their heads know no class before it is trained
    assert found["coop"][0] is not None and found["coop"][1] is None  # its prompts belong to the classes of the tasks
    rows = results_rows(methods, starting)
    assert rows[0][6:8] == ["FWT", "retention"]
    cells = {row[0]: row[6:8] for row in rows[1:]}
    assert cells["ranpac"] == ["–", "–"] and cells["finetune"][1].startswith(("+", "-"))
    assert cells["zero-shot"] == ["–", f"{starting['retained']:.1f}"]
    assert "| FWT | retention |" in (folder / "results.md").read_text()
    assert not AttributeHead(torch.zeros(2, 3), 1.0, 3, 1).knows_all


def test_a_table_of_folders_with_different_columns(run, tmp_path):
    folder, _ = run
    values = json.loads((folder / "results.json").read_text())
    for seeds in values["methods"].values():  # as an older fastmerge wrote it
        for name in ("forward_transfer", "retention", "before_training", "retained"):
            seeds["0"].pop(name)
    for name in ("forward_transfer", "retention", "retained"):
        values["zero_shot"].pop(name)
    old = tmp_path / "results.json"
    old.write_text(json.dumps(values))
    header, *rows = joined_rows([old, folder])
    place = header.index("FWT")
    assert header[place + 1] == "retention" and header[-1] == "grows" and {len(row) for row in rows} == {len(header)}
    assert rows[0][place] == "" and rows[-2][header.index("grows")] == "Θ(1)"


def test_retention_goes_on_after_a_stop(run, tmp_path):
    """A run that begins without the flag and goes on with it knows the later tasks alone."""
    import fastmerge.loop
    from fastmerge.runfolder import StopRequest

    folder, flags = tmp_path / "run", [*FAST, "--method", "finetune", "--no-nearest-mean"]
    real = fastmerge.loop.Images.train

    def stopping(self, task):
        if task.index == 1:
            StopRequest.signal = 2
        return real(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastmerge.loop.Images, "train", stopping)
        assert main([*flags, "--run-dir", str(folder)]) == 130
    assert main([*flags, "--run-dir", str(folder)]) == 0
    result = json.loads((folder / "finetune-seed0/result.json").read_text())
    whole = json.loads((run[0] / "finetune-seed0/result.json").read_text())
    assert result["before_training"] == whole["before_training"] and result["retained"] == []
    assert result["forward_transfer"] == whole["forward_transfer"]


def test_domains_are_in_the_matrix_already(tmp_path):
    flags = ["--scenario", "dil", "--top-classes", "5", "--epochs", "1", "--device", "cpu", "--quiet"]
    assert main([*flags, "--method", "finetune", "--no-nearest-mean", "--run-dir", str(tmp_path)]) == 0
    values = json.loads((tmp_path / "results.json").read_text())
    result, starting = values["methods"]["finetune"]["0"], values["zero_shot"]["accuracy_matrix"]
    matrix = result["accuracy_matrix"]
    assert result["before_training"] == [None, *(matrix[t - 1][t] for t in range(1, len(matrix)))]
    gains = [matrix[t - 1][t] - starting[t][t] for t in range(1, len(matrix))]
    assert result["forward_transfer"] == pytest.approx(sum(gains) / len(gains))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retain"], "--retain : expected the name of a data set"),
        (["--retain", "a", "b", "c"], "--retain a b c: expected the name of a data set, and its folder"),
    ],
)
def test_bad_values(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags)


def test_data_that_cannot_be_retained(tmp_path):
    with pytest.raises(UserError, match="--retain glyphs: tasks train on this data set"):
        load_retained(parse(["--retain", "glyphs"]))
    with pytest.raises(UserError, match=r"--retain cifar100 .*nowhere: "):
        load_retained(parse(["--retain", "cifar100", str(tmp_path / "nowhere")]))
    with pytest.raises(UserError, match="a prototype head knows no class.*--head text"):
        Setup(parse([*FAST, "--retain", "test_transfer:hard", "--head", "prototype"]))
    held = load_retained(parse(["--retain", "glyphs-hard", "--validation", "0.5"]))
    assert len(held.test) == len(held.train) and load_retained(Config()) is None


def test_heads_that_know_unseen_classes(tmp_path):
    """A head that has other parts for the classes that it was trained on does not classify others."""
    from fastmerge.transfer import speaks

    for name, knows in {"average": 1, "attriclip": 0, "clip-adapter": 1, "coop": 1, "proof": 0, "rapf": 1}.items():
        learner = toy.learner(method=name)
        method = METHODS[name].build(learner, toy.nowhere(tmp_path), "strict")
        assert speaks(learner, method) == knows, name


def test_every_seed_of_random_weights_has_its_own_text_tower_for_retained_data():
    flags = [*FAST, "--retain", "test_transfer:hard", "--pretrained", "none", "--model", "tiny", "--head", "text"]
    setup, alone = Setup(parse([*flags, "--seeds", "0", "1"])), Setup(parse([*flags, "--seeds", "1"]))
    first = setup.retained.head.state_dict()
    setup.learner(1)
    torch.testing.assert_close(setup.retained.head.state_dict(), alone.retained.head.state_dict())
    assert not torch.equal(first["weight"], alone.retained.head.state_dict()["weight"])
