"""The report page: whole, by itself, safe against odd names, and with the numbers of the results."""

import dataclasses
import html.parser
import json
import re

import pytest

from fastmerge.config import declarations, flag_of
from fastmerge.flags import parse
from fastmerge.page import page
from fastmerge.report import below, comparison, results_rows

pytestmark = pytest.mark.usefixtures("rendered")
VOID = {"meta", "path", "use", "image", "rect", "br", "stop"}


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in order, and collects what they point to and what they say."""

    def __init__(self):
        super().__init__()
        self.open, self.pointers, self.cells, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.pointers += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        (self.cells if self.open and self.open[-1] in ("td", "th") else self.text).append(data)


def result(tasks, start):
    matrix = [[start - 2.0 * i + j if j <= i else None for j in range(tasks)] for i in range(tasks)]
    mean = sum(matrix[-1]) / tasks
    return {
        "accuracy_matrix": matrix, "test_counts": [10] * tasks, "final_accuracy": mean, "aaa": mean, "forgetting": 1.0,
        "plasticity": 2.0, "seconds": {"train": 1.0, "merge": 2.0}, "peak_memory_bytes": 2**20, "kept_bytes": [9] * tasks,
    }  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 13])
def test_the_page_is_whole_and_needs_nothing_else(tmp_path, tasks):
    folder = tmp_path / "a <b> & 'c'"
    folder.mkdir()
    config = parse(["--data-root", "<script>alert(1)</script>"])
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "environment.json").write_text(
        json.dumps([{"python": "3.11", "versions": {"torch": "2.9"}, "gpu": None}])
    )
    methods = {"trm": {"0": result(tasks, 80.0), "1": result(tasks, 82.0)}, "nearest-mean": {"0": result(tasks, 90.0)}}
    methods |= {"joint": {"0": result(1, 95.0)}}
    zero_shot = result(tasks, 50.0)
    rows = results_rows(methods, zero_shot)
    text = page(folder, methods, zero_shot, rows, [comparison(methods, zero_shot), *below(methods, zero_shot)])

    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and "script" not in reader.tags and "link" not in reader.tags
    assert all(pointer.startswith(("#", "data:")) for pointer in reader.pointers)
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # names of namespaces
    assert "color-scheme: light dark" in text
    assert "width=device-width" in text and "#000000" not in text
    for cell in (cell for row in rows for cell in row if cell):
        assert cell in reader.cells
    for group, settings in declarations().items():
        assert all(f"--{flag_of(group, name)}" in reader.cells for name in settings)
    assert "<script>alert(1)</script>" in reader.cells and "1 versions torch" in reader.cells
    words = "".join(reader.text)
    assert f"fastmerge.load({str(folder / 'trm-seed1')!r})" in words and "below nearest-mean" in words
    assert text.count("<svg ") == 1 + 3 * (tasks > 1)  # a single number is no matrix
