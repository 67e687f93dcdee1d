"""Hand-written (hack, clean) pairs: the parser, the digest and the linter of a pairs file.

A pairs file is Markdown. Prose may stand before the first pair of a section, nowhere else.

    Provenance: authored          (optional, here for the whole file or under a section's heading for that section)
    ## section
    ### heading of a pair
    Tags: a, b                    (optional)
    #### Prompt                   then #### Hack and #### Clean, in any order
    `````text
    ...
    `````

The text of a fence is taken as it stands: a prompt ends without a line break, a completion with exactly the
one of its last line. Source: METHOD.md section 2; provenance, and `#*`, are ours. docs/pairs.md says how to write one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from vgrout.types import Pair, Provenance, UserError

BUNDLED = {"micro": "pairs_micro.md", "leetcode": "pairs_leetcode.md"}
DEFAULT = "all-in-one"  # the section that the bare name of a bundled file means
EVERY = "*"
FIELDS = ("Prompt", "Hack", "Clean")
STATED: tuple[Provenance, ...] = ("authored", "pool-derived")
OPEN, CLOSE = "`````text", "`````"

MAX_LENGTH_GAP = 0.15  # relative difference of the mean lengths of the two sides
MAX_ONE_SIDED = 0.8  # share of pairs whose longer side is the same one
MAX_GIVEAWAY = 0.75  # difference between the shares of hacks and of cleans that hold one word
MAX_PAIR_RATIO = 1.5  # longer over shorter side of one pair; a note beyond it
MIN_PAIRS = 8  # below it the set is too small to speak of confounds


def load(selector: str) -> tuple[Pair, ...]:
    """The pairs that `selector` names, in file order.

    `micro` and `leetcode` are bundled files, and alone mean their section `all-in-one`; anything else is a path, and
    alone means all of its pairs. `#section` takes one section, `#*` every one, `#section/prefix` the pairs of it whose
    heading begins so, `@tag1,tag2` those that carry any of the tags. Raises UserError, with file and line, on anything
    malformed, duplicate or empty anywhere in the file, and when nothing is selected.
    """
    name, hashed, part = selector.partition("#")
    if name in BUNDLED and not hashed:
        part = DEFAULT
    wanted = re.fullmatch(r"([^/@]+)(?:/([^@]+))?(?:@([^@]+))?", part)
    if not name or (hashed and not wanted):
        raise UserError(f"pair selector {selector!r}: write path.md, path.md#section, #section/prefix or #section@tag")
    pairs = parse(_read(name), BUNDLED.get(name, name))
    if not wanted:
        return pairs
    section, prefix, tags = wanted.groups()
    inside = [p for p in pairs if section.strip() in (p.section, EVERY)]
    if not inside:
        raise UserError(f"{name}: no section {section!r}; it has {', '.join(dict.fromkeys(p.section for p in pairs))}")
    labels = {tag.strip() for tag in tags.split(",")} if tags else set()
    chosen = tuple(
        p for p in inside if p.name.startswith(prefix or "") and (not labels or not labels.isdisjoint(p.tags))
    )
    if not chosen:
        raise UserError(f"pair selector {selector!r} matches none of the {len(inside)} pairs of that section")
    return chosen


def digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 of what training sees of these pairs: prompts and both sides, in no particular order."""
    rows = sorted(json.dumps([p.prompt, p.hack, p.clean]) for p in pairs)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def unclean(pairs: Sequence[Pair]) -> str:
    """Why results on these pairs are no headline; empty where every pair was authored."""
    counts = Counter(p.provenance for p in pairs if p.provenance != "authored")
    said = {"pool-derived": "pool-derived", "unstated": "of unstated provenance"}
    return " and ".join(f"{counts[key]} of {len(pairs)} pairs are {said[key]}" for key in said if counts[key])


def _read(name: str) -> str:
    source = files("vgrout").joinpath("data", BUNDLED[name]) if name in BUNDLED else Path(name)
    try:
        return source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no pairs file at {name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the pairs file {name}: {error}") from None


def parse(text: str, name: str = "pairs") -> tuple[Pair, ...]:
    """All pairs of a file's text; `name` is how errors call the file. Raises UserError."""
    return _Parser(text, name).pairs()


class _Parser:
    """Reads a file top to bottom; every complaint carries the line it is about."""

    def __init__(self, text: str, name: str) -> None:
        self.lines = text.removeprefix("\ufeff").split("\n")
        self.name = name
        self.at = 0  # index of the line to read next

    def fail(self, line: int, message: str) -> UserError:
        return UserError(f"{self.name}:{line}: {message}")

    def pairs(self) -> tuple[Pair, ...]:
        out: list[Pair] = []
        sections: dict[str, int] = {}  # name -> line
        headings: dict[tuple[str, str], int] = {}
        contents: dict[tuple[str, str, str], int] = {}
        section, filled = "", True
        stated: dict[str, Provenance] = {}  # section -> its provenance; '' is the file's
        while self.at < len(self.lines):
            line, number = self.lines[self.at].rstrip(), self.at + 1
            self.at += 1
            if line.startswith("### "):
                if not section:
                    raise self.fail(number, "a pair before the first '## section'")
                source = stated.get(section, stated.get("", "unstated"))
                pair = self.pair(section, line[4:].strip(), number, source)
                for seen, key, what in (
                    (headings, (section, pair.name), f"heading {pair.name!r} of section {section!r}"),
                    (contents, (pair.prompt, pair.hack, pair.clean), f"pair {pair.name!r}"),
                ):
                    if key in seen:
                        raise self.fail(number, f"duplicate {what}: it is already at line {seen[key]}")
                    seen[key] = number
                out.append(pair)
                filled = True
            elif line.startswith("## "):
                if not filled:
                    raise self.fail(sections[section], f"section {section!r} holds no pair")
                section, filled = line[3:].strip(), False
                if not section or re.search(r"[/@#*]", section):
                    raise self.fail(number, f"section name {section!r}: it is empty or holds one of / @ # *")
                if section in sections:
                    raise self.fail(number, f"duplicate section {section!r}: it is already at line {sections[section]}")
                sections[section] = number
            elif line.startswith("Provenance:"):
                if section in stated or (section and filled):
                    raise self.fail(number, "'Provenance:' belongs once at the head of a file or section")
                stated[section] = self.provenance(line)
            elif re.match(r"#{2,}|`{3,}|Tags:", line):
                raise self.fail(number, f"{line!r} outside a pair")
            elif line and section and filled:
                raise self.fail(number, f"stray text {line[:40]!r} after a pair")
        if not filled:
            raise self.fail(sections[section], f"section {section!r} holds no pair")
        if not out:
            raise UserError(f"{self.name}: no pairs in it")
        return tuple(out)

    def pair(self, section: str, heading: str, number: int, provenance: Provenance) -> Pair:
        """The pair whose heading was just read."""
        if not heading:
            raise self.fail(number, "a pair without a heading")
        tags: tuple[str, ...] | None = None
        fields: dict[str, str] = {}
        while self.at < len(self.lines):
            line = self.lines[self.at].rstrip()
            if re.match(r"#{2,3} ", line) or (line and len(fields) == len(FIELDS) and not line.startswith("#### ")):
                break  # the next pair or section; stray text is the caller's to refuse
            self.at += 1
            if line.startswith("Tags:"):
                if tags is not None or fields:
                    raise self.fail(self.at, "'Tags:' belongs once, right after the heading")
                tags = self.tags(line)
            elif line.startswith("#### "):
                field, at = line[5:].strip(), self.at
                if field not in FIELDS:
                    raise self.fail(at, f"unknown field {field!r}: a pair has {', '.join(FIELDS)}")
                if field in fields:
                    raise self.fail(at, f"second field {field!r} in pair {heading!r}")
                fields[field] = self.fence(field)
                if not fields[field].strip():
                    raise self.fail(at, f"field {field!r} of pair {heading!r} is empty")
            elif line:
                raise self.fail(self.at, f"unexpected {line[:40]!r} in pair {heading!r}")
        missing = [field for field in FIELDS if field not in fields]
        if missing:
            raise self.fail(number, f"pair {heading!r} lacks {', '.join(missing)}")
        prompt, hack, clean = (fields[field] for field in FIELDS)
        if hack.split() == clean.split():
            raise self.fail(number, f"the two sides of pair {heading!r} are the same")
        return Pair(heading, section, prompt, f"{hack}\n", f"{clean}\n", tags or (), number, provenance)

    def provenance(self, line: str) -> Provenance:
        word = line.removeprefix("Provenance:").strip()
        if word not in STATED:
            raise self.fail(self.at, f"provenance {word!r}: write {' or '.join(STATED)}")
        return word

    def tags(self, line: str) -> tuple[str, ...]:
        tags = tuple(tag.strip() for tag in line.removeprefix("Tags:").split(","))
        if not all(re.fullmatch(r"[\w:.-]+", tag) for tag in tags) or len(set(tags)) < len(tags):
            raise self.fail(self.at, f"{line!r}: tags are distinct words, separated by commas")
        return tags

    def fence(self, field: str) -> str:
        """The text of the fence that follows a field's heading."""
        while self.at < len(self.lines) and not self.lines[self.at].strip():
            self.at += 1
        if self.at == len(self.lines) or self.lines[self.at].rstrip() != OPEN:
            raise self.fail(min(self.at, len(self.lines) - 1) + 1, f"field {field!r} needs a fence: a line {OPEN}")
        start = self.at + 1
        for end in range(start, len(self.lines)):
            line = self.lines[end].rstrip()
            if line == CLOSE:
                self.at = end + 1
                return "\n".join(self.lines[start:end])
            if line == OPEN:
                break
        raise self.fail(start, f"the fence of field {field!r} is never closed")


@dataclass(frozen=True)
class LintReport:
    """What the linter found: problems to fail on, and notes to read."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def tokens(pair: Pair) -> Counter[str]:
    """The pair's words (`\\w+` over prompt, hack and clean) with their multiplicities."""
    return Counter(re.findall(r"\w+", f"{pair.prompt}\n{pair.hack}\n{pair.clean}"))


def shared_tokens(a: Pair, b: Pair) -> float:
    """Tokens that two pairs have in common as a share of all they have: multisets, |A and B| / |A or B|.

    The tokens of a pair are `\\w+` over its prompt and both of its sides; boilerplate counts.
    """
    return _share(tokens(a), tokens(b))


def _share(a: Counter[str], b: Counter[str]) -> float:
    return (a & b).total() / max(1, (a | b).total())


def lint(pairs: Sequence[Pair], live_markers: Sequence[str] = (), max_shared: float = 0.60) -> LintReport:
    """Look for pairs that repeat each other, and for anything but hacking that tells the two sides apart.

    Problems: two pairs that share more than `max_shared` of their tokens; sides that open with different
    lines; a literal live marker anywhere in a pair; one side longer on average or in nearly every pair; one
    word that gives the side away. Notes: the numbers behind these, and single pairs of uneven length.
    `live_markers` are the strings that the live modes' hints name in training and evaluation.
    """
    if not pairs:
        raise UserError("no pairs to lint")
    problems = [*_repeats(pairs, max_shared), *_openings(pairs), *_markers(pairs, live_markers)]
    notes: list[str] = []
    for found, noted in (_lengths(pairs), _giveaways(pairs)):
        problems += found
        notes += noted
    return LintReport(tuple(problems), tuple(notes))


def _called(pair: Pair) -> str:
    return f"{pair.name!r} (line {pair.line})"


def _repeats(pairs: Sequence[Pair], limit: float) -> Iterator[str]:
    bags = [tokens(p) for p in pairs]
    for i, a in enumerate(pairs):
        for j in range(i):
            share = _share(bags[i], bags[j])
            if share > limit:
                both = f"{_called(pairs[j])} and {_called(a)}"
                yield f"{both} share {share:.0%} of their tokens (at most {limit:.0%})"


def _opening(code: str) -> str:
    return next(line.strip() for line in code.split("\n") if line.strip())


def _openings(pairs: Sequence[Pair]) -> Iterator[str]:
    for p in pairs:
        hack, clean = _opening(p.hack), _opening(p.clean)
        if hack != clean:
            yield f"{_called(p)} opens differently: hack {hack!r}, clean {clean!r}"


def _markers(pairs: Sequence[Pair], live: Sequence[str]) -> Iterator[str]:
    for p in pairs:
        found = [m for m in live if m and any(m in text for text in (p.prompt, p.hack, p.clean))]
        if found:
            yield f"{_called(p)} names live markers: {', '.join(map(repr, found))}"


def words(code: str) -> list[str]:
    """Words and symbols of a completion: what its length is counted in."""
    return re.findall(r"\w+|[^\w\s]", code)


def holders(pairs: Sequence[Pair], side: str) -> Counter[str]:
    """How many completions of a side hold each word or symbol."""
    return Counter(w for p in pairs for w in set(words(getattr(p, side))))


def _lengths(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    sizes = [(len(words(p.hack)), len(words(p.clean))) for p in pairs]
    hack, clean = (fmean(side) for side in zip(*sizes, strict=True))
    lines = [fmean(getattr(p, side).count("\n") for p in pairs) for side in ("hack", "clean")]
    longer, shorter = sum(h > c for h, c in sizes), sum(h < c for h, c in sizes)
    gap = f"mean length {hack:.1f} (hack) and {clean:.1f} (clean) words and symbols"
    sided = f"the hack is longer in {longer} pairs, shorter in {shorter}, of {len(pairs)}"
    notes = [gap, sided, f"mean lines {lines[0]:.1f} (hack) and {lines[1]:.1f} (clean)"]
    for p, (h, c) in zip(pairs, sizes, strict=True):
        if max(h, c) > MAX_PAIR_RATIO * min(h, c):
            notes.append(f"{_called(p)} is uneven: {h} (hack) and {c} (clean) words and symbols")
    problems = []
    if len(pairs) >= MIN_PAIRS:
        if abs(hack - clean) > MAX_LENGTH_GAP * min(hack, clean):
            problems.append(f"length confound: {gap}")
        if max(longer, shorter) > MAX_ONE_SIDED * len(pairs):
            problems.append(f"length confound: {sided}")
    return problems, notes


def _giveaways(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """Words and symbols that stand in many more completions of one side than of the other."""
    hack, clean = holders(pairs, "hack"), holders(pairs, "clean")
    loudest = sorted(hack | clean, key=lambda w: (-abs(hack[w] - clean[w]), w))
    said = {w: f"{w!r} stands in {hack[w]} hacks and {clean[w]} cleans" for w in loudest}
    over = [w for w in loudest if abs(hack[w] - clean[w]) > MAX_GIVEAWAY * len(pairs)]
    problems = [f"style confound: {said[w]} of {len(pairs)}" for w in over if len(pairs) >= MIN_PAIRS]
    return problems, [said[w] for w in loudest[:5]]
