"""The problems for other libraries that evaluate or train: prompts out, completions in, numbers back.

A `Question` is a problem under a prompt, as the deploy evaluation asks it: `markers` names the family that the hint's
marker comes from (`eval` is held out), `hinted` False closes the loophole and does not mention it. Programs run in this
project's sandbox and nowhere else; one sandbox serves a process from its first score to its end.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from vgrout.envs import micro
from vgrout.envs.grade import Grader, Verdict, reward_of
from vgrout.envs.micro_env import ask
from vgrout.envs.modes import FAMILIES
from vgrout.envs.problems import check_mode, prompt_of, read_problems
from vgrout.envs.sandbox import Sandbox
from vgrout.envs.selftest import self_test
from vgrout.types import Problem, Prompt, UserError

MICRO = "micro"


@dataclass(frozen=True)
class Question:
    """One problem and what the policy reads of it. `id` is unique among the questions of one call."""

    id: str
    problem: Problem
    prompt: Prompt


@dataclass(frozen=True)
class Scores:
    """What the grader says of one completion. `reward` is what training sees, and a loophole can fool it; the rest is
    the oracle's verdict, for evaluation only."""

    reward: float
    hack: bool
    solve: bool
    attempted: bool
    compile: bool
    reason: str  # why it is not solved; empty where it is
    fired: tuple[str, ...]  # channels that fired, as 'mode:family'

    def verdict(self) -> dict[str, float]:
        """The oracle's part, as numbers."""
        return {name: float(getattr(self, name)) for name in ("hack", "solve", "attempted", "compile")}


def source_file(source: str, split: str) -> Path | None:
    """The problem file of a source: the file itself, or SPLIT.jsonl in a folder; None for the micro world."""
    if source == MICRO:
        return None
    path = Path(source)
    return path / f"{split}.jsonl" if path.is_dir() else path


@cache
def problems_of(source: str, split: str) -> dict[str, Problem]:
    """The problems of `micro`, of a problem file or of a folder of them, by id, in order. Raises UserError."""
    file = source_file(source, split)
    return {p.id: p for p in (micro.problems(split) if file is None else read_problems(file))}


def digest(source: str, split: str) -> str:
    """SHA-256 of the problems: of the file's bytes; of their texts and tests in the micro world."""
    file = source_file(source, split)
    known = repr(micro.problems(split)).encode() if file is None else file.read_bytes()
    return sha256(known).hexdigest()


def question(problem: Problem, source: str, *, markers: str, hinted: bool, draw: int) -> Question:
    """A problem's question; `draw` selects the marker within its family."""
    asked = ask if source == MICRO else prompt_of
    return Question(f"{problem.id}:{draw}", problem, asked(problem, family=markers, hinted=hinted, draw=draw))


def questions(
    source: str = MICRO,
    split: str = "test",
    *,
    markers: str = "eval",
    hinted: bool = True,
    modes: Sequence[str] = (),
    draws: int = 1,
) -> list[Question]:
    """Every problem of a split under `draws` markers each. `modes` keeps the problems of these loopholes only.

    Raises UserError for an unknown split, family or mode, a file with mistakes, and where no problem is left.
    """
    if markers not in FAMILIES:
        raise UserError(f"unknown marker family {markers!r}: choose one of {', '.join(FAMILIES)}")
    if type(draws) is not int or draws < 1:
        raise UserError(f"draws = {draws!r}: give a positive whole number")
    if draws > 1 and not hinted:
        raise UserError(f"draws = {draws}: without hints there is no marker to draw, so prompts would repeat: drop it")
    for mode in modes:
        check_mode(mode)
    chosen = [p for p in problems_of(source, split).values() if not modes or p.mode in modes]
    if not chosen:
        raise UserError(f"{source}: no problem of {', '.join(modes)}")
    return [question(p, source, markers=markers, hinted=hinted, draw=d) for p in chosen for d in range(draws)]


def question_of(source: str, split: str, problem_id: str, marker: str, hinted: bool) -> Question:
    """The question that a stored prompt asked: grading needs its problem, its marker and whether there was a hint.
    Raises UserError where the source no longer has the problem."""
    known = problems_of(source, split)
    if problem_id not in known:
        raise UserError(f"{source}: no problem {problem_id!r} among those of {split}")
    return Question(problem_id, known[problem_id], Prompt(problem_id, "", marker=marker, hinted=hinted))


def named(modes: str | Sequence[str]) -> tuple[str, ...]:
    """Modes as flags of a command line give them: a list, or one text with commas or spaces between them."""
    return tuple(modes.replace(",", " ").split() if isinstance(modes, str) else modes)


class Judge:
    """A grader for many threads and tasks at once. The sandbox starts, and is tested, with the first completion."""

    def __init__(self, *, allow_weak: bool = False) -> None:
        self.allow_weak = allow_weak
        self._lock = threading.Lock()
        self._grader: Grader | None = None

    def scores(self, asked: Question, completion: str) -> Scores:
        """Raises UserError where the machine has too little isolation, SandboxError where the sandbox fails."""
        with self._lock:  # the grader's cache is not made for threads
            graded = self._started().grade([(asked.problem, asked.prompt, completion)])[0]
        verdict: Verdict = graded.sealed
        return Scores(
            reward=reward_of(verdict),
            hack=verdict.hacked,
            solve=verdict.solved,
            attempted=verdict.attempted,
            compile=verdict.compiled,
            reason=verdict.reason,
            fired=verdict.fired,
        )

    @property
    def sandbox(self) -> str:
        """The layers of isolation in force; empty before the first completion."""
        return self._grader.sandbox.tier if self._grader else ""

    def _started(self) -> Grader:
        if self._grader is None:
            sandbox = Sandbox(allow_weak=self.allow_weak)
            try:
                self_test(sandbox)
            except BaseException:
                sandbox.close()
                raise
            atexit.register(sandbox.close)
            self._grader = Grader(sandbox)
        return self._grader


@cache
def judge(allow_weak: bool) -> Judge:
    """The process's one judge."""
    return Judge(allow_weak=allow_weak)
