"""Numbers in messages: "1 class is", "2 classes are".

pytest tests/test_wording.py
"""

from __future__ import annotations

import pytest
from image_trees import write_tree

from fastmerge.data import load_dataset
from fastmerge.data.joined import load_datasets
from fastmerge.data.scenario import build_scenario
from fastmerge.errors import UserError
from fastmerge.wording import counted


def test_counted():
    assert [counted(n, "domain") for n in (0, 1, 2)] == ["0 domains", "1 domain", "2 domains"]
    assert [counted(n, "class is", "classes are") for n in (1, 2)] == ["1 class is", "2 classes are"]


@pytest.fixture
def bees(tmp_path):
    """One class in one domain, with two train images and one test image."""
    write_tree(tmp_path / "bees", "train/bee")
    write_tree(tmp_path / "bees", "test/bee", images=1)
    return tmp_path / "bees"


def test_messages_about_one(bees):
    data = load_dataset("folder", str(bees))
    one = load_datasets(["folder"], [str(bees)], download=False, one_domain=True)
    for make, says in (
        (lambda: build_scenario(data, "cil", 2), "--tasks 2: bees has 1 class; choose 1 task."),
        (lambda: build_scenario(data, "cil", 3, first_classes=1), "bees has 1 class; there must be a second task"),
        (lambda: build_scenario(data, "cil", None, first_classes=1), "--first-classes 1: bees has 1 class, none for"),
        (lambda: build_scenario(data, "cil", 2, sizes=[1]), "--task-sizes 1 gives 1 task of bees"),
        (lambda: build_scenario(one, "dil", 2, fewest_domains=1), "bees has 1 domain (bees); leave"),
        (lambda: data.most_populous(2), "--top-classes 2: bees has 1 class; choose 1 to 1."),
        (lambda: load_datasets(["folder"], ["a", "b"], download=False), "2 folders for 1 data set (folder)"),
        (lambda: load_datasets(["folder"] * 3, ["a", "b"], download=False), "2 folders for 3 data sets (folder,"),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert says in str(caught.value)


def test_notes_about_one(bees):
    data = load_dataset("folder", str(bees))
    assert any(w.startswith("1 class has fewer than") for w in build_scenario(data, "cil", 1).manifest()["warnings"])
    assert data.most_populous(1).notes[-1].startswith("--top-classes: the 1 of 1 class with")
    assert "holds out 1 of 2 training images" in data.held_out(0.5).notes[-1]
    write_tree(bees, "test/wasp", images=1)
    assert any(note.startswith("1 class folder only in ") for note in load_dataset("folder", str(bees)).notes)
