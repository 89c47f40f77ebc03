"""Run the value tests of this folder again, in a process where Triton interprets its kernels on the CPU.

`conftest.py` starts that process at the start of the session, so that it uses a second core; this test waits for it.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest
from oracle import INTERPRET


def since(package: str, minor: tuple[int, int]) -> bool:
    return tuple(int(part) for part in version(package).split(".")[:2]) >= minor


@pytest.mark.skipif(INTERPRET, reason="this is the interpreted run")
def test_interpreted_kernels_pass(interpreted_run):
    pytest.importorskip("triton")
    if since("numpy", (2, 4)) and not since("triton", (3, 7)):
        pytest.skip("before 3.7 Triton's interpreter needs numpy < 2.4: it converts arrays of one entry to int")
    process, log = interpreted_run
    code = process.wait()
    log.seek(0)
    assert code == 0, log.read()[-8000:]
