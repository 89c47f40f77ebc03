"""bench/gpu.py: its parts on the CPU with small sizes, and its table from made-up measurements."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import gpu  # noqa: E402
import test_speed_one_pass  # noqa: E402
import test_speed_random  # noqa: E402
import test_speed_rules  # noqa: E402

CPU = torch.device("cpu")


def op(name="lerp", kind="one pass", kernel=1e-3, copy=0.95e-3):
    row = {"op": name, "kind": kind, "size": "86M", "dtype": "fp32", "bytes": 10**9}
    return row | {"kernel_s": kernel, "copy_s": copy, "call_s": 2e-3}


def rate(step, images, **more):
    row = {"step": step, "precision": "bf16", "compile": False, "batch": 128}
    return row | ({"images_per_s": images, "seconds": 128 / images, "peak_bytes": 2**34} if images else {}) | more


def record(**parts):
    return {"gpu": "A GPU", "versions": {"torch": "2.14", "timm": None}, "commit": "abc", "parts": parts}


def test_the_table_says_what_was_measured_and_what_was_not():
    ops = [op(), op("dare_delta", "random", copy=0.80e-3), op("axpy", kernel=None, copy=None)]
    tests = {"exit": 1, "passed": 7, "failed": 1, "names": ["tests/x.py::test_y"]}
    rates = [rate("train", 1000.0), rate("search", None, not_measured="OutOfMemoryError: no"), rate("evaluate", 4000.0)]
    text = gpu.markdown(record(**{"1": {"tests": tests}, "2": {"ops": ops}, "5": {"rates": rates}}), 15, 5)
    assert "A GPU; torch 2.14, timm n/a; commit abc." in text
    assert "Not measured: parts 3 (ops with random numbers), 4 (rules over 8 models), 6 (the same, compiled)." in text
    assert "7 passed, 1 failed, 0 error, 0 skipped: tests/x.py::test_y." in text
    assert "| lerp | 86M | fp32 | 1.000 | 2.000 | 1000 | 0.95 | 0.90 |" in text
    assert "| dare_delta | 86M | fp32 | 1.000 | 2.000 | 1000 | 0.80 | 0.85 missed |" in text
    assert "| axpy | 86M | fp32 | n/a | 2.000 | n/a | n/a | 0.90 |" in text
    assert "| search | bf16 | no | 128 | n/a | n/a | n/a | OutOfMemoryError: no |" in text
    assert "| bf16 | 5.3 | n/a | 0.4 | n/a |" in text  # an unknown rate makes no sum


def test_projected_hours_are_images_by_rates():
    ((name, hours),) = gpu.projection([rate("train", 1000.0), rate("search", 500.0), rate("evaluate", 4000.0)], 15, 5)
    tests = sum(500 * t for t in range(1, 101)) + 50_000
    expected = (15 * 1_281_167 / 1000, 5 * 0.99 * 1_281_167 / 500, (2 * 0.99 * 1_281_167 + tests) / 4000)
    assert name == "bf16" and hours["sum"] == pytest.approx(sum(expected) / 3600)
    assert [hours[k] * 3600 for k in ("train", "search", "evaluate")] == pytest.approx(expected)


def test_parts_are_joined_in_one_file(tmp_path):
    path = tmp_path / "gpu.json"
    for part in ("2", "3"):
        found = gpu.read(path, "A GPU")
        found["parts"][part] = {"ops": [op(f"op{part}")]}
        gpu.write(path, found)
    text = path.with_suffix(".md").read_text()
    assert "| op2 |" in text and "| op3 |" in text and "Not measured: parts 1" in text
    other = json.loads(path.read_text()) | {"commit": "another"}
    path.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="commit another; this is A GPU"):
        gpu.read(path, "A GPU")


@pytest.mark.parametrize(
    "suite, case",
    [
        ("one pass", test_speed_one_pass.lerp),
        ("random", test_speed_random.dare_delta),
        ("rules", test_speed_rules.average),
    ],
)
def test_ops_are_timed(suite, case):
    row = gpu.op_row(case, suite, CPU, "1M", "fp32")
    assert row["call_s"] > 0 and row["kernel_s"] is None and row["kind"] in gpu.TARGETS
    assert f"| {row['op']} | 1M | fp32 | n/a |" in gpu.markdown(record(**{"2": {"ops": [row]}}), 15, 5)


@pytest.mark.parametrize("kind", ["train", "search", "evaluate"])
def test_rates_are_measured(kind):
    found = gpu.rate(kind, "tiny", 8, "bf16", False, CPU, 1)
    assert found["images_per_s"] * found["seconds"] == pytest.approx(8) and found["peak_bytes"] is None


def test_a_step_that_fails_is_noted(monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(gpu, "rate", fail)
    rows = gpu.rates(CPU, True, "tiny", 8, 1)["rates"]
    assert {row["not_measured"] for row in rows} == {"RuntimeError: out of memory"} and len(rows) == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "torch sees no CUDA device; nothing was measured" in capsys.readouterr().err
