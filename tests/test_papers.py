"""docs/papers.md names code that exists, and every source that an arm, the code or a page of docs names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vgrout.arms import ARMS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vgrout"
PAGE = ROOT / "docs" / "papers.md"
TEXT = PAGE.read_text(encoding="utf-8")

PLACE = re.compile(r"`([\w/]+\.py):([\w.]+)`")
KEY = re.compile(r"\*\*(.+?)\.\*\*")
# Someone 1999; Someone et al. 1999; Someone, Else and Other (1999)
NOBODY = "By|In|Since|January|February|March|April|May|June|July|August|September|October|November|December"
PERSON = rf"(?!(?:{NOBODY})\b)([A-Z][a-z]+)"
CITED = re.compile(rf"\b{PERSON}(?:,? (?:and )?[A-Z][a-z]+)*(?: et al\.)?,? \(?((?:19|20)\d\d)\b")


def names(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """What statements of a module or class bind by `def`, `class` or assignment."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from ((n.id, node) for n in ast.walk(target) if isinstance(n, ast.Name))


def defines(source: str, symbol: str) -> bool:
    """Whether a source binds `name`, or in a class of it `Class.member`. Nothing of it runs."""
    body = ast.parse(source).body
    for part in symbol.split("."):
        found = [node for name, node in names(body) if name == part]
        if not found:
            return False
        body = found[-1].body if isinstance(found[-1], ast.ClassDef) else []
    return True


def lines(text: str) -> list[list[str]]:
    """Cells of each line of the page's tables, without heads and rules."""
    cut = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in cut if cells[0] != "source" and set(cells[0]) != {"-"}]


def objections(text: str, package: Path, root: Path) -> list[str]:
    """What is wrong with a page: symbols that do not exist, and lines that name no source or no place."""
    out = []
    for file, symbol in PLACE.findall(text):
        path = (root if file.startswith("tests/") else package) / file
        if not path.is_file():
            out.append(f"{file}: no such file")
        elif not defines(path.read_text(encoding="utf-8"), symbol):
            out.append(f"{file} has no {symbol}")
    for cells in lines(text):
        if len(cells) != 4 or not KEY.match(cells[0]) or not cells[1] or not PLACE.search(cells[2]):
            out.append(f"not source, what, where, what is done otherwise: {' | '.join(cells)[:80]}")
        elif re.sub(r"[,\s]", "", PLACE.sub("", cells[2])):
            out.append(f"no place: {PLACE.sub('', cells[2])}")
    return out


def cited(text: str) -> set[tuple[str, str]]:
    """First author and year of every source that a text names."""
    return set(CITED.findall(" ".join(text.split())))


def texts(source: str) -> Iterator[str]:
    """Docstrings and other strings of a source."""
    nodes = ast.walk(ast.parse(source))
    yield from (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def told(paper: str, text: str) -> set[str]:
    """The places on the page's lines of a source."""
    own = [cells for cells in lines(text) if KEY.findall(cells[0])[:1] == [paper]]
    return {":".join(at) for cells in own for at in PLACE.findall(cells[2])}


# The page itself.


def test_every_symbol_exists():
    assert len(PLACE.findall(TEXT)) > 50
    assert not objections(TEXT, PACKAGE, ROOT)
    mentioned = re.findall(r"`[^`]*\.py[^`]*`", TEXT.split("## Method")[1])
    assert [m for m in mentioned if not PLACE.fullmatch(m)] == []


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.paper])
def test_the_source_of_an_arm_points_at_its_class(arm):
    owner = next(c for c in ARMS[arm].__mro__ if "paper" in vars(c))
    place = owner.__module__.removeprefix("vgrout.").replace(".", "/") + f".py:{owner.__name__}"
    assert place in told(ARMS[arm].paper, TEXT), f"docs/papers.md: **{ARMS[arm].paper}.** does not name {place}"


def test_every_source_that_is_named_has_a_line():
    on_page = cited(" ; ".join(key for cells in lines(TEXT) for key in KEY.findall(cells[0])))
    found = {at for path in sorted(PACKAGE.rglob("*.py")) for t in texts(path.read_text()) for at in cited(t)}
    found |= {at for path in (ROOT / "docs").glob("*.md") if path != PAGE for at in cited(path.read_text())}
    assert {("Meng", "2024"), ("Holm", "1979"), ("Ariahw", "2025"), ("Kopiczko", "2024")} <= found
    assert not found - on_page, f"docs/papers.md has no line for {sorted(found - on_page)}"


# Every check can fail.

CODE = "LIMIT: int = 1\nA, B = 2, 3\nclass Loss:\n    beta: float = 0.1\n    def of(self):\n        inner = 1\n"
LINE = "| **Someone 1999.** *Title* | a loss | `loss.py:{}` | |"


@pytest.mark.parametrize("symbol", ["LIMIT", "B", "Loss", "Loss.of", "Loss.beta"])
def test_a_symbol_is_found(tmp_path, symbol):
    (tmp_path / "loss.py").write_text(CODE)
    assert not objections(LINE.format(symbol), tmp_path, tmp_path)


@pytest.mark.parametrize("symbol", ["limit", "of", "Loss.inner", "Loss.of.inner", "LIMIT.real", "beta"])
def test_a_changed_symbol_is_objected_to(tmp_path, symbol):
    (tmp_path / "loss.py").write_text(CODE)
    assert objections(LINE.format(symbol), tmp_path, tmp_path) == [f"loss.py has no {symbol}"]


@pytest.mark.parametrize(
    "line",
    [
        LINE.format("Loss").replace("loss.py", "lost.py"),
        LINE.format("Loss").replace("`", ""),
        LINE.format("Loss").replace("**", ""),
        LINE.format("Loss").replace(" a loss ", " "),
        LINE.format("Loss").replace("Loss`", "Loss`, `loss.of`"),
        LINE.format("Loss") + " more |",
    ],
)
def test_a_line_that_says_less_is_objected_to(tmp_path, line):
    (tmp_path / "loss.py").write_text(CODE)
    assert objections(line, tmp_path, tmp_path)


def test_citations_are_read():
    text = "LoRA (Hu et al. 2021), Dempster, Laird, Rubin 1977 and Wu and Tang\n2026; Fisher (1936). In May 2025."
    assert cited(text) == {("Hu", "2021"), ("Dempster", "1977"), ("Wu", "2026"), ("Fisher", "1936")}
