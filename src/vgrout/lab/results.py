"""`vgrout lab results`: a preregistered experiment as a page of Markdown whose every number names its runs.

The same records give the same bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from vgrout.lab.checkpoint import replace_file
from vgrout.lab.claims import is_decided
from vgrout.lab.decide import DECISION
from vgrout.lab.report import Content, gathered, template
from vgrout.lab.tables import can_write
from vgrout.types import UserError

TEMPLATE = "results.md.j2"


def _plain(value: Any) -> Any:
    """A text as a cell of a Markdown table: on one line, and its bars are no borders."""
    return " ".join(str(value).replace("|", "\\|").split()) if isinstance(value, str) else value


def markdown(content: Content, folder: Path, out: Path, figures: Path) -> str:
    """The page that stands in `out`, with links to records and figures from there."""

    def link(path: Path) -> str:
        return quote(Path(os.path.relpath(path, out.parent)).as_posix())

    told = dict(content.told)
    told["runs"] = [run | {"link": link(run["folder"])} for run in told["runs"]]
    # Arms are sections of the page: their marks are not part of a link.
    told["table"] = [row | {"label": row["arm"].removesuffix(" *")} for row in told["table"]]
    text = template(TEMPLATE, finalize=_plain, keep_trailing_newline=True).render(
        **told,
        folder=folder.as_posix(),
        out=out.as_posix(),
        decision_file=link(folder / DECISION),
        figures=[
            {"title": f.title, "caption": f.caption, "link": link(figures / f"{f.name}.svg")} for f in content.figures
        ],
    )
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip("\n") + "\n"


def results(folder: Path, out: Path, figures: Path, console: Console) -> int:
    """Write the page and its figures. Raises UserError where `folder` is no preregistered experiment, or a run in it
    cannot be read: a page of results has all of them."""
    if out.suffix != ".md":
        raise UserError(f"{out}: give a file that ends in .md")
    can_write(out)
    if not is_decided(folder):
        raise UserError(f"{folder} is no experiment of a preregistered decision: `vgrout decide --decision` makes one")
    with console.status("reading runs and drawing"):
        content = gathered([folder], decided=True)
        if content.unread:
            raise UserError(next(iter(content.unread.values())))
        text = markdown(content, folder, out, figures)
        drawings = {figures / f"{figure.name}.svg": figure.printed() for figure in content.figures}
    try:
        figures.mkdir(parents=True, exist_ok=True)
        for file, drawing in drawings.items():
            replace_file(file, drawing)
        replace_file(out, text)
    except OSError as error:
        raise UserError(f"cannot write the results: {error.strerror}") from None
    console.print(f"{out}", markup=False, soft_wrap=True)
    return 0
