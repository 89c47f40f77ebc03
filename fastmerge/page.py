"""The report of a run folder as one self-contained HTML page: no network, no other files, no script.

It shows the table, the curves and matrices (as SVG), how to load the models, the settings and the environment; in light
and dark, on a screen or a phone.
"""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.config import declarations, flag_of
from fastmerge.plots import figures
from fastmerge.results import folder_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --warn: #b3590022; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1, h2 { line-height: 1.2; } h2 { margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.names td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.warn { background: var(--warn); padding: .3rem .7rem; border-radius: .3rem; }
pre { background: var(--soft); padding: .7rem; border-radius: .3rem; overflow-x: auto; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
.curves { max-width: 46rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
summary { cursor: pointer; font-size: 1.3rem; font-weight: 600; margin: 1.5rem 0 .5rem; }
"""


def page(
    folder: Path,
    methods: dict[str, dict[str, Any]],
    zero_shot: dict[str, Any] | None,
    rows: list[list[str]],
    verdict: list[str],
) -> str:
    """The page as text.

    folder: the run's; its config.json and environment.json are read. methods, zero_shot: as in results.json. rows: the
    result table, its header first. verdict: the sentence that compares the methods, then the warnings.
    """
    drawn = {name: svg(figure) for name, figure in figures(methods, zero_shot)}
    curves = drawn.pop("accuracy")
    matrices = "".join(f"<figure>{picture}</figure>" for picture in drawn.values())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    title = f"{', '.join(config['data']['dataset'])}, {config['scenario']['scenario']}, {config['model']['model']}"
    load = "import fastmerge\n" + "".join(
        f"\nmodel = fastmerge.load({str(folder / folder_name(method, seed))!r})"
        for method, seeds in methods.items()
        for seed in seeds
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(folder.name)} - fastmerge</title><style>{STYLE}</style></head><body>",
            f"<h1>{_text(folder.name)}</h1><p>{_text(title)}</p>",
            f"<p>{_text(verdict[0])}</p>",
            *(f'<p class="warn">{_text(line)}</p>' for line in verdict[1:]),
            f'<h2>Results</h2><div class="wide">{_table(rows[1:], rows[0])}</div>',
            "<p>Accuracies are in percent, over all classes seen so far, without a task id.</p>",
            f'<h2>Accuracy over the tasks</h2><figure class="curves">{curves}</figure>',
            f'<h2>Accuracy of every task</h2><div class="grid">{matrices}</div>' if matrices else "",
            f"<h2>How to load the models</h2><pre>{_text(load)}</pre>",
            "<details><summary>Settings</summary>",
            f"<p>They repeat the run: <code>python -m fastmerge --config {_text(folder / 'config.json')}</code></p>",
            f'<div class="wide names">{_table(_settings(config), ["setting", "value", "default"])}</div></details>',
            "<details><summary>Environment</summary>",
            f'<div class="wide names">{_table(_flat(environment), ["", ""])}</div></details>',
            "</body></html>\n",
        ]
    )


def svg(figure: Figure) -> str:
    """The figure as an SVG element. Black becomes the text colour of the page, and the background is transparent."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmerge"}):
        for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
            if legend is not None:
                legend.get_frame().set_alpha(0.0)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?:figure|axes|patch|matplotlib|text|line2d|legend|xtick|ytick)[._\d]*\w*"', "", text)
    # SVG's default colour is black, so matplotlib often leaves it out
    return text.replace("#000000", "currentColor").replace("<svg ", '<svg fill="currentColor" ', 1)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(rows: list[list[str]], titles: list[str]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(titles, 'th') if any(titles) else ''}{''.join(line(row, 'td') for row in rows)}</table>"


def _settings(config: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Flag, value, default of every setting."""
    rows = []
    for group, settings in config.items():
        for name, value in settings.items():
            declaration, default = declarations()[group][name]
            rows.append([f"--{flag_of(group, name)}", _words(value), declaration.default_text(_words(default))])
    return rows


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _flat(values: Any, before: str = "") -> list[list[str]]:
    """Rows of name and value of nested JSON."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values, start=1)
        return [row for name, value in items for row in _flat(value, f"{before} {name}".strip())]
    return [[before, str(values)]]
