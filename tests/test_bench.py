"""bench/: compare.py, table.py and gate.py on hand-made runs, and a quick subset of the suites end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fastmerge_kernels as fk
import pytest

ROOT = Path(__file__).resolve().parent.parent


# no row of their own: steps of magnitude_threshold, arithmetic on one number per segment, and another name of axpy
NO_ROW = {"magnitude_digit", "magnitude_histogram", "stock_ratio", "perturb"}


def run(*command, **keywords):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}  # no worker
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, **keywords
    )


def write(path, **rows):
    """Write a run; rows are name=(x_copy or None, seconds)."""
    benchmarks = [
        {"name": name, "extra_info": {"x_copy": x}, "stats": {"min": s, "median": 1.1 * s, "rounds": 3}}
        for name, (x, s) in rows.items()
    ]
    machine = {"node": "secret-host", "versions": {"torch": "2.9"}, "threads": 1, "cpu": {"brand_raw": "A CPU"}}
    run = {"machine_info": machine, "commit_info": {"id": "abc"}, "datetime": "2026-01-01T00:00:00"}
    path.write_text(json.dumps(run | {"benchmarks": benchmarks}))
    return path


def test_every_op_has_a_row():
    text = "".join(path.read_text() for path in (ROOT / "bench").glob("test_speed_*.py"))
    missing = {name for name in fk.__all__ if not re.search(rf"\bfk\.{name}\b", text)}
    assert missing == NO_ROW, f"add a row to bench/test_speed_*.py: {missing - NO_ROW}; has one now: {NO_ROW - missing}"


@pytest.fixture
def old(tmp_path):
    return write(tmp_path / "old.json", lerp=(1.0, 1.0), search=(None, 2.0), gone=(1.0, 1.0))


def test_compare_passes_when_only_the_machine_is_slower(old, tmp_path):
    new = write(tmp_path / "new.json", lerp=(1.1, 3.0), search=(None, 2.2), added=(9.0, 9.0))
    result = run("bench/compare.py", old, new)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 of 2 rows slower" in result.stdout
    assert "gone  only in OLD" in result.stdout and "added  only in NEW" in result.stdout


def test_compare_flags_a_row_slower_relative_to_copy(old, tmp_path):
    new = write(tmp_path / "new.json", lerp=(1.3, 1.0), search=(None, 1.0))
    result = run("bench/compare.py", old, new)
    assert result.returncode == 1
    assert "1.30  lerp  SLOWER" in result.stdout and "0.50  search  faster" in result.stdout
    assert run("bench/compare.py", old, new, "--threshold", "1.4").returncode == 0
    assert run("bench/compare.py", old, new, "--by", "min").returncode == 0


def test_compare_flags_a_row_without_a_copy_by_its_time(old, tmp_path):
    new = write(tmp_path / "new.json", search=(None, 3.0))
    assert run("bench/compare.py", old, new).returncode == 1


def test_compare_says_what_is_wrong_with_its_input(old, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("[1]")
    for other, message in ((broken, "--benchmark-json"), (write(tmp_path / "x.json", a=(1, 1)), "no row in common")):
        result = run("bench/compare.py", old, other)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_table_strips_the_machine_and_compare_reads_the_result(old, tmp_path):
    stripped = tmp_path / "stripped.json"
    result = run("bench/table.py", old, "--strip", stripped)
    assert result.returncode == 0, result.stderr
    assert "A CPU, 1 thread(s); torch 2.9; commit abc; 2026-01-01" in result.stdout
    assert "secret-host" not in stripped.read_text()
    assert run("bench/compare.py", old, stripped).returncode == 0


def gate(baseline, *measured, limit="2.5"):
    """Run bench/gate.py on hand-made runs, one per measurement; return (exit code, nodes measured again)."""
    runs, asked = iter(measured), []

    def measure(*nodes):
        asked.append(nodes)
        return next(runs)

    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import gate as module
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return module.main(["--baseline", str(baseline), "--limit", limit], measure), asked[1:]


def measured(**ratios):
    rows = [
        {"name": name, "fullname": f"bench/x.py::{name}", "extra_info": {"x_copy": x}} for name, x in ratios.items()
    ]
    return {"benchmarks": rows}


@pytest.fixture
def baseline(tmp_path):
    return write(tmp_path / "baseline.json", lerp=(1.0, 1.0), ties=(2.0, 2.0))


def test_gate_passes_an_equal_run_and_one_below_the_limit(baseline, capsys):
    assert gate(baseline, measured(lerp=1.0, ties=2.0)) == (0, [])
    assert gate(baseline, measured(lerp=2.4, ties=0.5)) == (0, [])
    assert "no row's ratio to a copy grew 2.5-fold" in capsys.readouterr().out


def test_gate_fails_a_row_that_is_slow_twice(baseline, capsys):
    assert gate(baseline, measured(lerp=2.6, ties=2.0), measured(lerp=2.7)) == (1, [("bench/x.py::lerp",)])
    assert "lerp: 2.60 copies, 2.60 times the 1.00 of baseline.json; the limit is 2.5" in capsys.readouterr().out


def test_gate_passes_a_row_that_was_slow_once(baseline):
    assert gate(baseline, measured(lerp=9.0, ties=2.0), measured(lerp=1.1)) == (0, [("bench/x.py::lerp",)])


@pytest.mark.parametrize(
    "ratios, message",
    [({"lerp": 1.0}, "ties: in baseline"), ({"lerp": 1.0, "ties": 2.0, "new": 1.0}, "new: in this run")],
)
def test_gate_names_a_row_that_only_one_run_has(baseline, capsys, ratios, message):
    assert gate(baseline, measured(**ratios))[0] == 1
    assert message in capsys.readouterr().out


def test_gate_baseline_names_no_machine():
    committed = json.loads((ROOT / "bench/results/cpu-quick.json").read_text())
    assert "node" not in committed["machine_info"] and all("fullname" not in row for row in committed["benchmarks"])
    assert all(row["extra_info"]["x_copy"] > 0 for row in committed["benchmarks"])


def test_quick_rows_are_complete(tmp_path):
    path = tmp_path / "run.json"
    suites = ("bench/test_speed_one_pass.py", "bench/test_speed_random.py", "bench/test_speed_rules.py")
    flags = ("--quick", "--device=cpu", "-k", "axpy or dare_delta or random_mix", f"--benchmark-json={path}")
    result = run("-m", "pytest", "-p", "no:cacheprovider", *suites, *flags, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    recorded = json.loads(path.read_text())
    assert "node" not in recorded["machine_info"]
    rows = {row["name"]: row["extra_info"] for row in recorded["benchmarks"]}
    assert len(rows) == 3
    for name, row in rows.items():
        assert row["size"] == "1M" and row["device"] == "cpu", name
        assert row["ms"] > 0 and row["GB/s"] > 0 and row["speedup_eager"] > 0, (name, row)
        assert row["x_copy"] * row["copy_fraction"] == pytest.approx(1, rel=0.05)
        assert row["GB/s"] * row["ms"] == pytest.approx(12 * row["n"] / 1e6, rel=0.05)  # two reads, one write of fp32


def test_unknown_size_is_named():
    result = run("-m", "pytest", "bench/test_speed_one_pass.py", "--sizes=3M")
    assert result.returncode == 4 and "expected of 1M, 22M, 86M, 1B, got 3M" in result.stderr


def test_plain_pytest_does_not_collect_the_benchmarks(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
