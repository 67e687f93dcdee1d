"""A task from one Python file of the user's: prompts and a reward, no oracle, no loopholes, no demonstrations.

    PROMPTS = ["Write a haiku about rain.", ...]        # or {"train": [..], "val": [..], "test": [..]}

    def reward(prompt: str, completion: str) -> float | None:
        return ...        # None: this completion could not be scored

A list serves all three splits; only a dict holds prompts out. The file is the user's own code: it runs in this
process, unconfined. A reward that runs what the policy wrote should do so in `envs.sandbox`.
"""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from vgrout.types import Graded, OracleBatch, Prompt, Rollout, RunFailed, UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class NoVerdict:
    """The sealed verdict where there is no oracle: it holds nothing."""


class TaskEnv:
    """Prompts of every split and the user's reward, which reads a prompt as the file gives it, without an arm's edits.

    `prompts` maps each split to its prompts, at least one; ids are 'train-000' and so on, and equal lists share them.
    """

    oracle: ClassVar[bool] = False

    def __init__(self, prompts: Mapping[str, Sequence[str]], reward: Callable[[str, str], Any], name: str = "task"):
        self.reward, self.name = reward, name
        self._texts: dict[str, str] = {}
        self._ids: dict[str, list[str]] = {}
        for split in SPLITS:
            home = next(other for other in SPLITS if prompts[other] == prompts[split])
            self._ids[split] = [f"{home}-{i:03d}" for i in range(len(prompts[split]))]
            self._texts |= zip(self._ids[split], prompts[split], strict=True)

    def problems(self, split: str) -> list[str]:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        return self._ids[split]

    def covered(self) -> list[tuple[str, int]]:
        return []

    def prompt(self, problem_id: str, *, family: str = "train", hinted: bool = True, draw: int = 0) -> Prompt:
        """The one prompt that there is: nothing is hinted at, and nothing can be closed."""
        return Prompt(problem_id, self._texts[problem_id])

    def demonstrations(self, prompt: Prompt, n: int, draw: int) -> list[str]:
        raise UserError(f"{self.name} has no demonstrations: set teacher_n = 0")

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """A reward of None or NaN stays out of training and of every mean: the completion could not be scored.

        Raises RunFailed where the reward raises or is anything else than a finite number: a fault is never a score.
        """
        return [Graded(self._reward(r), NoVerdict()) for r in rollouts]

    def labels(self, rollouts: Sequence[Rollout], graded: Sequence[Graded]) -> OracleBatch:
        raise UserError("this task has no oracle")

    def _reward(self, rollout: Rollout) -> float | None:
        text = self._texts[rollout.prompt.problem_id]
        where = f"{self.name}: reward of prompt {rollout.prompt.problem_id} ({_short(text)!r})"
        try:
            value = self.reward(text, rollout.text)
        except Exception as error:
            raise RunFailed(f"{where} raised {_said(error)}") from error
        if value is None or isinstance(value, Real) and math.isnan(value):
            return None
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RunFailed(f"{where} is {_short(repr(value))}: it must be a finite number, or None")
        return float(value)


def load_task(path: Path) -> TaskEnv:
    """The task of a file. Raises UserError where the file does not run, or lacks prompts or a reward."""
    module = _run(path)
    if not callable(reward := getattr(module, "reward", None)):
        raise UserError(f"{path}: no function reward(prompt, completion)")
    prompts = getattr(module, "PROMPTS", None)
    if isinstance(prompts, Mapping):
        if set(prompts) != set(SPLITS):
            raise UserError(f"{path}: PROMPTS must have the keys {', '.join(SPLITS)}")
    else:
        prompts = dict.fromkeys(SPLITS, prompts)
    for split, texts in prompts.items():
        if not isinstance(texts, list | tuple) or not texts or not all(type(t) is str and t.strip() for t in texts):
            raise UserError(f"{path}: PROMPTS must be a list of texts, or a dict of lists, none empty (see {split})")
    return TaskEnv({split: list(texts) for split, texts in prompts.items()}, reward, path.name)


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"no task at {path}")
    spec = importlib.util.spec_from_file_location("vgrout_task", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not run: {_said(error)}") from error
    return module


def _said(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_short(str(error))} ({Path(last.filename).name}:{last.lineno})"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
