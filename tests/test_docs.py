"""The commands of docs/RUNS.md, in order, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_about_runs(tmp_path):
    page = (ROOT / "docs" / "RUNS.md").read_text()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    ran = 0
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S):
        commands = (
            [["-c", block]] if language == "python" else [shlex.split(x, comments=True) for x in block.splitlines()]
        )
        for command in commands:
            arguments = command if language == "python" else command[1:]
            done = subprocess.run(
                [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            ran += 1
    assert ran == 8
    files = {
        str(p.relative_to(tmp_path / "runs" / "demo")) for p in (tmp_path / "runs" / "demo").rglob("*") if p.is_file()
    }
    named = {"config.json", "manifest.json", "environment.json", "results.json", "results.md", "report.html"}
    named |= {
        f"finetune-seed0/{name}" for name in ("metrics.jsonl", "accuracy.csv", "result.json", "model.safetensors")
    }
    assert named | {f"finetune-seed0/models/task-{t}.safetensors" for t in (1, 2, 3)} <= files
    assert not any("checkpoint" in name for name in files)
