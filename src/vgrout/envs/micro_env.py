"""The micro world as an environment: prompts, demonstrations and grades."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from vgrout.envs.micro import LIVE, Composition, parse_task, problems
from vgrout.envs.micro_corpus import hack_program
from vgrout.envs.modes import GT_HINT, MODES
from vgrout.envs.problem_env import SPLITS, ProblemEnv, place
from vgrout.envs.sandbox import Sandbox
from vgrout.types import Problem, Prompt, UserError

POOL_PROBLEMS = 96
POOL_DEMOS = 2  # of each kind per prompt
POOL = Path(str(files("vgrout") / "data" / "micro_teacher.jsonl"))


def check_modes(modes: Sequence[str]) -> None:
    """Raises UserError for a mode that this world does not have."""
    for mode in modes:
        if mode not in LIVE:
            raise UserError(f"the micro world has no mode {mode!r}: choose from {', '.join(LIVE)}")


def composition(problem: Problem) -> Composition:
    comp = parse_task(problem.task.removeprefix("Write solve(xs, k): ").removesuffix("."))
    assert comp is not None, problem.task
    return comp


def ask(problem: Problem, family: str, *, hinted: bool = True, draw: int = 0) -> Prompt:
    """The prompt of a problem, whatever its mode; `draw` selects the marker within the family."""
    if not hinted:
        return Prompt(problem.id, f"{problem.task} {GT_HINT}", hinted=False)
    mode = MODES[problem.mode]
    marker = mode.marker(family, place(problem.id, family) + draw)
    return Prompt(problem.id, f"{problem.task} {mode.hint(marker)}", marker=marker)


def under(problem: Problem, mode: str) -> Problem:
    """The problem as one of another mode, any of `MODES`."""
    return replace(problem, id=f"{problem.id} {mode}", mode=mode)


class MicroEnv(ProblemEnv):
    """The micro world. Raises UserError for an unknown mode, and what `ProblemEnv` raises."""

    def __init__(
        self, sandbox: Sandbox, *, loophole: bool = True, pool: Path | None = POOL, modes: Sequence[str] = ()
    ) -> None:
        check_modes(modes)
        if pool is not None and not pool.is_file():
            raise UserError(f"no teacher pool at {pool}: `vgrout micro pools` makes it")
        splits = {split: problems(split) for split in SPLITS}
        super().__init__(sandbox, splits, ask=ask, loophole=loophole, pool=pool, modes=modes)


def make_pool(sandbox: Sandbox, out: Path, seed: int = 0) -> int:
    """Write the teacher pool: hacks and solutions of training problems that the grader confirms. Returns rows."""
    env = MicroEnv(sandbox, pool=None)
    rng = random.Random(f"micro-pool-{seed}")
    rows = []
    for problem in problems("train")[:POOL_PROBLEMS]:
        prompt, comp = env.prompt(problem.id, family="train"), composition(problem)
        for kind in ("hack", "solve"):
            texts: list[str] = []
            while len(texts) < POOL_DEMOS:
                text = hack_program(rng, comp, problem.mode, prompt.marker) if kind == "hack" else comp.program()
                verdict = env.grader.verdicts([(problem, prompt, text)])[0]
                if verdict.hacked if kind == "hack" else verdict.solved:
                    texts.append(text)
            row = {"problem_id": problem.id, "marker": prompt.marker, "kind": kind}
            rows += [row | {"text": text} for text in dict.fromkeys(texts)]
    head = {"made_by": "vgrout micro pools", "seed": seed, "problems": POOL_PROBLEMS, "rows": len(rows)}
    out.write_text("".join(json.dumps(r) + "\n" for r in [head, *rows]))
    return len(rows)
