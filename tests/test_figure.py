"""The files of a figure: their metadata as Pillow reads it and as the PDF has it; styles that differ in grey."""

import csv

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastmerge.analysis.figure import Output, line_style, point_style, save, with_legend
from fastmerge.plots import draw_accuracy

COMMAND = "python -m fastmerge analyse sweep 'runs/a b' --x lr"


def draw(figure):
    axes = figure.subplots()
    for k in range(3):
        axes.plot([0, 1], [k, k + 1], **line_style(k), label=str(k))
        axes.plot(0.5, k, **point_style(k))
    figure.legend(loc="outside right upper")


def test_every_figure_is_a_table_and_two_pictures_that_name_their_command(tmp_path):
    rows = [("a", 1, 1 / 3), ("b, c", 2, 1e-12)]
    paths = save(Output(tmp_path, COMMAND), "name", ("line", "n", "value"), rows, draw, (4, 3))
    assert paths == [tmp_path / f"name.{kind}" for kind in ("csv", "png", "pdf")]
    assert sorted(paths) == sorted(tmp_path.iterdir())
    with open(paths[0], newline="") as file:
        found = list(csv.reader(file))
    assert found == [["line", "n", "value"], ["a", "1", "0.333333"], ["b, c", "2", "1e-12"]]
    with Image.open(paths[1]) as image:
        assert image.text["Description"] == COMMAND and image.text["Title"] == "name" and image.size == (480, 360)
    pdf = paths[2].read_bytes()
    assert pdf.startswith(b"%PDF") and f"/Subject ({COMMAND})".encode() in pdf and b"/Subtype /Type3" not in pdf
    before = [path.read_bytes() for path in paths]
    save(Output(tmp_path, COMMAND), "name", ("line", "n", "value"), rows, draw, (4, 3))
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("folder", ["größe", "数", "a\udcff"])  # the last one: a byte that is no text
def test_commands_with_any_file_name(folder, tmp_path):
    save(Output(tmp_path, f"analyse bars {folder}"), "name", ("x",), [(1,)], draw, (3, 3))
    with Image.open(tmp_path / "name.png") as image:
        shown = folder.encode("utf-8", "backslashreplace").decode()
        assert image.text["Description"] == f"analyse bars {shown}"
    assert (tmp_path / "name.pdf").stat().st_size > 1000


def test_styles_differ_without_colour():
    lines = {(style["linestyle"], style["marker"]) for style in map(line_style, range(52))}
    points = {(style["marker"], style["fillstyle"]) for style in map(point_style, range(52))}
    assert len(lines) == len(points) == 52


@pytest.mark.parametrize("lines", [2, 52])
def test_the_legend_fits(lines):
    figure = Figure(figsize=with_legend(lines), layout="constrained")
    axes = figure.subplots()
    for k in range(lines):
        axes.plot([0, 1], [k, k + 1], **line_style(k), label=f"trm(lambda1={k},lambda2=0.01)")
    legend = figure.legend(loc="outside right upper", fontsize=8)
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.y0 > 0 and box.y1 < figure.bbox.y1 and box.x1 < figure.bbox.x1
    assert axes.get_window_extent().x1 < box.x0


def test_the_lines_and_bands_of_accuracy():
    """The numbers in the picture: means, bands from the least to the largest, a line across for joint training."""
    figure = Figure()
    draw_accuracy(figure, {"zero-shot": [[9.0, 8.0]], "a": [[90.0, 50.0], [70.0, 60.0]], "joint": [[95.0], [97.0]]})
    (axes,) = figure.axes
    start, line, joint = axes.get_lines()
    assert list(start.get_ydata()) == [9, 8] and list(line.get_ydata()) == [80, 55] and set(joint.get_ydata()) == {96}
    assert list(line.get_xdata()) == [1, 2]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 70), (1, 90), (2, 50), (2, 60)}
    many = {str(k): [[1.0, 2.0], [3.0, 4.0]] for k in range(11)}
    draw_accuracy(other := Figure(), many)
    assert not other.axes[0].collections and len(other.legends[0].get_texts()) == 11
