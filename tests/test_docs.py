"""The commands of docs/RUNS.md, in order, in an empty folder; those of docs/SCENARIOS.md are read."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import toy
from image_trees import image_folder

from fastmerge.__main__ import main
from fastmerge.data import DATASETS, glyphs, load_dataset
from fastmerge.data.scenario import KINDS, NUMBERINGS, task_sizes
from fastmerge.flags import parse
from fastmerge.loop import Images, kept_bytes
from fastmerge.methods import METHODS
from fastmerge.methods.trajectory import Trajectory
from fastmerge.models.text_context import ClassPrompts
from fastmerge.plan import plan
from fastmerge.presets import PRESETS
from fastmerge.setup import Setup

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_about_runs(tmp_path, monkeypatch, capsys):
    """With fewer images."""
    page, ran = (ROOT / "docs" / "RUNS.md").read_text(), 0
    monkeypatch.setattr(glyphs, "load", partial(glyphs.load, classes=6, train_per_face=2, test_per_face=1))
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
    rows = list(on_the_page(3))
    assert rows == sorted(METHODS)
    for name, trains in on_the_page(1).items():
        lora = "all weights, or LoRA" in trains or trains == "nothing"  # the reference row of every run, with any flags
        assert name == "pam" or lora == METHODS[name].lora, name
    readme = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in readme] == []


def on_the_page(column):
    """Method -> what `column` says; 1: what it trains, 3: kept MiB."""
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", (ROOT / "docs" / "METHODS.md").read_text(), re.M)
    return {name: columns.split("|")[column].strip() for name, columns in rows}


@pytest.mark.slow
def test_kept_bytes_on_the_page(tmp_path, monkeypatch):
    """The default run with one training step for each task and a tenth of its images. The bases of `became` and `inflora`
    depend on the images a little, the other sizes not at all."""

    def rows(self, context, classes, *_, **__):  # of sets of attributes there are many
        return torch.zeros(len(classes), 128) + 0 * context.sum()

    monkeypatch.setattr(ClassPrompts, "rows", rows)
    concepts = tmp_path / "concepts.json"
    concepts.write_text(
        json.dumps({name: [f"{name} {i}" for i in range(15)] for name in load_dataset("glyphs").class_names})
    )
    flags = ["--epochs", "1", "--merge-epochs", "0", "--batch-size", "512", "--validation", "0.9", "--device", "cpu"]
    flags += ["--no-nearest-mean", "--hide.align-epochs", "0", "--slca.align-epochs", "0"]
    flags += ["--clg-cbm.concepts", str(concepts), "--clg-cbm.epochs", "1", "--clg-cbm.gate-epochs", "1"]
    setup, found = Setup(parse([*flags, "--method", *METHODS])), {}
    for run in plan(setup.config, setup.scenario):
        kind = METHODS[run.method]
        learner = setup.learner(run.seed, kind.head, run.config, kind.frozen)
        method = kind.build(learner, Trajectory(tmp_path / run.label, ()), run.protocol)
        for task in run.scenario.tasks:
            images = Images(run.scenario, setup.cache).train(task)
            learner.grow_head(task, images)
            during = method.begin(task)
            toy.work(method.train(task, images, during))
            toy.work(method.merge(task, images, during))
        found[run.method] = kept_bytes(learner, method) / 2**20
    said = {name: float(text) for name, text in on_the_page(3).items()}
    assert said == {
        name: pytest.approx(found[name], rel=0.02 * (name in ("became", "inflora")), abs=0.006) for name in said
    }


def test_every_decimal_of_the_results_is_in_a_table_that_its_section_links():
    page = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    assert "\n|" not in page  # tables are files that `reproduce` writes
    checked = 0
    for section in page.split("\n## "):
        linked = [ROOT / "docs" / name for name in re.findall(r"\]\((figures/[^)#]+)\)", section)]
        tables = " ".join(path.read_text(encoding="utf-8") for path in linked if path.suffix in (".md", ".csv"))
        known = set(re.findall(r"\d+\.\d+", tables))
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+", " ", re.sub(r"```.*?```", " ", section, flags=re.S))
        numbers = re.findall(r"\d+\.\d+", prose)
        assert set(numbers) <= known, (section[:40], sorted(set(numbers) - known))
        checked += len(numbers)
    assert checked > 20
