"""The Triton kernels on the CPU: the value tests of this folder again, in a process where Triton interprets its kernels.

`conftest.py` starts that process with the session, so that it uses a second core meanwhile; this test waits for it.
"""

from __future__ import annotations

import pytest
from oracle import INTERPRET


@pytest.mark.skipif(INTERPRET, reason="this is the interpreted run")
def test_interpreted_kernels_pass(interpreted_run):
    pytest.importorskip("triton")
    process, log = interpreted_run
    code = process.wait()
    log.seek(0)
    assert code == 0, log.read()[-8000:]
