"""Compare the time left and the final table with numbers computed by hand."""

import io
import types

import numpy as np
import pytest

from fastmerge.console import Console, Work
from fastmerge.plan import Run
from fastmerge.report import clock, growth, number, results_markdown, results_rows, results_table


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
    assert w.seconds_left() is None and w.fraction() == 0
    w.done(0, "train", 90, 9.0)  # 0.1 s per image; a merge image counts as 4 of them, an evaluated one as 0.3
    assert w.seconds_left() == pytest.approx(0.1 * (60 * 4 + 14 * 0.3 + 90 + 14 * 0.3))
    w.done(0, "merge", 60, 60.0)  # measured: 1 s per image
    assert w.seconds_left() == pytest.approx(0.1 * 90 + 28 * 0.3 * (0.1 + 0.25) / 2)
    for run, left in enumerate(w.remaining):
        for kind, images in dict(left).items():
            w.done(run, kind, images, 1.0)
    assert w.fraction() == 1 and w.seconds_left() == 0


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
    console.rich.print(results_table(rows))
    text = out.getvalue()
    assert "55.0 ± 7.1" in text and "01:01" in text and "30.0" in text and "1.0 MiB" in text and "2 MiB" in text
    lines = results_markdown(rows).splitlines()
    assert lines[1].count("--") == lines[0].count("|") - 1 and lines[3].startswith("| trm | 2 | 55.0 ± 7.1 |")
