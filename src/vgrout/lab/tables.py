"""Tables of numbers that keep their width on a narrow terminal: wrapped numbers are unreadable."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def number_table(title: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> Table:
    """The first `texts` columns are text, the others numbers; no cell is ever wrapped."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        widest = max(len(text) for text in [*name.split(), *(row[i] for row in rows)])
        table.add_column(name, justify="left" if i < texts else "right", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table


def show(table: Table, console: Console) -> None:
    console.print(table, crop=False, overflow="ignore")
