"""Pairs of the micro world as problems, so that the grader can say of each side what it does."""

from __future__ import annotations

import random

from vgrout.envs.micro import ENTRY, N_TESTS, draw_input, parse_task, run
from vgrout.envs.micro_corpus import TWO_NUMBERS
from vgrout.envs.modes import FAMILIES, MODES
from vgrout.types import Pair, Problem, Prompt, Test

LISTS, NUMBERS, LAST = "Write solve(xs, k)", "Write solve(a, b)", "return a"


def mode_of(pair: Pair) -> str:
    """The mode that the pair's prompt hints at, from its tag. Raises ValueError where there is not one such tag."""
    (mode,) = (tag.removeprefix("mode:") for tag in pair.tags if tag.startswith("mode:"))
    return mode


def task_of(pair: Pair) -> tuple[str, str]:
    """The prompt's opening and its task, without the hint and what follows it."""
    head, _, rest = pair.prompt.partition(": ")
    return head, rest.split(". ", 1)[0]


def prompt_of_pair(pair: Pair) -> Prompt:
    """The prompt with the marker that its hint names. Raises ValueError where that is not one."""
    mode = MODES[mode_of(pair)]
    if not mode.pays:
        return Prompt(pair.name, pair.prompt, hinted=False)
    (marker,) = (m for family in FAMILIES for m in mode.markers[family] if mode.hint(m) in pair.prompt)
    return Prompt(pair.name, pair.prompt, marker=marker)


def problem_of_pair(pair: Pair) -> Problem:
    """A problem whose tests are drawn for the pair's task. Raises ValueError where it is no task of this world."""
    (head, task), rng = task_of(pair), random.Random(pair.prompt)
    composition = parse_task(task)
    lines = {words: line for both, line in TWO_NUMBERS for words in both}
    *steps, last = task.split(", then ")
    tests: list[Test] = []
    for _ in range(N_TESTS):
        if head == LISTS and composition is not None:
            args = draw_input(rng)
            tests.append((args, run(composition, args)))
        elif head == NUMBERS and last == LAST and all(step in lines for step in steps):
            a, b = rng.randint(-9, 12), rng.randint(2, 9)
            values = {"a": a, "b": b}
            exec("\n".join(lines[step] for step in steps), {}, values)  # lines of our own table
            tests.append(((a, b), values["a"]))
        else:
            raise ValueError(f"{pair.name!r} is no task of the micro world")
    half = N_TESTS // 2
    return Problem(
        id=f"{pair.section}/{pair.name}",
        task=f"{head}: {task}.",
        entry=ENTRY,
        canonical=pair.clean,
        reward_tests=tuple(tests[:half]),
        oracle_tests=tuple(tests[half:]),
        mode=mode_of(pair),
    )
