"""The time left and the final table, against numbers worked out by hand."""

import io
import os
import types

import numpy as np
import pytest

from fastmerge.console import Console, Work
from fastmerge.output import Stream
from fastmerge.plan import Run
from fastmerge.report import LEAST, clock, growth, number, results_markdown, results_rows


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
    w.done(0, "train", 90, 9.0)  # 0.1 s an image; a merge image is taken for 4 of them, an evaluated one for 0.3
    assert w.seconds_left() == pytest.approx(0.1 * (60 * 4 + 14 * 0.3 + 90 + 14 * 0.3))
    w.done(0, "merge", 60, 60.0)  # measured: 1 s an image
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
    console.table(rows)
    text = out.getvalue()
    assert "55.0 ± 7.1" in text and "01:01" in text and "30.0" in text and "1.0 MiB" in text and "2 MiB" in text
    lines = results_markdown(rows).splitlines()
    assert lines[1].count("--") == lines[0].count("|") - 1 and lines[3].startswith("| trm | 2 | 55.0 ± 7.1 |")


ROWS = [
    "method,seeds,final acc,AAA,forgetting,plasticity,train,merge,peak memory,kept,grows".split(","),
    ["task-arithmetic-running(scale=0.5)", "3", "64.9 ± 0.4", "78.1 ± 0.2", "18.0 ± 1.0", *["79.3 ± 0.5"] * 5, "Θ(1)"],
    ["task-arithmetic-running(scale=0.6)", "3", "64.8 ± 0.4", "78.1 ± 0.2", "18.0 ± 1.0", *["79.3 ± 0.5"] * 5, "Θ(1)"],
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
