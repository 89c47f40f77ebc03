"""Compare the time left and the final table with numbers computed by hand."""

import io
import os
import types

import numpy as np
import pytest

from fastmerge.console import Console, Work
from fastmerge.output import Stream
from fastmerge.plan import Run
from fastmerge.report import LEAST, below, clock, comparison, growth, number, results_markdown, results_rows


def scenario(kind="cil"):
    """Two tasks with 10 and 20 training images, 4 and 6 test images."""
    sizes = ((10, 4), (20, 6))
    tasks = [types.SimpleNamespace(index=i, train=np.arange(a), test=np.arange(b)) for i, (a, b) in enumerate(sizes)]
    return types.SimpleNamespace(kind=kind, tasks=tasks)


def work(kind="cil"):
    epochs = {"train": 3, "merge": 2}
    return Work(
        [
            Run("trm", "trm", None, 0, None, scenario(kind), epochs, None),
            Run("finetune", "finetune", None, 0, None, scenario(kind), epochs | {"merge": 0}, "sequential"),
        ]
    )


def test_work_by_hand():
    w = work()
    assert w.remaining == [{"train": 90, "merge": 60, "evaluate": 4 + 10}, {"train": 90, "merge": 0, "evaluate": 14}]
    assert work("dil").remaining[0]["evaluate"] == 20
    assert w.of(0, task=1, phase=1) == {"train": 0, "merge": 40, "evaluate": 10}
    assert w.seconds_left() is None and w.fraction() == 0 and w.left(0) == ""
    w.done(0, "train", 5, 1000.0)  # the first step compiles: it says nothing
    for _ in range(4):
        w.done(0, "train", 5, 0.5)
    assert w.cost("trm", "train") is None
    w.done(0, "train", 5, 0.5)  # the fifth: 0.1 s an image
    assert w.cost("trm", "train") == pytest.approx(0.1) == w.cost("finetune", "train")
    assert w.cost("finetune", "evaluate") == pytest.approx(0.03)
    assert w.seconds_left() is None and w.left(0) == ""  # a merge was not measured
    assert w.seconds_left(1) == pytest.approx(0.1 * (90 + 14 * 0.3)) and w.left(1) == "00:09 left in run 2 of 2"
    w.at(0, 1)  # the first task needed no merge
    assert w.remaining[0] == {"train": 60, "merge": 40, "evaluate": 10}
    for _ in range(2):
        w.done(0, "merge", 10, 6.0)  # slow: known after a few seconds
    assert w.seconds_left() == pytest.approx(20 * 0.6 + 0.1 * (60 + 10 * 0.3 + 90 + 14 * 0.3))
    assert w.left(0) == f"{clock(w.seconds_left())} left"
    for run, left in enumerate(w.remaining):
        for kind, images in dict(left).items():
            w.done(run, kind, images, 1.0)
    assert w.fraction() == 1 and w.seconds_left() == 0


def test_a_phase_that_takes_other_images_than_planned_is_learned():
    w = work()
    for _ in range(10):
        w.done(1, "train", 3, 0.3)
        w.done(1, "evaluate", 4, 0.04)  # every image in several ways
    w.at(1, 1)
    assert w.share == {("finetune", "train"): 1.0, ("finetune", "evaluate"): 10.0}
    assert w.seconds_left(1) == pytest.approx(60 * 0.1 + 10 * 10 * 0.01)
    w.at(1, 1, 0, 3)  # continues within a task: what was done of it before is not known
    w.done(1, "train", 3, 0.3)
    w.at(1, 2)
    assert w.share["finetune", "train"] == 1.0


def test_the_time_left_is_right_or_not_told():
    """A command of two methods, simulated: a first step that compiles, merges 20 times as dear as training."""
    seconds = {"train": 0.1, "merge": 2.0, "evaluate": 0.02}
    tasks = [types.SimpleNamespace(index=i, train=np.arange(100), test=np.arange(20)) for i in range(5)]
    five = types.SimpleNamespace(kind="cil", tasks=tasks)
    epochs = {"trm": {"train": 3, "merge": 1}, "finetune": {"train": 3, "merge": 0}}
    w = Work([Run(name, name, None, 0, None, five, epochs[name], None) for name in epochs])
    steps = []  # (run, task, kind, images, seconds)
    for run in range(2):
        for task in range(5):
            left = w.per_task[run][task] | ({"merge": 0} if task == 0 else {})
            for kind, images in left.items():
                first = 60.0 * ((task, kind) in ((0, "train"), (1, "merge")))
                steps += [(run, task, kind, 10, 10 * seconds[kind] + first * (k == 0)) for k in range(images // 10)]
    told, now = 0, (0, 0)
    for k, (run, task, kind, images, took) in enumerate(steps):
        if (run, task) != now:
            w.at(run, task)
            now = run, task
        w.done(run, kind, images, took)
        truth = sum(step[-1] for step in steps[k + 1 :])
        if (guess := w.seconds_left()) is not None:
            told += 1
            assert guess == pytest.approx(truth, rel=0.05, abs=125)  # the two compilations of the second method
    assert told > len(steps) / 2


@pytest.mark.parametrize(("steps", "batches", "epochs"), [(6, 6, 2), (7, 6, 2), (4, 3, 1), (2, 3, 1), (1, 3, 1)])
def test_epochs_are_counted_to_their_number(steps, batches, epochs):
    """A phase may end with a step without images (P&M's merge), or take a part of an epoch (a Fisher of few images)."""
    out = io.StringIO()
    console = Console(file=out)
    console.start(work_runs := [Run("pam", "pam", None, 0, None, scenario(), {"train": 0, "merge": 1}, None)])
    console.run, console._clock = 0, 0.0

    def rows(i):
        assert i < batches
        return range(3)

    phase = types.SimpleNamespace(steps=steps, batches=types.SimpleNamespace(steps=batches, per_epoch=3, rows=rows))
    for i in range(steps):
        console._printed = -1e9
        console.step(work_runs[0].scenario.tasks[0], "merge", i, phase, {"loss": 1.0})
    shown = [line.split("epoch ")[1].split(" ")[0] for line in out.getvalue().splitlines()]
    assert shown == [f"{min(i // 3, epochs - 1) + 1}/{epochs}" for i in range(steps)]


def test_clock_and_number():
    assert [clock(s) for s in (None, 0, 61.4, 3725)] == ["--:--", "00:00", "01:01", "1:02:05"]
    assert number([1.0, 3.0]) == "2.0 ± 1.4" and number([None]) == "–" and number([5.0]) == "5.0"


def test_growth_is_per_task():
    model = 1000
    assert growth([2 * model] * 5) == "Θ(1)" and growth([model]) == "–"
    assert growth([model, 2 * model, 3 * model]) == "Θ(T)"
    assert growth([model, model + 5, model + 10]) == "Θ(1)"  # the rows of a linear head


def test_table_and_quiet():
    def result(accuracy):
        names = ("final_accuracy", "aaa", "forgetting", "bwt", "plasticity")
        rest = {"seconds": {"train": 61.0, "merge": 2.0}, "peak_memory_bytes": 2**21, "kept_bytes": [2**20, 2**20]}
        return dict.fromkeys(names, accuracy) | rest

    out = io.StringIO()
    console = Console(quiet=True, file=out)
    console.line("not shown")
    assert out.getvalue() == ""
    starting = {"final_accuracy": 30.0, "aaa": 40.0}
    rows = results_rows({"trm": {"0": result(50.0), "1": result(60.0)}}, starting)
    console.table(rows)
    text = out.getvalue()
    assert "55.0 ± 7.1" in text and "01:01" in text and "30.0" in text and "1.0 MiB" in text and "2 MiB" in text
    lines = results_markdown(rows).splitlines()
    assert lines[1].count("--") == lines[0].count("|") - 1 and lines[3].startswith("| trm | 2 | 55.0 ± 7.1 |")


ROWS = [
    "method,seeds,final acc,AAA,forgetting,plasticity,FWT,train,merge,peak memory,kept,grows".split(","),
    ["task-arithmetic-running(scale=0.5)", "3", "64.9 ± 0.4", "78.1 ± 0.2", "18.0 ± 1.0", *["79.3 ± 0.5"] * 6, "Θ(1)"],
    ["task-arithmetic-running(scale=0.6)", "3", "64.8 ± 0.4", "78.1 ± 0.2", "18.0 ± 1.0", *["79.3 ± 0.5"] * 6, "Θ(1)"],
]


def printed(width, encoding="utf-8"):
    """What a terminal of this many columns shows (None: a file)."""
    raw = io.BytesIO()
    stream = Stream(io.TextIOWrapper(raw, encoding=encoding))
    console = Console(file=stream)
    if width is not None:
        console.rich._force_terminal, console.rich.width, console.rich.no_color = True, width, True
    console.table(ROWS)
    console.line("Θ · ± – … é \udcff \u65e5")
    stream.flush()
    assert stream.failed is None
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200, None])
def test_the_table_fits_and_nothing_in_it_is_cut(width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    text = printed(width)
    table = [line for line in text.splitlines() if line[0] in "┏┃┡│└"]
    titles = table[1].replace("┃", " ")
    shown = [k for k, title in enumerate(ROWS[0]) if title in titles]
    assert {0, 2} <= set(shown)
    for row, line in zip(ROWS[1:], table[3:5], strict=True):
        assert [cell.strip() for cell in line.strip("│").split("│")] == [row[k] for k in shown]
        assert line.index("64.") == table[3].index("64.") and len(line) == len(table[0])
    assert len(table[0]) <= (width or 1000) or len(shown) == 2  # 40 columns are too few for these names: wider, not cut
    missing = [title for k, title in enumerate(ROWS[0]) if k not in shown]
    assert missing == [] if width in (200, None) else set(missing) == set(LEAST[: len(missing)])
    assert (", ".join(missing) in text) and ("results.md" in text) == bool(missing)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252"])
def test_every_encoding_shows_the_table_aligned(encoding):
    lines = printed(None, encoding).splitlines()
    assert len({len(line) for line in lines[:6]}) == 1
    assert ("Θ(1)" if encoding == "utf-8" else "O(1)") in lines[3]
    assert ("64.9 ~ 0.4" if encoding == "ascii" else "64.9 ± 0.4") in lines[3]


def test_a_stream_that_cannot_be_written_is_told_from_a_reader_that_left():
    read, write = os.pipe()
    os.close(read)
    gone = Stream(os.fdopen(write, "w"))
    full = Stream(open("/dev/full", "w"))
    for stream in (gone, full):
        Console(file=stream).table(ROWS)
        print("more", file=stream, flush=True)
        stream.close()  # nothing is left in the buffer to fail again
    assert isinstance(gone.failed, BrokenPipeError) and gone.lost is None
    assert full.lost is not None and "No space left" in str(full.lost)


def test_a_method_below_the_starting_model_is_named():
    def ends(**final):
        return {name: {"0": {"final_accuracy": a}, "1": {"final_accuracy": a + 2}} for name, a in final.items()}

    results = ends(trm=59.0, finetune=39.0, ewc=49.0) | {"nearest-mean": {"0": {"final_accuracy": 55.0}}}
    starting = {"final_accuracy": 45.0}
    assert below(results, starting) == [
        "finetune ends at 40.0 %, below zero-shot (45.0 %) and nearest-mean (55.0 %): "
        "the starting model does better without this training",
        "ewc ends at 50.0 %, below nearest-mean (55.0 %): the starting model does better without this training",
    ]
    assert below(ends(trm=59.0), None) == []
    assert comparison(results, starting) == (
        "trm ends at 60.0 % (+15.0 against zero-shot, +20.0 against plain fine-tuning, +5.0 against nearest-mean); "
        "finetune ends at 40.0 % (-5.0 against zero-shot, -15.0 against nearest-mean); "
        "ewc ends at 50.0 % (+5.0 against zero-shot, +10.0 against plain fine-tuning, -5.0 against nearest-mean)"
    )
    many = ends(trm=59.0, finetune=39.0, ewc=49.0, lwf=48.0, cmm=61.0, joint=90.0)
    assert comparison(many, None) == "best: cmm ends at 62.0 % (+22.0 against plain fine-tuning)"
    alone = {"nearest-mean": {"0": {"final_accuracy": 55.0}}}
    assert comparison(alone, starting) == "nearest-mean ends at 55.0 % (+10.0 against zero-shot)"
