"""docs/SCALE.md says what scripts/scale.py counts, and the counts agree with those of the trainer."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "scripts" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counts_of(page):
    rows = re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \|$", page, re.M)
    return {name: {"flops": float(flops) * 1e9, "calls": int(calls.replace(",", ""))} for name, flops, _, calls in rows}


def test_the_hours_follow_from_the_counts_of_the_page(scale):
    page = scale.PAGE.read_text()
    steps, weights = counts_of(page), 86_192_640
    units = [steps[name]["flops"] / steps["forward"]["flops"] for name in ("train", "search", "search in parts")]
    assert [round(u) for u in units] == [3, 9, 12]  # as tests/test_trm_objective.py counts in the trainer
    for gpus in (1, 8, 64):
        for host in (True, False):
            name = f"{gpus} GPU{'s' * (gpus > 1)}" + ("" if host else ", host hidden")
            (cells,) = re.findall(rf"^\| {name} \| (.*) \|$", page, re.M)
            shown = [float(n) for n in re.findall(r"([\d.]+) h", cells)]
            found = list(scale.hours(gpus, weights, steps, host).values())
            assert shown == pytest.approx([*found, sum(found)], abs=0.011)
    # by hand: products of training on one GPU, at 40 % of the peak, and the memory traffic of 150,137 steps
    seconds = 15 * 1_281_167 * steps["train"]["flops"] / (0.4 * 989e12)
    traffic = 15 * 1_281_167 / 128 * 60 * weights / (0.9 * 3.35e12)
    assert scale.hours(1, weights, steps, host=False)["train"] == pytest.approx((seconds + traffic) / 3600)


@pytest.mark.slow
def test_the_page_is_up_to_date(scale):
    """Counts again, on fake tensors."""
    assert scale.page(scale.PAGE.read_text()) == scale.PAGE.read_text()
