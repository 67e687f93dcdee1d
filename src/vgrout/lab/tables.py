"""What a command of the lab shows: tables that keep their width on a narrow terminal, and the JSON file of a result."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vgrout.lab.checkpoint import replace_file
from vgrout.types import UserError

WIDTH = 132  # characters that the widest table needs


def number_table(title: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> Table:
    """The first `texts` columns are text, the others numbers; no cell is ever wrapped."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        widest = max(len(text) for text in [*name.split(), *(row[i] for row in rows)])
        table.add_column(name, justify="left" if i < texts else "right", min_width=widest)
    for row in rows:
        table.add_row(*map(Text, row))  # what stands in a cell is no markup
    return table


def print_wide(table: Table, console: Console) -> None:
    """Print a table at its own width, on a narrow terminal too."""
    least = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.print(table, width=max(console.width, WIDTH, least), crop=False)


def can_write(out: Path | None) -> None:
    """Raises UserError, before the work, where what somebody asked for is no file, or cannot become one."""
    if out is None:
        return
    try:
        fits = out.is_file() or (out.parent.is_dir() and not os.path.lexists(out))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    if not fits:
        raise UserError(f"cannot write {out}: give a file in a folder that exists")


def write_result(out: Path | None, result: Any) -> None:
    """What a command showed, as JSON, where somebody asked for it. Raises UserError."""
    if out is None:
        return
    try:
        replace_file(out, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
