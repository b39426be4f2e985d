"""The terminal: tables and progress with rich, or as plain text where rich is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .cells import Table

HAS_RICH = importlib.util.find_spec("rich") is not None
STYLES = {"good": "green", "bad": "bold red", "quiet": "dim", "": ""}
WIDTH_OF_A_FILE = 260  # where output goes to a file or pipe, wrapping would only hurt


class Terminal:
    """Where a run shows what it does. ``fancy``: with rich."""

    def __init__(self, fancy: bool = HAS_RICH) -> None:
        self._console = None
        if fancy:
            from rich.console import Console

            self._console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False)

    def say(self, text: str, tone: str = "") -> None:
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, style=STYLES[tone] or None, markup=False)

    def show(self, table: Table) -> None:
        if self._console is None:
            print(plain(table), flush=True)
            return
        from rich.table import Table as RichTable
        from rich.text import Text

        laid_out = RichTable(
            title=table.title, caption=table.note or None, title_justify="left", caption_justify="left"
        )
        for index, column in enumerate(table.columns):
            laid_out.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in table.rows:
            laid_out.add_row(*(Text(cell.text, style=STYLES[cell.tone]) for cell in row))
        self._console.print(laid_out)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """Yields what to call at the start of each step, with its description."""
        if self._console is None or not self._console.is_terminal:
            done = 0

            def step(description: str) -> None:
                nonlocal done
                done += 1
                print(f"[{done}/{total}] {description}", file=sys.stderr, flush=True)

            yield step
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("", total=total)
            started = False

            def advance(description: str) -> None:
                nonlocal started
                bar.update(task, advance=int(started), description=description)
                started = True

            yield advance


def plain(table: Table) -> str:
    """The table as aligned text; a bad cell is marked, since there is no colour."""
    texts = [list(table.columns)]
    texts += [[f"{cell.text} <--" if cell.tone == "bad" else cell.text for cell in row] for row in table.rows]
    widths = [max(len(row[index]) for row in texts) for index in range(len(table.columns))]
    lines = [
        "  ".join(text.ljust(width) if index == 0 else text.rjust(width) for index, (text, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in texts)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(["", table.title, *(line.rstrip() for line in lines), *([table.note] if table.note else [])])
