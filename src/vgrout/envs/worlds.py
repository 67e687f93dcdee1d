"""Environments of problems by name. Adding one: a function that gives its problems, and an entry of WORLDS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vgrout.envs import micro
from vgrout.envs.micro_env import POOL, ask
from vgrout.envs.problem_env import SPLITS, ProblemEnv
from vgrout.envs.problems import prompt_of
from vgrout.envs.sandbox import Sandbox
from vgrout.types import Problem, Prompt


@dataclass(frozen=True)
class World:
    """Problems of a split; the prompt of one, as `problems.prompt_of`; a file of demonstrations, if there is one."""

    problems: Callable[[str], Sequence[Problem]]
    ask: Callable[..., Prompt] = prompt_of
    pool: Path | None = None

    def env(self, sandbox: Sandbox, *, loophole: bool, modes: Sequence[str]) -> ProblemEnv:
        """Raises what `ProblemEnv` raises."""
        splits = {split: self.problems(split) for split in SPLITS}
        return ProblemEnv(sandbox, splits, ask=self.ask, pool=self.pool, loophole=loophole, modes=modes)


WORLDS: dict[str, World] = {
    "micro": World(micro.problems, ask, POOL),  # short programs, for the bundled model
}
