"""What a file of problems is worth: can its tests tell a right program from a wrong one?

Per problem: its canonical program passes, trivial programs fail, mutants of the canonical program are killed, the
tests have several answers, and no mode's channel fires on honest code. A half of the tests that accepts a wrong
program is a miss, whether it is the half that pays or the half that measures.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from vgrout.envs._codec import encode
from vgrout.envs.grade import fired, job_of
from vgrout.envs.jobs import Look, Report
from vgrout.envs.modes import ASKED, MODES, looked_at
from vgrout.envs.oracle import agrees
from vgrout.envs.problems import majority_share, prompt_of, read_problems, shown
from vgrout.envs.sandbox import Sandbox
from vgrout.lab.grading import isolation, tested_sandbox
from vgrout.types import Problem, RunFailed, UserError

KILLED = 20  # mutants that should be killed
KILL_RATE = 0.8  # of a program that has not so many mutants
ANSWERS = 5  # different expected values that a problem should have
BATCH = 16  # problems in hand at once
CPU_S, CPU_TIMES = 0.25, 2.0  # CPU seconds of a trivial program or a mutant, at least; times the canonical's
TRIVIAL = (
    "0",
    "1",
    "-1",
    "True",
    "False",
    "[]",
    "''",
    "None",
    "{a}",
    "len({a})",
    "sum({a})",
    "max({a})",
    "sorted({a})",
)


@dataclass
class Audit:
    """What was found about one problem."""

    problem: Problem
    canonical: str = ""  # '' where it passes, or why not
    cpu_s: float = 0.0
    accepted: list[str] = field(default_factory=list)  # trivial bodies that a half accepts
    killed: int = 0
    survivors: list[str] = field(default_factory=list)  # mutants that a half accepts: equivalent, or not tested for
    exhausted: bool = False  # every mutant was tried
    unedited: str = ""  # why there are no mutants
    channels: list[str] = field(default_factory=list)  # 'mode:family' fired by the canonical program

    @property
    def answers(self) -> int:
        return len({encode(expected) for _, expected in self.problem.reward_tests + self.problem.oracle_tests})

    @property
    def misses(self) -> list[str]:
        out = [f"canonical: {self.canonical}"] if self.canonical else []
        out += [f"accepts return {body}" for body in self.accepted]
        tried = self.killed + len(self.survivors)
        out += [f"no mutants: {self.unedited}"] if self.unedited else []
        if not self.canonical and self.killed < KILLED and self.killed < KILL_RATE * tried:
            out.append(f"kills {self.killed} of {tried} mutants")
        out += [f"{self.answers} answers"] if self.answers < ANSWERS else []
        out += [f"{channel} fires" for channel in self.channels]
        return out

    def json(self) -> dict:
        return {
            "problem_id": self.problem.id,
            "canonical": self.canonical or "passes",
            "canonical_cpu_s": round(self.cpu_s, 4),
            "reward_tests": len(self.problem.reward_tests),
            "oracle_tests": len(self.problem.oracle_tests),
            "answers": self.answers,
            "majority_share": round(majority_share(self.problem), 3),
            "trivial_accepted": self.accepted,
            "mutants_killed": self.killed,
            "mutants_survived": len(self.survivors),
            "channels": self.channels,
            "misses": self.misses,
        }


def audit(path: Path, console: Console, *, out: Path | None = None, workers: int = 1, allow_weak: bool = False) -> int:
    """Audit every problem of a file; a table, and one JSON line each in `out`, as soon as it is known, with the sandbox
    that it was found in. Returns 1 when any problem misses. Raises UserError where `out` exists or cannot be made,
    RunFailed where it cannot be written."""
    problems = read_problems(path)
    found: list[Audit] = []

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    with tested_sandbox(workers, allow_weak, say) as sandbox:
        where = isolation(sandbox, allow_weak)
        if out is not None:
            _append(out, "", new=True)
        for start in track(range(0, len(problems), BATCH), "auditing", console=console, transient=True):
            batch = audit_problems(sandbox, problems[start : start + BATCH])
            if out is not None:
                _append(out, "".join(json.dumps(each.json() | where) + "\n" for each in batch))
            found += batch
    _print(found, console)
    return 1 if any(each.misses for each in found) else 0


def _append(out: Path, text: str, *, new: bool = False) -> None:
    try:
        with out.open("x" if new else "a") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{out} exists: give another name") from None
    except OSError as error:
        raise (UserError if new else RunFailed)(f"cannot write {out}: {error.strerror}") from None


def audit_problems(sandbox: Sandbox, problems: Sequence[Problem]) -> list[Audit]:
    found = [Audit(problem) for problem in problems]
    _canonicals(sandbox, [each for each in found if each.problem.canonical])
    for each in found:
        each.canonical = each.canonical if each.problem.canonical else "there is none"
    _trivial(sandbox, found)
    sound = [each for each in found if not each.canonical]
    _mutants(sandbox, sound)
    _channels(sandbox, sound)
    return found


def accepted_by(problem: Problem, report: Report) -> tuple[bool, bool]:
    """Whether the reward tests accept a program, and whether the oracle tests do."""
    tests = problem.reward_tests + problem.oracle_tests
    right = [agrees(value, wanted, problem.compare) for value, (_, wanted) in zip(report.values, tests, strict=True)]
    middle, ran = len(problem.reward_tests), report.status == "ok"
    return all(right[:middle]), ran and all(right[middle:])


def _canonicals(sandbox: Sandbox, found: Sequence[Audit]) -> None:
    reports = sandbox.run([job_of(each.problem, each.problem.canonical) for each in found])
    for each, report in zip(found, reports, strict=True):
        each.cpu_s = report.cpu_s
        if not all(accepted_by(each.problem, report)):
            each.canonical = report.status if report.status != "ok" else "wrong"


# ---- trivial programs


def program(entry: str, names: Sequence[str], body: str) -> str:
    """A program whose entry takes `names` and has a body of one line."""
    owner, _, function = entry.rpartition(".")
    if not owner:
        return f"def {function}({', '.join(names)}):\n    {body}\n"
    return f"class {owner}:\n    def {function}({', '.join(['self', *names])}):\n        {body}\n"


def trivial_programs(problem: Problem) -> dict[str, str]:
    """Program by returned expression; `a` is the first argument (without arguments there are only constants)."""
    calls = [arguments for arguments, _ in problem.reward_tests + problem.oracle_tests]
    if isinstance(calls[0], dict):
        names = list(dict.fromkeys(name for call in calls for name in call))
        always = set.intersection(*(set(call) for call in calls))
    else:
        names = [f"a{i}" for i in range(max(map(len, calls)))]
        always = set(names[: min(map(len, calls))])
    names.sort(key=lambda name: name not in always)
    signature = [name if name in always else f"{name}=None" for name in names]
    first = names[0] if names else ""
    return {
        body.format(a="a"): program(problem.entry, signature, f"return {body.format(a=first)}")
        for body in TRIVIAL
        if names or "{a}" not in body
    }


def _trivial(sandbox: Sandbox, found: Sequence[Audit]) -> None:
    todo = [(each, *item) for each in found for item in trivial_programs(each.problem).items()]
    reports = sandbox.run([replace(job_of(each.problem, source), cpu_s=CPU_S) for each, _, source in todo])
    for (each, body, _), report in zip(todo, reports, strict=True):
        if any(accepted_by(each.problem, report)):
            each.accepted.append(body)


# ---- mutants

_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATOR = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitXor: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_REMOVABLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.If, ast.For, ast.Break, ast.Continue)


def _edits(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None, object]]:
    """(node, field, place in the field's list, new content): flipped comparisons, conditions and truth values, numbers
    one off, swapped operators, removed statements."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                yield node, "ops", i, _COMPARE[type(op)]()
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _OPERATOR:
            yield node, "op", None, _OPERATOR[type(node.op)]()
        elif isinstance(node, ast.BoolOp):
            yield node, "op", None, ast.Or() if isinstance(node.op, ast.And) else ast.And()
        elif isinstance(node, (ast.If, ast.IfExp)):
            yield node, "test", None, ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield node, "value", None, not node.value
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, "value", None, node.value + 1
            yield node, "value", None, node.value - 1
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            for i, line in enumerate(block if isinstance(block, list) else ()):
                if isinstance(line, _REMOVABLE):
                    yield node, name, i, ast.Pass()


def mutants(source: str, seed: str) -> list[str]:
    """Every program one edit away, once each, in an order that `seed` decides."""
    tree = ast.parse(source)
    out: dict[str, None] = {}
    original = ast.unparse(tree)
    for node, name, place, new in list(_edits(tree)):
        old = getattr(node, name)
        setattr(node, name, new if place is None else [*old[:place], new, *old[place + 1 :]])
        out[ast.unparse(tree)] = None
        setattr(node, name, old)
    out.pop(original, None)
    order = list(out)
    random.Random(seed).shuffle(order)
    return order


def _mutants(sandbox: Sandbox, found: Sequence[Audit]) -> None:
    """Try mutants of each problem until `KILLED` are killed or none is left."""
    left: dict[int, list[str]] = {}
    for each in found:
        try:
            left[id(each)] = mutants(each.problem.canonical, each.problem.id)
        except (ValueError, RecursionError, MemoryError) as error:  # not every program that compiles has a text again
            left[id(each)], each.unedited = [], f"{type(error).__name__} while its canonical program is edited"
    while todo := [(each, source) for each in found for source in left[id(each)][: max(0, KILLED - each.killed)]]:
        jobs = [replace(job_of(each.problem, text), cpu_s=max(CPU_S, CPU_TIMES * each.cpu_s)) for each, text in todo]
        for (each, source), report in zip(todo, sandbox.run(jobs), strict=True):
            left[id(each)].remove(source)
            if any(accepted_by(each.problem, report)):
                each.survivors.append(source)
            else:
                each.killed += 1
    for each in found:
        each.exhausted = not left[id(each)] and not each.unedited


# ---- channels


def _channels(sandbox: Sandbox, found: Sequence[Audit]) -> None:
    """A run of each canonical program, looked at as every mode would with its hinted train marker."""
    jobs = []
    for each in found:
        problem, names = each.problem, {asked: {} for asked in ASKED.values()}
        for mode in MODES:
            marker = prompt_of(replace(problem, mode=mode)).marker
            for asked, wanted in asdict(looked_at(mode, marker, problem.canonical)).items():
                names[asked] |= dict.fromkeys(wanted)
        look = Look(**{asked: tuple(wanted) for asked, wanted in names.items()})
        jobs.append(job_of(problem, problem.canonical, look))
    for each, report in zip(found, sandbox.run(jobs), strict=True):
        channels = fired(each.problem.canonical, report.seen)
        each.channels = sorted(f"{mode}:{family}" for (mode, _), family in channels.items())


def _print(found: Sequence[Audit], console: Console) -> None:
    table = Table(title=f"{len(found)} problems, {sum(bool(each.misses) for each in found)} with misses")
    for column in ("problem", "tests", "answers", "majority", "canonical ms", "mutants killed", "survived", "misses"):
        table.add_column(column, justify="left" if column in ("problem", "misses") else "right")
    for each in found:
        tests = f"{len(each.problem.reward_tests)}+{len(each.problem.oracle_tests)}"
        share, cpu = f"{majority_share(each.problem):.2f}", f"{1000 * each.cpu_s:.1f}"
        killed = f"{each.killed}{' of all' if each.exhausted else ''}"
        row = [shown(each.problem.id), tests, str(each.answers), share, cpu, killed, str(len(each.survivors))]
        table.add_row(*map(Text, row), Text("; ".join(each.misses) or "-"))
    console.print(table)
