"""The papers' tables by command: what is declared, the arithmetic of the comparison, and one table from end to end."""

import contextlib
import csv
import dataclasses
import math
from pathlib import Path

import pytest
from image_trees import image_folder

from fastmerge.__main__ import main
from fastmerge.commands import reproduce
from fastmerge.errors import Busy, UserError
from fastmerge.flags import parse, read_flags
from fastmerge.flags import parser as flag_parser
from fastmerge.methods import METHODS
from fastmerge.plan import read_method
from fastmerge.reproduce import TARGETS
from fastmerge.reproduce.compare import Cell, index, markdown, midranks, outcome, paired, rank_correlation, save
from fastmerge.reproduce.target import TRAINING, Column, Target, published

TRAIN = "--model tiny --epochs 1 --batch-size 16 --lr 1e-3 --device cpu --quiet --no-nearest-mean --dataset folder --tasks 2"


def test_every_published_number_has_a_row_and_a_column():
    assert set(published()) <= set(TARGETS)
    for item, numbers in published().items():
        target = TARGETS[item]
        assert {column for _, column, _ in numbers} == {column.name for column in target.columns}
        assert {row for row, _, _ in numbers} == set(target.rows), item
        assert {metric for _, _, metric in numbers} == set(target.metrics)
        assert {column.name for column in target.small} <= {column.name for column in target.columns}
        assert all(0 < value < 100 for value, _ in numbers.values())


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_and_column_is_a_command(name):
    target = TARGETS[name]
    assert target.columns and target.small and set(target.rows_small) <= set(target.rows)
    for column in (*target.columns, *target.small):
        config = parse(column.words)
        assert column.dataset == config.data.dataset[0] and (column.inside or column.dataset) in TRAINING
        for spec in (*target.rows.values(), *target.rows_small.values()):
            assert spec == "zero-shot" or read_method(spec, config)
    if target.beside:
        item, place = target.beside
        assert all((row, place, metric) in published()[item] for row in target.rows for metric in target.metrics)
    if target.ours:
        assert target.columns == target.small and (not target.against or target.against in target.rows)
        return
    for column in target.columns:
        paper = name.partition(":")[0]
        assert parse(column.words).training.preset == paper


def test_a_folder_has_the_same_flags_in_every_target():
    """Else the second target would be refused, because the folder holds runs made from something else."""
    flags = {}
    for target in TARGETS.values():
        for column in (*target.columns, *target.small):
            # each protocol has its own runs
            words = [word for word in column.words if word not in ("strict", "full", "running")]
            assert flags.setdefault(column.folder, words) == words


def test_the_comparison_by_hand():
    cell = Cell("c", "final_accuracy", "r", (70.0, 72.0, 74.0), 75.0, 1.5)
    assert (cell.mean, cell.spread, cell.difference) == (72.0, 2.0, -3.0)
    assert cell.error == pytest.approx(math.sqrt(4 / 3 + 2.25 / 3)) and cell.reproduced is False  # 2 x 1.443 < 3
    alone = cell._replace(deviation=None)
    assert alone.error == pytest.approx(math.sqrt(4 / 3 + 4)) and alone.reproduced is True
    one = cell._replace(ours=(72.0,))
    assert (one.difference, one.error, one.reproduced) == (-3.0, None, None)
    assert cell._replace(ours=()).difference is None and cell._replace(paper=None).reproduced is None


def test_the_order_of_the_rows():
    assert midranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0, 2.5, 1]

    def column(*pairs):
        return [Cell("c", "m", "r", (ours,), paper, None) for ours, paper in pairs]

    assert rank_correlation(column((1, 10), (2, 20), (3, 30))) == pytest.approx(1)
    assert rank_correlation(column((1, 30), (2, 20), (3, 10))) == pytest.approx(-1)
    assert rank_correlation(column((1, 1), (2, 3), (3, 2), (4, 4))) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    tied = column((0.3, 1), (0.1 + 0.2, 2), (1, 3))
    assert rank_correlation(tied) == pytest.approx(math.sqrt(3) / 2)
    assert rank_correlation(column((1, 1), (2, 3))) is None and rank_correlation(column((1, 1), (1, 3), (1, 2))) is None


def test_the_table_marks_what_is_not_reproduced(tmp_path):
    target = Target("trm:table9", "a title", "here", (), ())
    far = Cell("data", "final_accuracy", "far", (50.0, 51.0), 80.0, None)
    near = far._replace(row="near", paper=50.0)
    lost = far._replace(row="lost", ours=(), why="lost needs --x")
    text = markdown(target, [far, near, lost], {}, "fastmerge reproduce trm:table9")
    assert "| far | 50.5 ± 0.7 | 2 | 80.0 | -29.5 ± 0.9 | **no** |" in text
    assert "| near | 50.5 ± 0.7 | 2 | 50.0 | +0.5 ± 0.9 | yes |" in text
    assert "| lost | not run |  | 80.0 |  |  |" in text and "\nNot run: lost needs --x\n" in text
    save(target, [far, near, lost], {}, "c", tmp_path)
    assert outcome(tmp_path / "trm-table9.csv") == "1 of 2 numbers within two standard errors"
    save(target, [far, near, far._replace(row="high", ours=(90.0,), paper=85.0)], {"data": "`glyphs`"}, "c", tmp_path)
    assert (
        outcome(tmp_path / "trm-table9.csv") == "order of the rows: Spearman's rho 0.87"
    )  # ours 50.5 twice, 90: midranks
    small = markdown(target, [far], {"data": "`glyphs`"}, "c")
    assert "**no**" not in small and "## data (here: `glyphs`)" in small and "| far | 50.5 ± 0.7 | 2 | 80.0 |" in small


def test_a_table_of_our_own_by_hand(tmp_path):
    """A line for every row; differences to `against` are of the same seed."""
    target = Target("ours:x", "a title", "here", (), (), metrics=("final_accuracy", "kept_mib"), against="average")
    base = Cell("data", "final_accuracy", "average", (50.0, 60.0), None, None, seeds=("0", "1"))
    found = [base, base._replace(row="trm", ours=(51.0, 64.0)), base._replace(row="one", ours=(70.0,), seeds=("2",))]
    found += [base._replace(row="lost", ours=(), seeds=(), why="lost needs --x")]
    found += [
        cell._replace(metric="kept_mib", ours=cell.ours and (3.25,), seeds=cell.ours and ("0",)) for cell in found
    ]
    # differences 1 and 4: mean 2.5, deviation 3 / sqrt(2), error 1.5
    assert paired(target, found)[found[1]] == pytest.approx((2.5, 1.5)) and found[2] not in paired(target, found)
    other = found[1]._replace(seeds=("1", "5"))  # seed 1 alone is common: 51 - 60
    assert paired(target, [base, other])[other] == (-9.0, None)
    text = markdown(target, found, {}, "fastmerge reproduce ours:x")
    assert "| row | seeds | final accuracy (%) | minus `average` | kept (MiB) |\n" in text
    assert "| `trm` | 2 | 57.5 ± 9.2 | +2.50 ± 1.50 | 3.2 |\n" in text
    assert "| `lost` | not run |  |  |  |\n" in text and "\nNot run: lost needs --x\n" in text
    save(target, found, {}, "c", tmp_path)
    assert "medians" not in text
    slow = base._replace(metric="train_seconds", ours=(10.0, 11.0, 700.0))
    beside = dataclasses.replace(target, beside=("trm:table3", "ImageNet-R, 10 tasks"), metrics=("final_accuracy",))
    text = markdown(beside, [base._replace(paper=79.3)], {}, "c")
    assert "| average | 55.0 ± 7.1 | 2 | 79.3 |\n" in text and "differ by what the data are" in text
    timed = dataclasses.replace(target, metrics=("train_seconds",), against="")
    text = markdown(timed, [slow], {}, "c")
    assert "| `average` | 3 | 11 |" in text and "Seconds and peak memory are medians" in text
    row = next(r for r in csv.DictReader(open(tmp_path / "ours-x.csv")) if r["row"] == "trm")
    assert (row["data"], row["reproduced"], float(row["difference"]), float(row["error"])) == ("", "", 2.5, 1.5)
    assert outcome(tmp_path / "ours-x.csv") == "highest final accuracy: data: `one` 70.0"
    shown = index(tmp_path, [target])
    assert shown.index("# Tables of our own") < shown.index(
        "| [`ours:x`](ours-x.md) | a title | highest final accuracy"
    )


def test_real_images_are_found_under_the_data_root(tmp_path):
    own, rest, targets = _parsed(["ours:frozen", "--small", "--data-root", str(tmp_path)])
    job = reproduce.Job(own, rest, targets)
    words = {part.column.name: job.words(part) for part in job.trainings()}
    assert str(tmp_path / "caltech101") in words["photographs, linear head"] and job.seeds(targets[0]) == [0, 1, 2]
    assert "--data-root" not in words["characters"]
    assert job.command(targets[0]) == "fastmerge reproduce ours:frozen --small --data-root DIR"
    assert not any(target.ours for target in _parsed(["--all"])[2])


def test_targets_share_the_commands_of_a_folder():
    job = reproduce.Job(*_parsed(["--all", "--small"]))
    parts = job.together()
    assert len(parts) == len({(part.column.folder, part.column.flags) for part in parts}) < len(job.trainings())
    runs = {(part.column.folder, part.column.flags, spec) for part in parts for spec in part.specs}
    assert runs == {(part.column.folder, part.column.flags, spec) for part in job.trainings() for spec in part.specs}


@pytest.fixture
def table(monkeypatch):
    """A table of three rows and two columns, the second without its data."""
    rows = {"Zero-shot": "zero-shot", "Ours": "finetune", "Merged": "average", "Other": "magmax", "Words": "zero-shot"}
    columns = (Column("here", TRAIN, "here"), Column("nowhere", "--preset trm --dataset cifar100", "nowhere"))
    apart = {"Words": "--template '{}'"}
    target = Target(
        "trm:table1", "a table", "a section", columns, (), rows, needs={"Other": "--split-file"}, apart=apart
    )
    monkeypatch.setitem(TARGETS, "trm:table1", target)
    return target


def test_a_table_from_end_to_end(table, tmp_path, capsys, monkeypatch):
    data = image_folder(tmp_path / "data", classes=4, train=3, test=5)
    words = ["reproduce", "trm:table1", "--data-root", str(data), "--seeds", "0", "1", "--runs", str(tmp_path / "runs")]
    words += ["--out", str(tmp_path / "out"), "--protocol", "strict"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "not run" in shown.err and "--dataset cifar100" in shown.err and "--method finetune average" in shown.err
    rows = {(r["column"], r["row"]): r for r in csv.DictReader(open(tmp_path / "out" / "trm-table1.csv"))}
    assert len(rows) == 10 and "cifar100" in rows["nowhere", "Ours"]["why_not"]
    assert rows["here", "Other"]["why_not"] == "Other needs --split-file"
    assert not (tmp_path / "runs" / "here" / "magmax-strict-seed0").exists()
    for row, label in (("Ours", "finetune"), ("Merged", "average-strict")):
        from fastmerge.results import read_result

        ours = [
            read_result(tmp_path / "runs" / "here" / f"{label}-seed{s}" / "result.json")["final_accuracy"]
            for s in (0, 1)
        ]
        assert float(rows["here", row]["ours"]) == pytest.approx(sum(ours) / 2, rel=1e-5)
        assert rows["here", row]["seeds"] == "2"
    assert rows["here", "Zero-shot"]["seeds"] == rows["here", "Words"]["seeds"] == "1"
    assert (tmp_path / "runs" / "here-words" / "nearest-mean-seed0" / "result.json").exists()

    assert "| [`trm:table1`](trm-table1.md) | a table |" in (tmp_path / "out" / "index.md").read_text()

    bars = dataclasses.replace(table, columns=table.columns[:1], draw="bars {results}")
    monkeypatch.setitem(TARGETS, "trm:table1", bars)
    assert main([*words, "--only", "Ours", "Merged"]) == 0
    drawn = csv.DictReader(open(tmp_path / "out" / "trm-table1" / "bars.csv"))
    assert {row["method"] for row in drawn} == {"Ours", "Merged"}  # not the other runs of the folder

    written = tmp_path / "runs" / "here" / "finetune-seed0" / "result.json"
    before = written.stat().st_mtime_ns
    assert main([*words, "--only", "Ours"]) == 0 and written.stat().st_mtime_ns == before  # nothing is trained again
    rows = list(csv.DictReader(open(tmp_path / "out" / "trm-table1.csv")))
    assert {row["row"] for row in rows} == {"Ours"}
    other = dataclasses.replace(table, name="trm:table2", columns=table.columns[:1], rows={"Zero-shot": "zero-shot"})
    monkeypatch.setitem(TARGETS, "trm:table2", other)
    assert main([*words[:2], "trm:table2", *words[2:], "--only", "Ours"]) == 0
    assert not (tmp_path / "out" / "trm-table2.csv").exists()  # it has no such row


def test_a_process_of_several_trains_and_writes_no_table(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = image_folder(tmp_path / "data", classes=4, train=3, test=5)
    words = ["reproduce", "trm:table1", "--data-root", str(data), "--processes", "2", "--seeds", "0"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--protocol", "strict"]
    job = reproduce.Job(*_parsed(words[1:]))
    assert job.worker is None
    other = job.command_of_worker()
    assert other[3:5] == words[:2] and str(data) in other and other[-2:] == ["--protocol", "strict"]
    own, rest, targets = _parsed(other[4:])
    assert (own.processes, own.seeds, own.runs) == (2, [0], job.own.runs) and rest == [
        "--quiet",
        "--protocol",
        "strict",
    ]
    monkeypatch.setenv("FASTMERGE_REPRODUCE_WORKER", "1")
    worker = reproduce.Job(own, rest, targets)
    assert worker.worker == 1 and worker.run() == 0
    assert (
        job.own.runs / "here" / "finetune-seed0" / "result.json"
    ).exists() and not own.out.exists()  # it only trains


def _parsed(words):
    own, rest = reproduce.parsed(words)
    return own, rest, reproduce.chosen(own)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "name a table or figure"),
        (["trm:table1", "--all"], "name a table or figure"),
        (["trm:tabel1"], "Did you mean: trm:table1"),
        (["trm:table1", "--device", "cpu", "trm:tabel2"], "unknown target 'trm:tabel2'"),
        (["trm:table1", "--lr", "x"], "--lr x: expected a number"),
        (["trm:table1", "--only", "MagMix"], "Did you mean: MagMax"),
        (["trm:table1", "--processes", "0"], "at least 1"),
        (["trm:table1", "--epoch", "3"], "unknown flag --epoch"),
    ],
)
def test_bad_words_are_refused_before_anything_runs(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def values_of(action):
    """Values that the trainer's flag takes, as separate words."""
    flag = action.option_strings[0]
    for values in ((), ("1",), ("1", "2"), ("1", "2", "3"), ("text",)):
        with contextlib.suppress(UserError):
            read_flags([flag, *values])
            if values or action.nargs != "*":
                return values
    error = str(pytest.raises(UserError, read_flags, [flag, "?"]).value)
    return (error.partition("expected ")[2].split(" ")[0],)  # the first of the words that it takes


def test_every_flag_of_the_trainer_anywhere():
    """Before, between and after the targets, with its values as words of their own."""
    own = {word for action in reproduce.parser()._actions for word in action.option_strings}
    actions = [action for action in flag_parser()._actions if not own & {*action.option_strings}]
    assert len(actions) > 150
    for action in actions:
        given = [action.option_strings[0], *values_of(action)]
        for words in (
            [*given, "trm:table1", "trm:table2"],
            ["trm:table1", *given, "trm:table2"],
            ["trm:table1", "--seeds", "1", "2", "trm:table2", *given, "--small"],
        ):
            found, rest = reproduce.parsed(words)
            assert (found.targets, rest) == (["trm:table1", "trm:table2"], given)
    found, rest = reproduce.parsed(["--all", "--small", "--device", "cpu"])
    assert found.all and found.targets == [] and rest == ["--device", "cpu"]


def test_the_list_and_the_plan(capsys):
    assert main(["reproduce", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name} " in text for name in TARGETS)
    assert main(["reproduce", "trm:table3", "pam:table7", "--small", "--dry-run", "--only", "k", "LoRA-P&M"]) == 0
    text = capsys.readouterr().out
    assert "trm:table3 · ImageNet-R, 10 tasks: 1 run, 0.01 million images" in text  # 3600 x (2 + 1) epochs
    assert main(["reproduce", "trm:figure2", "--small", "--dry-run"]) == 0
    figure = capsys.readouterr().out
    assert "trm:figure2: trains the models of its figure, not counted" in figure and "in all 0 runs" in figure
    assert "pam:table7 · CIFAR-100, 10 tasks: 1 run" in text and "in all 3 runs" in text


@pytest.fixture
def broken(table, monkeypatch, tmp_path):
    """The words of a command whose first column of two fails in its second row, with the error that `raised` holds."""
    raised, begin = [ZeroDivisionError("in a step\nand more")], METHODS["average"].begin

    def fails(self, task):
        if "broken" in self.learner.config.run.run_dir:
            raise raised[0]
        return begin(self, task)

    monkeypatch.setattr(METHODS["average"], "begin", fails)
    monkeypatch.chdir(tmp_path)
    columns = (Column("broken", TRAIN, "broken"), table.columns[0])
    rows = {"Ours": "finetune", "Merged": "average", "Later": "magmax"}
    monkeypatch.setitem(TARGETS, "trm:table1", dataclasses.replace(table, columns=columns, rows=rows, needs={}))
    data = image_folder(tmp_path / "data", classes=4, train=3, test=5)
    words = ["reproduce", "trm:table1", "--data-root", str(data), "--seeds", "0", "--runs", "runs", "--out", "out"]
    return [*words, "--protocol", "strict"], raised


def why_not():
    return {(r["column"], r["row"]): (r["seeds"], r["why_not"]) for r in csv.DictReader(open("out/trm-table1.csv"))}


def test_a_column_that_fails(broken, capsys):
    words, raised = broken
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "not run: ZeroDivisionError: in a step\nby itself: python -m fastmerge" in error and "Traceback" in error
    whole = [("broken", "Ours"), ("broken", "Later"), *(("here", row) for row in ("Ours", "Merged", "Later"))]
    good = dict.fromkeys(whole, ("1", ""))
    assert why_not() == good | {("broken", "Merged"): ("0", "ZeroDivisionError: in a step")}
    assert "| Merged | not run |" in open("out/trm-table1.md").read()
    assert "Not run: ZeroDivisionError: in a step\n" in open("out/trm-table1.md").read()

    raised[0] = UserError("loss became nan")
    assert main(words) == 2
    assert why_not() == good | {("broken", "Merged"): ("0", "loss became nan")}
    assert "Traceback" not in capsys.readouterr().err


def test_an_untrained_model_needs_a_text_head(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TARGETS, "trm:table1", dataclasses.replace(table, columns=table.columns[:1]))
    data = image_folder(tmp_path / "data", classes=4, train=3, test=5)
    words = ["reproduce", "trm:table1", "--data-root", str(data), "--seeds", "0", "--runs", "runs", "--out", "out"]
    assert main([*words, "--only", "Zero-shot", "Ours", "--head", "prototype"]) == 0
    assert why_not() == {
        ("here", "Zero-shot"): ("0", "an untrained model has an accuracy with a text head alone"),
        ("here", "Ours"): ("1", ""),
    }


def test_a_column_that_fails_in_another_process(broken, capsys, monkeypatch):
    words, raised = broken
    with monkeypatch.context() as inside:
        inside.setenv("FASTMERGE_REPRODUCE_WORKER", "1")
        assert main([*words, "--processes", "2"]) == 1  # what that process does
    assert len(list(Path("runs").rglob("result.json"))) == 5 and not Path("out").exists()
    raised[0] = Busy("the other process works on it")  # when this one comes there first

    class Other:
        def wait(self):
            raised[0] = ZeroDivisionError("in a step")
            return -9

    monkeypatch.setattr(reproduce.Job, "start_others", lambda self: [Other()])
    assert main([*words, "--processes", "2"]) == 137
    assert "process 2 of 2 ended with code -9" in capsys.readouterr().err
    assert why_not()["broken", "Merged"] == ("0", "ZeroDivisionError: in a step")


@pytest.mark.slow
def test_two_processes_make_a_small_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "trm:table2 --small --only MagMax LwF --epochs 1 --batch-size 256 --seeds 0 --processes 2 --quiet".split()
    assert main(["reproduce", *words]) == 0
    rows = list(csv.DictReader(open("reproduced/trm-table2.csv")))
    assert len(rows) == 8 and all(row["ours"] and row["data"] != "the paper's" for row in rows)
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 8


def test_a_figure_is_drawn_once(tmp_path, monkeypatch, capsys):
    """A figure whose models the analysis trains: the second time its picture is kept, another command draws it again."""
    data = image_folder(tmp_path / "data", classes=4, train=3, test=5)
    words = f"{TRAIN} --data-root {data}"
    figure = Target(
        "trm:figure2", "a figure", "here", (Column("c", words, "c"),), (), draw="interpolate {flags} --points 2"
    )
    monkeypatch.setitem(TARGETS, "trm:figure2", figure)
    command = ["reproduce", "trm:figure2", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main(command) == 0
    (picture,) = (tmp_path / "out" / "trm-figure2").glob("*.png")
    before = picture.stat().st_mtime_ns
    assert main(command) == 0 and picture.stat().st_mtime_ns == before
    assert main([*command, "--seeds", "1"]) == 0 and picture.stat().st_mtime_ns != before
    nowhere = Target("trm:figure2", "a", "b", (Column("c", TRAIN, "c"),), (), draw="interpolate {flags}")
    monkeypatch.setitem(TARGETS, "trm:figure2", nowhere)
    capsys.readouterr()
    assert main([*command, "--data-root", str(tmp_path / "none")]) == 0
    error = capsys.readouterr().err
    assert "not drawn: data set 'folder'" in error and "with the data: python -m fastmerge analyse interpolate" in error


def test_processes_share_the_figures_that_train(tmp_path, monkeypatch):
    """Each draws its own ones, by the same words, so that the first process finds them drawn."""
    told = {}
    monkeypatch.setattr("fastmerge.analysis.__main__.analyse", lambda words: told[worker].append(words) or [])
    monkeypatch.setattr(reproduce.Job, "train", lambda self, again=False: 0)
    job = reproduce.Job(*_parsed(["--all", "--small", "--processes", "2", "--out", str(tmp_path / "out")]))
    for worker in (0, 1):
        told[worker] = []
        monkeypatch.setenv("FASTMERGE_REPRODUCE_WORKER", str(worker))
        other = job if worker == 0 else reproduce.Job(*_parsed(job.command_of_worker()[4:]))
        other.draw_share()
    whole = [target.name for target in job.targets if "{flags}" in target.draw]
    assert len(whole) == len(told[0]) + len(told[1]) and abs(len(told[0]) - len(told[1])) < 2
    alone = reproduce.Job(*_parsed(["--all", "--small", "--out", str(tmp_path / "out")]))
    alone.draw_share()  # a single process draws all of them at the end
    assert len(told[1]) < len(whole)
    told[worker := 2] = []
    for target in alone.targets:
        if "{flags}" in target.draw:
            alone.draw(target)
    assert sorted(told[2]) == sorted(told[0] + told[1])


def test_a_stopped_command_stops_its_other_processes(table, tmp_path, monkeypatch):
    told = []

    class Other:
        def terminate(self):
            told.append("terminate")

        def wait(self):
            told.append("wait")

    job = reproduce.Job(*_parsed(["trm:table1", "--runs", str(tmp_path / "runs"), "--processes", "2"]))
    monkeypatch.setattr(job, "start_others", lambda: [Other()])
    monkeypatch.setattr(job, "train", lambda: 130)
    assert job.run() == 130 and told == ["terminate", "wait"]
