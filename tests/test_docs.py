"""The commands of docs/RUNS.md, in order, in an empty folder; those of docs/SCENARIOS.md are read."""

import re
import shlex
from pathlib import Path

from image_trees import image_folder

from fastmerge.__main__ import main
from fastmerge.data import DATASETS, load_dataset
from fastmerge.data.scenario import KINDS, NUMBERINGS, task_sizes
from fastmerge.flags import parse
from fastmerge.methods import METHODS
from fastmerge.presets import PRESETS

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


def test_the_page_about_tasks(monkeypatch):
    """Its commands are valid, its code runs, and it names what there is."""
    page = (ROOT / "docs" / "SCENARIOS.md").read_text()
    monkeypatch.setattr("fastmerge.data.DATASETS", dict(DATASETS))
    commands = 0
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S):
        if language == "python":
            exec(block, {})
            assert len(load_dataset("noise").train) == 30
            continue
        for line in block.splitlines():
            python, m, name, *flags = shlex.split(line, comments=True)
            assert (python, m, name) == ("python", "-m", "fastmerge")
            config = parse(flags)
            assert all(":" in name or name in DATASETS for name in config.data.dataset)
            commands += 1
    assert commands == 13
    sizes = dict(re.findall(r"fastmerge (--\S[^#]*?) +# ([\d +x]+?) ?[(:]", page))
    assert len(sizes) == 3
    for flags, said in sizes.items():
        s = parse(flags.split()).scenario
        found = task_sizes(load_dataset("glyphs"), s.tasks, s.first_classes, s.task_sizes)
        terms = [term.split(" x ") for term in said.strip().split(" + ")]
        assert found == [int(term[-1]) for term in terms for _ in range(int(term[0]) if len(term) == 2 else 1)], flags
    for word in (*KINDS, *PRESETS, *NUMBERINGS[1:]):
        assert f"`{word}" in page or f"--preset {word} " in page, word


def test_every_method_has_a_row_in_the_page_about_methods():
    rows = re.findall(r"^\| `([\w-]+)`", (ROOT / "docs" / "METHODS.md").read_text(), re.M)
    assert rows == sorted(METHODS)
    readme = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in readme] == []
