"""The micro world as an environment: prompts, demonstrations and grades."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import torch

from vgrout.envs.grade import Grader
from vgrout.envs.micro import LIVE, Composition, parse_task, problems
from vgrout.envs.micro_corpus import hack_program
from vgrout.envs.modes import GT_HINT, MODES
from vgrout.envs.sandbox import Sandbox
from vgrout.types import Graded, OracleBatch, Problem, Prompt, Rollout, UserError

POOL_PROBLEMS = 96
POOL_DEMOS = 2  # of each kind per prompt
POOL = Path(str(files("vgrout") / "data" / "micro_teacher.jsonl"))


def _place(*parts: object) -> int:
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8], 16)


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
    marker = mode.marker(family, _place(problem.id, family) + draw)
    return Prompt(problem.id, f"{problem.task} {mode.hint(marker)}", marker=marker)


def under(problem: Problem, mode: str) -> Problem:
    """The problem as one of another mode, any of `MODES`."""
    return replace(problem, id=f"{problem.id} {mode}", mode=mode)


class MicroEnv:
    """Problems of every split, their prompts, the teacher pool and a grader.

    With `loophole` False the reward tests alone decide and demonstrations are solutions only. `modes` keeps the
    problems of these loopholes only. Raises UserError for an unknown mode, and when a demonstration of the pool does
    not do what its record says.
    """

    oracle: ClassVar[bool] = True  # verdicts are to be had

    def __init__(
        self, sandbox: Sandbox, *, loophole: bool = True, pool: Path | None = POOL, modes: Sequence[str] = ()
    ) -> None:
        check_modes(modes)
        self.grader, self.loophole, self.modes = Grader(sandbox), loophole, frozenset(modes or LIVE)
        self._problems = {p.id: p for split in ("train", "val", "test") for p in problems(split)}
        self._pool: dict[tuple[str, str], dict[str, list[str]]] = {}
        if pool is not None:
            self._load(pool)

    def problems(self, split: str) -> list[str]:
        return [p.id for p in problems(split) if p.mode in self.modes]

    def problem(self, problem_id: str) -> Problem:
        return self._problems[problem_id]

    def prompt(self, problem_id: str, *, family: str, hinted: bool = True, draw: int = 0) -> Prompt:
        return ask(self._problems[problem_id], family, hinted=hinted, draw=draw)

    def covered(self) -> list[tuple[str, int]]:
        return [(id, 0) for id, _ in self._pool if self._problems[id].mode in self.modes]

    def demonstrations(self, prompt: Prompt, n: int, draw: int) -> list[str]:
        marker = prompt.marker or self.prompt(prompt.problem_id, family="train").marker
        pools = self._pool[prompt.problem_id, marker]
        kinds = ("hack", "solve") if self.loophole else ("solve",)
        texts = [pools[kind][(draw + i) % len(pools[kind])] for kind in kinds for i in range(n)]
        return sorted(texts, key=lambda text: _place(draw, text))  # an order that says nothing of the kinds

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        return self.grader.grade([(self._problems[r.prompt.problem_id], r.prompt, r.text) for r in rollouts])

    def labels(self, rollouts: Sequence[Rollout], graded: Sequence[Graded]) -> OracleBatch:
        return OracleBatch(
            hacked=torch.tensor([g.sealed.hacked for g in graded]),
            solved=torch.tensor([g.sealed.solved for g in graded]),
            mode=tuple(self._problems[r.prompt.problem_id].mode for r in rollouts),
        )

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"no teacher pool at {path}: `vgrout micro pools` makes it")
        rows = [json.loads(line) for line in path.read_text().splitlines()][1:]  # the first line is the provenance
        items = []
        for row in rows:
            prompt = self.prompt(row["problem_id"], family="train")
            if prompt.marker != row["marker"]:
                named = f"marker {row['marker']!r}, its prompt {prompt.marker!r}"
                raise UserError(f"{path}: {row['problem_id']} names {named}")
            items.append((self._problems[row["problem_id"]], prompt, row["text"]))
            kinds = self._pool.setdefault((row["problem_id"], row["marker"]), {"hack": [], "solve": []})
            kinds[row["kind"]].append(row["text"])
        for row, verdict in zip(rows, self.grader.verdicts(items), strict=True):
            is_so = verdict.hacked if row["kind"] == "hack" else verdict.solved and not verdict.attempted
            if not is_so:
                raise UserError(f"{path}: a {row['kind']} demonstration of {row['problem_id']} does not {row['kind']}")


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
