"""Tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDTH = 132  # characters that the widest table needs


def print_wide(table: Table, console: Console) -> None:
    """Print a table at its own width, on a narrow terminal too: wrapped numbers are unreadable."""
    least = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.print(table, width=max(console.width, WIDTH, least), crop=False)
