"""`vgrout journal`: a research journal in Markdown, newest entry first, whose past stays as it was written.

Each entry is followed by its seal, a comment with the entry's number, the SHA-256 of its text together with the seal
of the entry before, and that seal:

    <!-- vgrout entry 2 sha256 9c1f... after 41ab... -->

Whether lines end in LF or CRLF is no part of a text: a checkout may change it.

Covers: an entry whose text was changed, one that was taken out, moved or put in between; runs and figures that are no
longer what an entry links to. Does not cover: the newest entries taken off the top, and somebody who makes all seals
anew; version control shows both.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from rich.console import Console

from vgrout.lab.archive import is_record, read_record
from vgrout.lab.checkpoint import replace_file
from vgrout.lab.record import finished, weights_sha256
from vgrout.lab.runs import Run, find
from vgrout.types import RunFailed, UserError

MARK = "<!-- vgrout journal: entries follow, newest first -->\n"  # above it anything may stand
HEAD = (
    "# Research journal\n\n"
    "Newest first. Entries are added with `vgrout journal add` and never changed: what turned out otherwise is said\n"
    "in a new entry. `vgrout journal check` names an entry that is not as it was written.\n\n"
)
MARKED = re.compile(re.escape(MARK.rstrip()) + r"\r?\n")
SEAL = re.compile(r"^<!-- vgrout entry (\d+) sha256 ([0-9a-f]{64}) after ([0-9a-f]{64}) -->\r?$", re.MULTILINE)
EXPLAINED = "**What could explain it**"  # below the last one of an entry there are hypotheses, runs and figures alone
LINK = re.compile(  # no address with a scheme or in the same page
    r"^- \[(?P<name>(?:\\.|[^\\\n])*?)\]\((?![A-Za-z][A-Za-z0-9+.-]*:|#)(?P<url>[^)\n]*)\)"
    r".*?(?: sha256 (?P<sha>[0-9a-f]{12}))?$",
    re.MULTILINE,
)
HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
UNDERLINE = re.compile(r" {0,3}(=+|-+)\s*$")  # makes a heading of the text above it
FENCE = re.compile(r" {0,3}(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)$")  # of code
FIRST = "0" * 64  # what the first entry comes after
LEAST = 3  # hypotheses
FIGURES = (".svg", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf", ".html")
SHORT = 12  # digits of a hash that a link shows


@dataclass(frozen=True)
class Entry:
    """One entry as it stands in the file. `text` is all between the seal above and its own, its lines ending in LF."""

    number: int
    text: str
    seal: str
    after: str

    @property
    def title(self) -> str:
        return next((line.removeprefix("## ") for line in self.text.splitlines() if line.startswith("## ")), "untitled")


def sealed(text: str, after: str) -> str:
    """The seal of a text that comes after the entry with the seal `after`. White space at both ends is no text."""
    return hashlib.sha256(f"{after}\n{text.strip()}\n".encode()).hexdigest()


def _read(path: Path) -> str | None:
    """The journal's text; None where there is none yet. Raises UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def parse(text: str, path: Path) -> tuple[str, list[Entry], str]:
    """The head, the entries as they stand, newest first, and what follows the last of them. Raises UserError for a file
    that is no journal."""
    mark = MARKED.search(text)
    if not mark:
        raise UserError(
            f"{path} is no journal that vgrout began (it lacks the line {MARK.strip()}): give another --file"
        )
    head, body = text[: mark.end()], text[mark.end() :]
    entries, at = [], 0
    for seal in SEAL.finditer(body):
        entries.append(Entry(int(seal[1]), body[at : seal.start()].replace("\r\n", "\n"), seal[2], seal[3]))
        at = seal.end()
    return head, entries, body[at:]


def faults(text: str, path: Path) -> list[str]:
    """What is not as it was written, the oldest first. Raises UserError for a file that is no journal."""
    _, entries, rest = parse(text, path)
    found = ["text after the oldest entry, which no seal covers"] if rest.strip() else []
    before, number = FIRST, 0
    for entry in reversed(entries):
        if entry.number != number + 1:
            found.append(f"entry {entry.number} stands where entry {number + 1} should")
        elif entry.after != before:
            what = f"entry {number}" if number else "what was before it"
            found.append(f"entry {entry.number} was written after another {what} than the one that is there")
        if sealed(entry.text, entry.after) != entry.seal:
            found.append(f"entry {entry.number} ({entry.title}) was changed after it was written")
        before, number = entry.seal, entry.number
    return found


def _whole(text: str, path: Path) -> None:
    """Raises UserError for a journal whose past was changed."""
    if wrong := faults(text, path):
        raise UserError(f"{path}: {wrong[0]}. Restore it: corrections go into a new entry")


# ---- adding


def _plain(text: str, what: str, *, lines: bool = False) -> str:
    """A text that may stand in an entry. Raises UserError."""
    text = text.strip() if lines else " ".join(text.split())
    if not any(c.isalnum() for c in text):
        raise UserError(f"{what} says nothing")
    if "<!--" in text or "-->" in text:
        raise UserError(f"{what}: comments (<!-- or -->) are kept for the seals")
    if any(not c.isprintable() and c not in "\n\t" for c in text):
        raise UserError(f"{what} has control characters in it")
    if lines:
        _paragraphs(text, what)
    return text


def _paragraphs(text: str, what: str) -> None:
    """Raises UserError for Markdown that would not stay inside an entry: headings outside of code, and code that does
    not end."""
    fence, above = "", ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if fence:
            closes = mark and mark["fence"].startswith(fence) and not mark["info"].strip()
            fence = "" if closes else fence
            line = ""
        elif mark:
            fence, line = mark["fence"], ""
        elif HEADING.match(line):
            raise UserError(f"{what}: {line[:40]!r} would be a heading: an entry has its own")
        elif above.strip() and UNDERLINE.match(line):
            raise UserError(f"{what}: {line[:40]!r} would make a heading of {above[:40]!r}: put an empty line between")
        above = line
    if fence:
        raise UserError(f"{what}: code begins with {fence} and does not end: close it with a line of {fence}")


def _hypotheses(texts: Sequence[str]) -> list[str]:
    said = [_plain(text, f"hypothesis {i}") for i, text in enumerate(texts, 1)]
    if len({text.casefold() for text in said}) < len(said):
        raise UserError("a hypothesis is given twice")
    if len(said) < LEAST:
        raise UserError(
            f"{len(said)} hypotheses: give at least {LEAST} that could explain the finding, the dull ones "
            "(chance, a bug, learning less) too"
        )
    return said


def _real(path: Path) -> Path:
    """The file itself, where the path leads over symbolic links."""
    return Path(os.path.realpath(path))


def _way(path: Path, journal: Path) -> str:
    """The way from the journal's folder: by the names that were given, unless that to the file itself leads less far
    up."""
    ways = [os.path.relpath(to, _real(journal).parent) for to in (path.absolute(), _real(path))]
    return min(ways, key=lambda way: Path(way).parts.count(os.pardir))


def _link(name: str, path: Path, journal: Path) -> str:
    """A link to a run or a figure. Raises UserError for a name that a line cannot show."""
    way = _way(path, journal)
    if not (name + way).isprintable():
        raise UserError(f"{way!r}: characters in this name cannot be printed: rename it")
    shown = re.sub(r"[\[\]\\]", r"\\\g<0>", name)
    return f"[{shown}]({quote(way)})"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:SHORT]


def _runs(paths: Sequence[Path], journal: Path) -> list[str]:
    """A line for each run at or in `paths`: its id, where it is, how it ended. Raises UserError."""
    for path in paths:
        if not path.is_dir():
            raise UserError(f"--runs {path}: no such folder")
    if not paths:
        return []
    runs, unread = find(paths)
    empty = [path for path in paths if not any(run.folder.is_relative_to(path) for run in runs)]
    if unread or empty:
        raise UserError(next(iter(unread.values()), None) or f"--runs {empty[0]}: no run in it")
    return [f"- {_link(run.name, run.folder, journal)}: {_ended(run)}" for run in runs]


def _ended(run: Run) -> str:
    if run.weights_sha256 is None:
        return f"{run.cfg.arm}, seed {run.seed}, {len(run.steps)} of {run.cfg.steps} steps, not finished"
    return f"{run.cfg.arm}, seed {run.seed}, {run.cfg.steps} steps, weights sha256 {run.weights_sha256[:SHORT]}"


def _figures(paths: Sequence[Path], journal: Path) -> list[str]:
    """A line for each figure. Raises UserError."""
    out = []
    for path in paths:
        if path.suffix.lower() not in FIGURES:
            raise UserError(f"--figures {path}: a figure ends in one of {' '.join(FIGURES)}")
        try:
            out.append(f"- {_link(path.name, path, journal)}: sha256 {_digest(path)}")
        except OSError as error:
            raise UserError(f"--figures {path}: {(error.strerror or str(error)).lower()}") from None
    return out


def written(
    number: int, title: str, finding: str, hypotheses: Sequence[str], runs: Sequence[str], figures: Sequence[str]
) -> str:
    """The text of an entry."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    parts = [f"## {number}. {title} ({date})", finding, EXPLAINED]
    parts.append("\n".join(f"{i}. {text}" for i, text in enumerate(hypotheses, 1)))
    for name, lines in (("Runs", runs), ("Figures", figures)):
        if lines:
            parts += [f"**{name}**", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


@contextmanager
def _one_writer(path: Path) -> Iterator[None]:
    """Nobody else adds to a journal in this folder meanwhile."""
    try:
        folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def add(
    path: Path,
    title: str,
    finding: str,
    hypotheses: Sequence[str],
    runs: Sequence[Path],
    figures: Sequence[Path],
) -> int:
    """Put an entry on top. Its number. Raises UserError where something is missing, or the past was changed."""
    title = _plain(title, "--title").rstrip(".")
    finding = _plain(finding, "--finding", lines=True)
    said = _hypotheses(hypotheses)
    linked = _runs(runs, path), _figures(figures, path)
    with _one_writer(_real(path)):
        text = _read(path)
        head, entries, _ = (HEAD + MARK, [], "") if text is None else parse(text, path)
        if text is not None:
            _whole(text, path)
        number, after = (entries[0].number, entries[0].seal) if entries else (0, FIRST)
        entry = written(number + 1, title, finding, said, *linked)
        seal = f"<!-- vgrout entry {number + 1} sha256 {sealed(entry, after)} after {after} -->\n"
        body = "" if text is None else text[len(head) :]
        top = f"\n{entry}\n{seal}".replace("\n", "\r\n" if head.endswith("\r\n") else "\n")
        try:
            mode = None if text is None else stat.S_IMODE(path.stat().st_mode)
            replace_file(_real(path), f"{head}{top}{body}", mode)
        except OSError as error:
            raise RunFailed(f"cannot write {path}: {error.strerror}") from None
    return number + 1


# ---- asking


def _asked(question: str, wanted: Callable[[str], Any]) -> str:
    """An answer that `wanted` accepts. Raises UserError at the end of the input."""
    while True:
        try:
            answer = input(question)
        except EOFError:
            print()
            raise UserError("nothing was written: the input ended") from None
        try:
            wanted(answer)
            return answer
        except UserError as error:
            print(f"  {error}")


def _several(question: str, wanted: Callable[[str], Any], least: int = 0, given: Sequence[str] = ()) -> list[str]:
    """Answers until an empty one, beside those that were `given` before."""
    out: list[str] = []
    while True:
        enough = len(out) >= least

        def fits(answer: str, enough: bool = enough) -> None:
            if answer.strip() or not enough:
                wanted(answer)
            if answer.strip().casefold() in (text.casefold() for text in (*given, *out)):
                raise UserError("that was given already")

        answer = _asked(
            f"{question} {len(given) + len(out) + 1}{' (empty: no more)' if enough else ''}: ", fits
        ).strip()
        if not answer:
            return out
        out.append(answer)


def ask(
    path: Path,
    title: str,
    finding: str,
    hypotheses: Sequence[str],
    runs: Sequence[Path],
    figures: Sequence[Path],
) -> tuple[str, str, list[str], list[Path], list[Path]]:
    """What was given, and answers to questions on the terminal for what is missing. Raises UserError."""
    complete = title and finding and len(hypotheses) >= LEAST
    _runs(runs, path), _figures(figures, path)  # before anybody writes for nothing
    if (text := _read(path)) is not None:
        _whole(text, path)
    title = title or _asked("title: ", lambda a: _plain(a, "a title"))
    finding = finding or _asked("what was found: ", lambda a: _plain(a, "a finding", lines=True))
    texts = list(hypotheses)
    if len(texts) < LEAST:
        print(f"at least {LEAST} hypotheses that could explain it; the dull ones (chance, a bug, learning less) too")
        for text in texts:
            print(f"  given: {text}")
        texts += _several("hypothesis", lambda a: _plain(a, "a hypothesis"), LEAST - len(texts), texts)
    given_runs, given_figures = list(runs), list(figures)
    if not complete:
        given_runs += map(Path, [] if runs else _several("run", lambda a: _runs([Path(a)], path)))
        given_figures += map(Path, [] if figures else _several("figure", lambda a: _figures([Path(a)], path)))
    return title, finding, texts, given_runs, given_figures


def add_entry(
    path: Path,
    console: Console,
    title: str,
    finding: str,
    hypotheses: Sequence[str],
    runs: Sequence[Path],
    figures: Sequence[Path],
) -> int:
    """`vgrout journal add`: on a terminal what is missing is asked for."""
    given = title, finding, list(hypotheses), list(runs), list(figures)
    if sys.stdin is not None and sys.stdin.isatty():
        given = ask(path, *given)
    missing = [flag for flag, value in (("--title", given[0]), ("--finding", given[1])) if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)}: missing")
    number = add(path, *given)
    console.print(f"entry {number} in {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


# ---- checking


def broken_links(text: str, path: Path) -> list[str]:
    """Runs and figures that are no longer where, or what, an entry says."""
    out = []
    for entry in parse(text, path)[1]:
        for link in LINK.finditer(entry.text.rpartition(EXPLAINED)[2]):
            name, way = re.sub(r"\\([\[\]\\])", r"\1", link["name"]), unquote(link["url"])
            target = _real(path).parent / way
            if not os.path.exists(target):
                out.append(f"entry {entry.number} links to {name}, which is no longer at {way}")
            elif link["sha"] and _short_hash(target) not in ("", link["sha"]):
                out.append(f"entry {entry.number} links to {name}, which has changed since")
    return out


def _short_hash(target: Path) -> str:
    """The short hash of a figure, or of a finished run's weights; '' where it has none."""
    try:
        if target.is_file():
            return _digest(target)
        if is_record(target):
            return str(read_record(target)["weights_sha256"])[:SHORT]
        return weights_sha256(target)[:SHORT] if finished(target) else ""
    except (OSError, UserError, ValueError, LookupError, TypeError):
        return ""


def check(path: Path, console: Console) -> int:
    """`vgrout journal check`. Returns 1 where the past was changed. Raises UserError where there is no journal."""
    text = _read(path)
    if text is None:
        raise UserError(f"no journal at {path}: `vgrout journal add` begins one")
    wrong, n = faults(text, path), len(parse(text, path)[1])
    lines = [f"changed: {line}" for line in wrong] + [f"note: {line}" for line in broken_links(text, path)]
    lines.append(
        f"{n} {'entry' if n == 1 else 'entries'}, " + ("the past is not as written" if wrong else "as written")
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if wrong else 0
