"""The table of several run folders."""

import json

import pytest

from fastmerge.__main__ import main as command
from fastmerge.commands.table import differing, joined_rows
from fastmerge.evaluate import metrics
from fastmerge.results import names


def main(argv):
    return command(["table", *argv])


def result(matrix, seconds=1.0):
    counts = [10] * len(matrix)
    about = {"accuracy_matrix": matrix, "test_counts": counts, "kept_bytes": [2**20], "peak_memory_bytes": 2**21}
    return metrics(matrix, counts) | about | {"seconds": {"train": seconds, "merge": 0.0, "evaluate": 0.0}, "also": {}}


def folder(path, method="trm", matrices=([[80.0, None], [60.0, 90.0]],), lr=0.1):
    for seed, matrix in enumerate(matrices):
        (path / f"{method}-seed{seed}").mkdir(parents=True, exist_ok=True)
        (path / f"{method}-seed{seed}" / "result.json").write_text(json.dumps(result(matrix)))
    about = {"settings": {"training.lr": lr}, "contents": {"images": "x"}, "runs": {}}
    (path / "manifest.json").write_text(json.dumps({"determines": about}))
    return path


def test_table_by_hand(tmp_path, capsys):
    a = folder(tmp_path / "a", matrices=([[80.0, None], [60.0, 90.0]], [[80.0, None], [64.0, 90.0]]))
    folder(a, "average-strict")
    starting = result([[50.0, None], [40.0, 42.0]])
    (a / "results.json").write_text(json.dumps({"methods": {"old": {"0": result([[1.0]])}}, "zero_shot": starting}))
    b = folder(tmp_path / "b" / "c", lr=0.2)
    rows = joined_rows([a, b])
    assert rows[0][:5] == ["run", "method", "seeds", "final acc", "AAA"]
    assert [row[:4] for row in rows[1:]] == [
        ["a", "zero-shot", "", "41.0"],
        ["a", "average-strict", "1", "75.0"],
        ["a", "trm", "2", "76.0 ± 1.4"],
        ["c", "trm", "1", "75.0"],
    ]
    assert main([str(a), str(b), str(a)]) == 0
    out = capsys.readouterr().out
    assert out.count("76.0 ± 1.4") == 1 and "the runs differ in: training.lr\n" in out and "…" not in out
    assert differing([a]) == [] == differing([b, folder(tmp_path / "d", lr=0.2)])


def test_a_results_file_alone(tmp_path, capsys):
    folder(tmp_path / "a")
    alone = tmp_path / "elsewhere" / "results.json"
    alone.parent.mkdir()
    alone.write_text(json.dumps({"methods": {"ties-full": {"3": result([[70.0]])}}}))
    assert main([str(alone), str(tmp_path / "a")]) == 0
    assert "ties-full" in capsys.readouterr().out


def test_names_tell_folders_apart(tmp_path):
    assert names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object"),
        ("{", "cannot be read"),
        ("{}", "methods is missing"),
        ('{"methods": {"trm": {"0": null}}}', "expected an object with"),
        ('{"methods": {}}', "contains no finished run"),
        ('{"methods": {"trm": []}}', "trm is not an object of seeds"),
        ('{"methods": {"trm": {"0": {}}}}', "final_accuracy is missing"),
        ('{"methods": {"trm": {"0": RESULT}}, "zero_shot": []}', "expected an object"),
    ],
)
def test_other_files(text, message, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(text.replace("RESULT", json.dumps(result([[70.0]]))))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and len(error.splitlines()) == 1


def test_no_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "contains no finished run" in capsys.readouterr().err
    assert main([str(tmp_path / "no")]) == 2 and "no such run folder" in capsys.readouterr().err
    assert main([]) == 2
