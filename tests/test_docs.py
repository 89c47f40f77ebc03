"""The commands of docs/RUNS.md, in order, in an empty folder."""

import re
import shlex
from pathlib import Path

from image_trees import image_folder

from fastmerge.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_about_runs(tmp_path, monkeypatch, capsys):
    page, ran = (ROOT / "docs" / "RUNS.md").read_text(), 0
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", classes=2, train=2, test=1)
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S):
        if language == "python":
            exec(block, {})
            ran += 1
            continue
        for line in block.splitlines():
            python, m, name, *flags = shlex.split(line, comments=True)
            assert (python, m, name) == ("python", "-m", "fastmerge")
            assert main(flags) == 0, (line, capsys.readouterr().err)
            ran += 1
    assert ran == 9
    files = {
        str(p.relative_to(tmp_path / "runs" / "demo")) for p in (tmp_path / "runs" / "demo").rglob("*") if p.is_file()
    }
    named = {"config.json", "manifest.json", "environment.json", "results.json", "results.md", "report.html"}
    named |= {
        f"finetune-seed0/{name}" for name in ("metrics.jsonl", "accuracy.csv", "result.json", "model.safetensors")
    }
    assert named | {f"finetune-seed0/models/task-{t}.safetensors" for t in (1, 2)} <= files
    assert not any("checkpoint" in name for name in files)
