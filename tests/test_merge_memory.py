"""The peak memory of `fastmerge merge` follows from its parts, not from the sizes or the number of the models.

A process's floor is what the same command takes on models of a few entries: Python, torch, the compiled loop, hash buffers.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastmerge.files.hashes import BLOCK, Hashes
from fastmerge.files.plan import Options, make_plan
from fastmerge.files.stream import MEMORY

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads VmHWM of Linux")

# the peak since exec; the resident set of `wait4` starts with the memory of the process that starts this one
PROCESS = """
import re, sys
from fastmerge.__main__ import main
code = main(sys.argv[1:])
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
sys.exit(code)
"""
MB = 1 << 20


def peak(words):
    done = subprocess.run([sys.executable, "-c", PROCESS, "merge", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"peak (\d+)", done.stdout)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine models of 24 MiB in two tensors, and nine of a few entries."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for k in range(9):
        save_file({n: torch.randn(3 * MB, generator=generator) for n in "ab"}, folder / f"large{k}.safetensors")
        save_file({n: torch.randn(3, generator=generator) for n in "ab"}, folder / f"small{k}.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "based"), [("average", False), ("dare", True), ("magmax", True)])
def test_peak_is_that_of_a_part(rule, based, folder, tmp_path):
    def words(kind, count):
        models = [str(folder / f"{kind}{k}.safetensors") for k in range(1, 1 + count)]
        return [rule, "--models", *models, *(["--base", str(folder / f"{kind}0.safetensors")] if based else [])]

    floor = peak([*words("small", 8), "--out", str(tmp_path / "small")])
    floor += Hashes().pool._max_workers * BLOCK  # small files do not fill the buffers of the hashes
    for count in (2, 8):
        found = peak([*words("large", count), "--out", str(tmp_path / f"large{count}")])
        models, base = words("large", count)[2 : 2 + count], str(folder / "large0.safetensors") if based else None
        group = make_plan(Options(rule, models, base)).memory(MEMORY)
        assert group == MB * 4 * (count + 1 + based)  # a million entries of every input and the output
        assert found - floor <= 1.2 * group, (count, (found - floor) / MB, group / MB)
