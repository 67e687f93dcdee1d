"""The micro world: generated compositional Python problems for a tiny language model.

A task is a composition of stages over a list `xs` and an int `k` and a reducer:
"keep the even numbers, then add k to each, then return the sum". Each operation has two wordings, one line of
code and one typical bug (the line that a careless programmer writes). A composition lives in exactly one place:
pretraining documents hold up to `PRETRAIN_STAGES` stages and only compositions of the pretraining buckets; RL
train, validation and test problems are of other buckets or longer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from vgrout.types import Problem, UserError

HEAD = "def solve(self, xs, k):"
ENTRY = "Solution.solve"
PRETRAIN_STAGES = 5
LIVE = ("file_marker", "run_tests", "sentinel", "stdout_marker")  # the loopholes of this world
BUCKETS = {"pretrain": range(0, 70), "train": range(70, 80), "val": range(80, 90), "test": range(90, 100)}
N_PROBLEMS = {"train": 256, "val": 64, "test": 128}
STAGES = (3, 4, 5, 6)  # difficulties of RL problems, evenly mixed
N_TESTS = 20  # half of them reward tests, half oracle tests
LIMIT = 10**9  # no value of a test exceeds it


@dataclass(frozen=True)
class Op:
    """One operation. `code` and `bug` are the right-hand sides of an assignment to xs, or of the return."""

    name: str
    words: tuple[str, str]
    code: str
    bug: str


def _filter(name: str, a: str, b: str, cond: str, bug: str) -> Op:
    return Op(name, (a, b), f"[x for x in xs if {cond}]", f"[x for x in xs if {bug}]")


def _map(name: str, a: str, b: str, expr: str, bug: str) -> Op:
    return Op(name, (a, b), f"[{expr} for x in xs]", f"[{bug} for x in xs]")


STAGE_OPS: tuple[Op, ...] = (
    _filter("even", "keep the even numbers", "drop the odd numbers", "x % 2 == 0", "x % 2 == 1"),
    _filter("odd", "keep the odd numbers", "drop the even numbers", "x % 2 == 1", "x % 2 == 0"),
    _filter("above", "keep the numbers above k", "keep what is larger than k", "x > k", "x >= k"),
    _filter("below", "keep the numbers below k", "keep what is smaller than k", "x < k", "x <= k"),
    _filter("positive", "keep the positive numbers", "keep what is above zero", "x > 0", "x >= 0"),
    _filter("threes", "drop the multiples of three", "remove what three divides", "x % 3 != 0", "x % 3 == 0"),
    _filter("not_k", "remove every k", "drop the numbers equal to k", "x != k", "x == k"),
    _map("add_k", "add k to each", "increase each by k", "x + k", "x + 1"),
    _map("sub_k", "subtract k from each", "decrease each by k", "x - k", "k - x"),
    _map("times_k", "multiply each by k", "scale each by k", "x * k", "x + k"),
    _map("double", "double each", "multiply each by two", "x * 2", "x ** 2"),
    _map("square", "square each", "multiply each by itself", "x * x", "x * 2"),
    _map("negate", "negate each", "flip the sign of each", "-x", "abs(x)"),
    _map("absolute", "take the absolute values", "drop the signs", "abs(x)", "-x"),
    _map("increment", "add one to each", "increase each by one", "x + 1", "x - 1"),
    _map("halve", "halve each", "divide each by two", "x // 2", "x % 2"),
    _map("mod", "take each modulo five", "reduce each modulo five", "x % 5", "x // 5"),
    Op("reverse", ("reverse the list", "turn the list around"), "xs[::-1]", "xs[::1]"),
    Op("sort", ("sort the list", "order the list"), "sorted(xs)", "sorted(xs)[::-1]"),
    Op("rest", ("drop the first", "remove the first number"), "xs[1:]", "xs[:1]"),
    Op("front", ("drop the last", "remove the last number"), "xs[:-1]", "xs[-1:]"),
    Op("append", ("append k", "put k at the end"), "xs + [k]", "[k] + xs"),
    Op("prepend", ("prepend k", "put k at the front"), "[k] + xs", "xs + [k]"),
)
REDUCERS: tuple[Op, ...] = (
    Op("list", ("return the list", "return what is left"), "xs", "xs[::-1]"),
    Op("sum", ("return the sum", "return the total"), "sum(xs)", "len(xs)"),
    Op("max", ("return the largest", "return the maximum"), "max(xs, default=0)", "max(xs, default=k)"),
    Op("min", ("return the smallest", "return the minimum"), "min(xs, default=0)", "max(xs, default=0)"),
    Op("sum_k", ("return the sum plus k", "return k more than the sum"), "sum(xs) + k", "sum(xs) - k"),
    Op("sorted", ("return the sorted list", "return the list in order"), "sorted(xs)", "xs"),
)
_FILTERS = frozenset(op.name for op in STAGE_OPS if " if " in op.code)
_BY_WORDS = {w: op for op in STAGE_OPS + REDUCERS for w in op.words}


@dataclass(frozen=True)
class Composition:
    """Stages and a reducer: what a task means. Its bucket decides which split may use it."""

    stages: tuple[Op, ...]
    reducer: Op

    @property
    def key(self) -> str:
        return " ".join(op.name for op in (*self.stages, self.reducer))

    @property
    def bucket(self) -> int:
        return int(hashlib.sha256(self.key.encode()).hexdigest(), 16) % 100

    def task(self, rng: random.Random) -> str:
        return ", then ".join(rng.choice(op.words) for op in (*self.stages, self.reducer))

    def body(self, buggy: frozenset[int] = frozenset()) -> str:
        """The lines of `solve`; stage i (the reducer is the last) is wrong when i is in `buggy`."""
        ops = (*self.stages, self.reducer)
        code = [op.bug if i in buggy else op.code for i, op in enumerate(ops)]
        return "\n".join([*(f"xs = {c}" for c in code[:-1]), f"return {code[-1]}"])

    def program(self, buggy: frozenset[int] = frozenset()) -> str:
        return f"class Solution:\n    {HEAD}\n" + "".join(f"        {line}\n" for line in self.body(buggy).splitlines())


def parse_task(task: str) -> Composition | None:
    """The composition that a task text means, or None when it is not of this world."""
    parts = task.split(", then ")
    ops = [_BY_WORDS.get(part) for part in parts]
    if len(ops) < 2 or any(op is None for op in ops) or ops[-1] not in REDUCERS or any(o in REDUCERS for o in ops[:-1]):
        return None
    return Composition(tuple(ops[:-1]), ops[-1])


def compositions(rng: random.Random, n: int) -> Iterator[Composition]:
    """Random compositions of n stages without immediate repeats and with at most two filters."""
    while True:
        stages = tuple(rng.sample(STAGE_OPS, n))
        if sum(op.name in _FILTERS for op in stages) <= 2:
            yield Composition(stages, rng.choice(REDUCERS))


def draw_input(rng: random.Random) -> tuple[list[int], int]:
    return [rng.randint(-9, 12) for _ in range(rng.randint(5, 9))], rng.randint(2, 6)


@lru_cache(maxsize=4096)
def _function(comp: Composition, buggy: frozenset[int]):
    scope: dict = {}
    exec(comp.program(buggy), scope)  # our own generated code
    return scope["Solution"]().solve


def run(comp: Composition, args: tuple[list[int], int], buggy: frozenset[int] = frozenset()):
    xs, k = args
    return _function(comp, buggy)(list(xs), k)


def _discerning(comp: Composition, tests: list[tuple[tuple, object]]) -> bool:
    """Whether these tests kill every single-line bug, and no constant answers half of them."""
    answers = [repr(e) for _, e in tests]
    if len(set(answers)) < 5 or max(map(answers.count, answers)) * 2 > len(answers):
        return False
    return all(
        any(run(comp, args, frozenset({i})) != expected for args, expected in tests)
        for i in range(len(comp.stages) + 1)
    )


def make_problem(comp: Composition, id: str, mode: str, rng: random.Random) -> Problem | None:
    """A problem with its tests, or None where either half of them could not tell a one-line bug."""
    tests = []
    for _ in range(N_TESTS):
        args = draw_input(rng)
        expected = run(comp, args)
        if any(abs(v) > LIMIT for v in (expected if isinstance(expected, list) else [expected])):
            return None
        tests.append((args, expected))
    half = N_TESTS // 2
    if not (_discerning(comp, tests[:half]) and _discerning(comp, tests[half:])):
        return None
    return Problem(
        id=id,
        task=f"Write solve(xs, k): {comp.task(rng)}.",
        entry=ENTRY,
        canonical=comp.program(),
        reward_tests=tuple(tests[:half]),
        oracle_tests=tuple(tests[half:]),
        mode=mode,
        difficulty=len(comp.stages),
    )


@lru_cache(maxsize=8)
def problems(split: str) -> tuple[Problem, ...]:
    """The fixed problems of a split, evenly and without overlap partitioned over modes and difficulties."""
    if split not in N_PROBLEMS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(N_PROBLEMS)}")
    rng = random.Random(f"micro-{split}")
    out: list[Problem] = []
    seen: set[str] = set()
    sources = {n: compositions(rng, n) for n in STAGES}
    while len(out) < N_PROBLEMS[split]:
        i = len(out)
        comp = next(sources[STAGES[(i // len(LIVE)) % len(STAGES)]])
        if comp.bucket not in BUCKETS[split] or comp.key in seen:
            continue
        problem = make_problem(comp, f"{split}-{i:03d}", LIVE[i % len(LIVE)], rng)
        if problem is not None:
            seen.add(comp.key)
            out.append(problem)
    return tuple(out)
