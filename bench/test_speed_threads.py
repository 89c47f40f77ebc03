"""Time two threads and one in turns in one process (CPU): speedup_one says how many times longer one thread takes.

Target: 1.6 if memory is not the limit. x_copy counts copies with two threads; near 1, memory is the limit. The suite
needs two idle cores.
"""

from __future__ import annotations

import pytest
import torch
from measure import Case
from test_speed_one_pass import OPS, lerp
from test_speed_random import OPS as RANDOM
from test_speed_rules import RULES

ONE_PASS = (lerp, *(op for op in OPS if op.__name__ in ("magnitude_threshold", "ties_update")))


@pytest.fixture
def two_threads(device):
    if device.type != "cpu":
        pytest.skip("times the CPU loops")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(bench, case):
    def using(threads: int):
        torch.set_num_threads(threads)
        case.run()

    info = bench.row(Case(lambda: using(2), case.bytes * bench.bytes, peers={"one": lambda: using(1)}))
    assert info["speedup_one"] > 0


@pytest.mark.parametrize("op", (*ONE_PASS, *RANDOM), ids=lambda op: op.__name__)
def test_threads_op(bench, two_threads, op, size, dtype):
    row(bench, op(bench))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_threads_rule(bench, two_threads, rule, tasks, size, dtype):
    base = bench.normal()
    row(bench, rule(bench, base, bench.models(int(tasks), base), torch.empty_like(base)))
