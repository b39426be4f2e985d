"""``python -m benchmarks report DIR``: results files made readable, as Markdown, plots and one self-contained page."""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .cells import Cell, Table
from .rows import Results, read
from .tables import tables

TITLE = "fusedformer: benchmark report"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c62828; --good: #2e7d32; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff6b6b; --good: #7bd88f; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 100rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); } .quiet { opacity: .6; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
"""


def main(arguments: Sequence[str]) -> int:
    """Writes the report beside the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="holds results.jsonl, itself or in folders of its own")
    folder = parser.parse_args(arguments).folder
    for line in write(read(folder), folder):
        print(line)
    return 0


def write(results: Results, folder: Path) -> list[str]:
    """Writes report.md, report.html and the plots to ``folder``; returns what to tell the user about it."""
    plots: list[Path] = []
    said = []
    if importlib.util.find_spec("matplotlib") is None:
        said.append("No plots were drawn: matplotlib is not installed (pip install matplotlib).")
    else:
        from .plots import draw

        plots = draw(results, folder)
    found = tables(results)
    (folder / "report.md").write_text(markdown(found, plots))
    (folder / "report.html").write_text(page(found, plots))
    return [*said, f"Results and report: {folder}"]


def markdown(found: Sequence[Table], plots: Sequence[Path]) -> str:
    parts = [f"# {TITLE}"]
    for table in found:
        lines = [f"## {table.title}", "", _line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
        lines += [_line([_marked(cell) for cell in row]) for row in table.rows]
        parts.append("\n".join(lines))
        if table.note:
            parts.append(table.note)
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"


def _marked(cell: Cell) -> str:
    """Markdown has no colours of its own, and a bad cell shall not be overlooked."""
    return f"🔴 **{cell.text}**" if cell.tone == "bad" else cell.text


def page(found: Sequence[Table], plots: Sequence[Path]) -> str:
    """One file with everything in it, pictures too."""
    parts = [f"<h1>{html.escape(TITLE)}</h1>"]
    for table in found:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        )
        if table.note:
            parts.append(f"<p>{html.escape(table.note)}</p>")
    for plot in plots:
        encoded = base64.b64encode(plot.read_bytes()).decode()
        parts.append(f'<p><img alt="{plot.stem}" src="data:image/png;base64,{encoded}"></p>')
    head = f'<meta charset="utf-8"><title>{html.escape(TITLE)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _cell(cell: Cell) -> str:
    return (
        f'<td class="{cell.tone}">{html.escape(cell.text)}</td>' if cell.tone else f"<td>{html.escape(cell.text)}</td>"
    )
