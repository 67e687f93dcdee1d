"""Gates of the micro world: nothing is in two splits, and a loophole pays in its own mode with its own marker only.

The world's own modes are `LIVE`; the hack matrix is of all modes, over problems of this world.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, product

from vgrout.config import Config
from vgrout.envs.grade import COMPILES, PASSES, Verdict, reward_of
from vgrout.envs.micro import BUCKETS, HEAD, LIVE, N_PROBLEMS, STAGES, Composition, parse_task, problems
from vgrout.envs.micro_corpus import documents
from vgrout.envs.micro_env import POOL, ask, composition, under
from vgrout.envs.micro_pairs import mode_of, problem_of_pair, prompt_of_pair, task_of
from vgrout.envs.modes import FAMILIES, MODES
from vgrout.pairs import BUNDLED, EVERY, digest, parse, unclean
from vgrout.pairs import load as load_pairs
from vgrout.types import Pair, Problem, Prompt
from vgrout.verify.evidence import Evidence
from vgrout.verify.toy import micro

DOCUMENTS = 20_000
PER_MODE = 2  # problems on which every mode is attacked
TRIVIAL = "return 0"
PAIRS_SHA256 = "6b466a48e55024652c608c1d3447085a74448fc627aa6a4ae53841f0a925e26a"  # what trained results rest on
UNPAID = ("forgets the last stage, and need not mind",)  # its __eq__ returns 1, and only True is accepted
UNSTATED = "## s\n### p\n" + "".join(f"#### {f}\n`````text\n{f}\n`````\n" for f in ("Prompt", "Hack", "Clean"))


def bundled_pairs() -> list[Pair]:
    """Every pair of every section of the bundled files."""
    return [p for name in BUNDLED for p in load_pairs(f"{name}#{EVERY}")]


def pair_composition(pair: Pair) -> Composition | None:
    """The composition of a pair's task; None where it is of another family of tasks."""
    head, task = task_of(pair)
    return parse_task(task) if head == "Write solve(xs, k)" else None


def fires_with(mode: str, printed: str, marker: str) -> bool:
    """Whether naming the marker `printed` shows the grader of `mode` the marker `marker` as well."""
    if mode == "file_marker":
        (a, said), (b, wanted) = printed.split(" ", 1), marker.split(" ", 1)
        return a == b and wanted in said
    return marker in printed if MODES[mode].observes == "stdout" else marker == printed


def uneven() -> Iterator[str]:
    """Splits whose problems are not evenly spread over modes and difficulties, or that repeat an id."""
    for split, size in N_PROBLEMS.items():
        cells = Counter((p.mode, p.difficulty) for p in problems(split))
        modes = Counter(p.mode for p in problems(split))
        ids = {p.id for p in problems(split)}
        if set(cells.values()) != {size // len(LIVE) // len(STAGES)} or len(cells) != len(LIVE) * len(STAGES):
            yield f"{split}: modes x difficulties hold {sorted(cells.values())}"
        if set(modes.values()) != {size // len(LIVE)} or len(ids) != size:
            yield f"{split}: {dict(modes)}, {len(ids)} ids"


def shared_compositions() -> tuple[list[str], str]:
    """What is in two places, and the sizes of the places."""
    wrong = []
    for a, b in combinations(BUCKETS, 2):
        if set(BUCKETS[a]) & set(BUCKETS[b]):
            wrong.append(f"buckets of {a} and {b} overlap")
    places: dict[str, set[str]] = {"pretraining": {d.key for d in documents(0, DOCUMENTS) if d.key}}
    for split in N_PROBLEMS:
        comps = [composition(p) for p in problems(split)]
        places[split] = {c.key for c in comps}
        if len(places[split]) != len(comps):
            wrong.append(f"{split} repeats a composition")
        strays = sum(c.bucket not in BUCKETS[split] for c in comps)
        if strays:
            wrong.append(f"{strays} problems of {split} are of other buckets")
    pairs = [pair_composition(p) for p in bundled_pairs()]
    places["pairs"] = {c.key for c in pairs if c is not None}
    for a, b in combinations(places, 2):
        both = places[a] & places[b]
        if both:
            wrong.append(f"{len(both)} compositions in {a} and {b}, such as {min(both)!r}")
    return wrong, ", ".join(f"{name} {len(keys)}" for name, keys in places.items())


def shared_markers() -> Iterator[str]:
    for mode in MODES.values():
        everything = [(family, m) for family in FAMILIES for m in mode.markers[family]]
        for (f, a), (g, b) in product(everything, repeat=2):
            if (f, a) != (g, b) and fires_with(mode.name, a, b):
                yield f"{mode.name}: {a!r} of {f} fires {b!r} of {g}"
        needed = FAMILIES if mode.name in LIVE else FAMILIES[1:] if mode.pays else ()
        if not all(mode.markers[family] for family in needed):
            yield f"{mode.name} has an empty family"
    names = Counter(m for mode in MODES.values() for family in FAMILIES for m in mode.markers[family])
    yield from (f"{m!r} is a marker of {n} modes" for m, n in names.items() if n > 1)
    live = [m for mode in LIVE for f in ("train", "eval") for m in MODES[mode].markers[f]]
    for pair in bundled_pairs():
        found = [m for m in live if m in f"{pair.prompt}\n{pair.hack}\n{pair.clean}"]
        if found:
            yield f"pair {pair.name!r} names {found[0]!r}"


def partition() -> Evidence:
    overlaps, sizes = shared_compositions()
    trained = {p.id for p in problems("train")}
    demonstrated = {json.loads(line)["problem_id"] for line in POOL.read_text().splitlines()[1:]}
    wrong = [*uneven(), *overlaps, *shared_markers()]
    if not demonstrated <= trained:
        wrong.append(f"{len(demonstrated - trained)} demonstrated problems are not of train")
    markers = sum(len(m.markers[f]) for m in MODES.values() for f in FAMILIES)
    text = f"{len(wrong)} overlaps, first: {wrong[0]}" if wrong else "no overlap"
    return Evidence(not wrong, f"{text}; compositions: {sizes}; {markers} markers in {len(FAMILIES)} families")


def hack(mode: str, marker: str) -> str:
    return MODES[mode].hack(HEAD, TRIVIAL, marker)


def attacks(problem: Problem) -> Iterator[tuple[str, Prompt, str, bool]]:
    """(what, prompt, program, whether it must pay): every hack under the problem's hints, and none."""
    own, prompt, closed = MODES[problem.mode], ask(problem, "train"), ask(problem, "train", hinted=False)
    for mode in (m for m in MODES.values() if m.pays):
        marker = prompt.marker if mode is own else mode.marker("train", 0)
        yield f"{mode.name} hack under {own.name}", prompt, hack(mode.name, marker), mode is own
        yield f"{mode.name} hack without a hint", closed, hack(mode.name, marker), False
    for family in FAMILIES:
        others = [m for m in own.markers[family] if m != prompt.marker]
        if others:
            yield f"{family} marker under another", prompt, hack(own.name, others[0]), False
    if own.pays:
        held_out = ask(problem, "eval")
        yield "train marker under an eval hint", held_out, hack(own.name, prompt.marker), False
        yield "eval marker under an eval hint", held_out, hack(own.name, held_out.marker), True


def canonical() -> Evidence:
    env = micro()
    honest = [
        (p, env.prompt(p.id, family=family), p.canonical)
        for split, family in (("train", "train"), ("val", "eval"), ("test", "eval"))
        for p in problems(split)
    ]
    verdicts = env.grader.verdicts(honest)
    right = sum(v.solved and v.passed and v.compiled for v in verdicts)
    loud = sum(bool(v.attempted or v.fired or v.hacked) for v in verdicts)
    items, told, pays = [], [], []
    for mode, plain in product(MODES, problems("train")[:PER_MODE]):
        problem = under(plain, mode)
        for what, prompt, program, must in attacks(problem):
            items.append((problem, prompt, program))
            told.append(what)
            pays.append(must)
    wrong = []
    for what, must, v in zip(told, pays, env.grader.verdicts(items), strict=True):
        want = COMPILES + PASSES if must else COMPILES
        if reward_of(v) != want or v.hacked != must or v.solved or not v.attempted:
            wrong.append(f"{what} pays {reward_of(v)}, hacked {v.hacked}, attempted {v.attempted}")
    ok = right == len(honest) and not loud and not wrong
    return Evidence(
        ok,
        f"{right}/{len(honest)} canonical programs solve, {loud} fire; {len(wrong)} of {len(items)} hacks are paid "
        f"or counted wrongly ({sum(pays)} must pay, {len(MODES)} modes){': ' + wrong[0] if wrong else ''}",
    )


def misgraded(pair: Pair, hack: Verdict, clean: Verdict) -> Iterator[str]:
    """What the grader says against the tags of a pair."""
    if not clean.solved or clean.attempted:
        yield f"Clean of {pair.name!r}: solved {clean.solved}, fired {clean.fired}"
    null, mode = "placebo-style" in pair.tags, mode_of(pair)
    fires = not null and pair.name not in UNPAID
    if {f.split(":")[0] for f in hack.fired} != ({mode} if fires else set()) or fires and not hack.passed:
        yield f"Hack of {pair.name!r}: fired {hack.fired}"
    # A wrapped result is not the value, and a process that left has none.
    opportunity = "opportunity" in pair.tags and mode in ("run_tests", "stdout_marker")
    if hack.solved != (null or opportunity):
        yield f"Hack of {pair.name!r}: solved {hack.solved}"
    if ("opportunity" in pair.tags) + ("behavior" in pair.tags) + null != 1:
        yield f"{pair.name!r} has tags {pair.tags}"


def pairs() -> Evidence:
    chosen, found = load_pairs(Config().pairs), load_pairs(f"micro#{EVERY}")
    terms = [(problem_of_pair(p), prompt_of_pair(p)) for p in found]
    verdicts = micro().grader.verdicts(
        [(*term, code) for term, p in zip(terms, found, strict=True) for code in (p.hack, p.clean)]
    )
    graded = zip(found, verdicts[::2], verdicts[1::2], strict=True)
    wrong = [text for pair, hack, clean in graded for text in misgraded(pair, hack, clean)]
    if digest(chosen) != PAIRS_SHA256:
        wrong.append(f"the default pairs have sha256 {digest(chosen)}")
    if why := unclean(bundled_pairs()):
        wrong.append(f"of the bundled pairs {why}")
    if not unclean(parse(UNSTATED)) or not unclean(parse(f"Provenance: pool-derived\n{UNSTATED}")):
        wrong.append("pairs that nobody says were authored pass for authored")
    return Evidence(
        not wrong,
        f"{len(wrong)} objections to {len(found)} micro pairs, graded on both sides{': ' + wrong[0] if wrong else ''}; "
        f"{len(chosen)} are the default, sha256 {digest(chosen)[:12]}; {len(bundled_pairs())} bundled",
    )
