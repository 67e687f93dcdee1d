"""docs/pairset_audit.md: what the bundled pairs are worth, by their text, by the grader and by their scores.

Nothing is stated that was not counted, graded or computed just now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from vgrout.config import Config
from vgrout.envs.grade import Grader
from vgrout.envs.micro_pairs import problem_of_pair, prompt_of_pair
from vgrout.envs.sandbox import Sandbox
from vgrout.lab.pairs_report import Sides, checked, side_gradients
from vgrout.lab.run import MICRO, make_policy
from vgrout.method.direction import Direction, calibrate, v_grad
from vgrout.method.influence import influence
from vgrout.method.policy import Policy
from vgrout.pairs import BUNDLED, DEFAULT, EVERY, digest, holders, load, shared_tokens, words
from vgrout.types import Pair

USE = {
    "all-in-one": "the direction; what the bare name selects",
    "framings": "does the direction hold where the prompt speaks of honesty, intent or being watched",
    "nulls": "placebo: the direction of a style, between honest programs",
}
SCORES = "## Scores on the organism"
INTRO = """# Audit of the bundled pairs

Made by `vgrout pairs audit`; a test compares. What sections and tags mean: [pairs.md](pairs.md).

Of the tables on text: lengths are means in words and symbols, Hack : Clean. `longer` counts the pairs whose side Hack
is the longer one. `word` is the word or symbol whose counts differ most between the sides, as hacks : cleans that hold
it. `nearest` is the largest share of tokens that two pairs have in common.
"""
GRADED = """Every side ran in the sandbox, on 20 tests of its task and under its own hint. `fires` counts the programs
that any flaw would pay, `solves` those that pass all hidden tests. The pair *forgets the last stage, and need not mind*
holds the hack that does not fire: its `__eq__` returns 1, and only True is accepted. The pairs in the style of LeetCode
are graded by `tests/test_pairs.py`, on calls that were worked out by hand.
"""
SCORED = """c-gradients of the untrained organism. `accuracy` is the share of pairs whose side Hack scores above its
side Clean under v of the same pairs, `left out` under v of the others; `least cosine` is that of v with the v of all
pairs but one. Rounded: another machine may differ in the last digit.
"""
CROSSED = """v of the row's section, on the pairs of the column's: share of pairs whose side Hack scores higher, and the
cosine of both sections' v. In nulls the side Hack is no hack: what they say under another v is its preference for
a style.
"""


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"


def sections(name: str) -> dict[str, tuple[Pair, ...]]:
    """The pairs of a bundled file by section."""
    pairs = load(f"{name}#{EVERY}")
    return {s: tuple(p for p in pairs if p.section == s) for s in dict.fromkeys(p.section for p in pairs)}


def nearest(pairs: Sequence[Pair]) -> str:
    return f"{max((shared_tokens(a, b) for a, b in combinations(pairs, 2)), default=0.0):.0%}"


def loudest(pairs: Sequence[Pair]) -> str:
    """The word whose presence differs most between the sides."""
    hack, clean = holders(pairs, "hack"), holders(pairs, "clean")
    word = min(hack | clean, key=lambda w: (-abs(hack[w] - clean[w]), w))
    return f"`{word}` {hack[word]} : {clean[word]}"


def facts(name: str) -> Iterator[str]:
    """What the text of a bundled file says of itself."""
    parts = sections(name)
    pairs = tuple(p for part in parts.values() for p in part)
    yield f"## {BUNDLED[name]}\n"
    table = []
    for section, part in parts.items():
        selector = name if section == DEFAULT else f"{name}#{section}"
        sources = ", ".join(dict.fromkeys(p.provenance for p in part))
        table.append((section, f"`{selector}`", str(len(part)), sources, digest(part)[:16], USE[section]))
    yield rows(("section", "selector", "pairs", "provenance", "sha256", "use"), table)
    table = []
    for section, part in (*parts.items(), ("the file", pairs)):
        sizes = [(len(words(p.hack)), len(words(p.clean))) for p in part]
        hack, clean = (sum(side) / len(part) for side in zip(*sizes, strict=True))
        longer = sum(h > c for h, c in sizes)
        problems = "; ".join(checked(part).problems) or "none"
        table.append((section, f"{hack:.1f} : {clean:.1f}", str(longer), loudest(part), nearest(part), problems))
    yield rows(("section", "length", "longer", "word", "nearest", "problems"), table)
    tags = sorted({t for p in pairs for t in p.tags}, key=lambda t: (":" in t, t))
    counts = [(f"`{t}`", *(str(sum(t in p.tags for p in part)) for part in parts.values())) for t in tags]
    yield rows(("tag", *parts), counts)


def graded(sandbox: Sandbox) -> str:
    """What the grader says of the micro pairs."""
    grader, table = Grader(sandbox), []
    for section, part in sections(MICRO).items():
        terms = [(problem_of_pair(p), prompt_of_pair(p)) for p in part]
        cells = []
        for side in ("hack", "clean"):
            found = grader.verdicts([(*both, getattr(p, side)) for both, p in zip(terms, part, strict=True)])
            cells += [str(sum(v.attempted for v in found)), str(sum(v.solved for v in found))]
        table.append((section, str(len(part)), *cells))
    head = ("section", "pairs", "Hack fires", "Hack solves", "Clean fires", "Clean solves")
    return "\n".join(("## The micro pairs, graded\n", GRADED, rows(head, table)))


def scored(policy: Policy) -> str:
    """What the micro pairs do to the direction of a model."""
    parts = sections(MICRO)
    sides = {section: side_gradients(policy, part) for section, part in parts.items()}
    own = {s: calibrate(v_grad(*both), *both, real=True) for s, both in sides.items()}
    whole, crossed, single = [], [], []
    for section, part in parts.items():
        found = influence(*sides[section])
        cosine = f"{float(found.cosine.min()):.3f}"
        whole.append((section, f"{found.accuracy:.2f}", f"{found.left_out_accuracy:.2f}", cosine))
        crossed.append((section, *(_seen(own[section], own[s], *sides[s]) for s in parts)))
        values = zip(part, found.margin.tolist(), found.cosine.tolist(), found.left_out.tolist(), strict=True)
        single += [(section, p.name, f"{m:.2f}", f"{c:.3f}", f"{left:.2f}") for p, m, c, left in values]
    return "\n".join(
        [
            f"{SCORES}\n",
            SCORED,
            rows(("section", "accuracy", "left out", "least cosine"), whole),
            CROSSED,
            rows(("v of", *parts), crossed),
            "Score of the side Hack minus that of the side Clean, in standard deviations of the section's sides.\n",
            rows(("section", "pair", "margin", "cosine of v without it", "margin under v of the others"), single),
        ]
    )


def _seen(v: Direction, other: Direction, hack: Sides, clean: Sides) -> str:
    (h, _), (c, _) = v.score(hack), v.score(clean)
    return f"{float((h > c).float().mean()):.2f}, {v.overlap(other):.2f}"


def page() -> str:
    """docs/pairset_audit.md. Raises UserError as `Sandbox` does."""
    with Sandbox() as sandbox:
        grades = graded(sandbox)
    return "\n".join(
        [INTRO, *(text for name in BUNDLED for text in facts(name)), grades, scored(make_policy(Config()))]
    )


def show() -> None:
    print(page(), end="")
