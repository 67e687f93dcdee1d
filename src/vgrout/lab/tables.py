"""Tables that keep their width on a narrow terminal: wrapped numbers are unreadable."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDTH = 132  # characters that the widest table needs


def number_table(title: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> Table:
    """The first `texts` columns are text, the others numbers; no cell is ever wrapped."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        widest = max(len(text) for text in [*name.split(), *(row[i] for row in rows)])
        table.add_column(name, justify="left" if i < texts else "right", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table


def print_wide(table: Table, console: Console) -> None:
    """Print a table at its own width, on a narrow terminal too."""
    least = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.print(table, width=max(console.width, WIDTH, least), crop=False)
