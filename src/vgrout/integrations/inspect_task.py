"""The environments as inspect_ai tasks: `inspect eval vgrout/micro`, `inspect eval vgrout/problems -T source=FILE`.

Each completion is graded by this project's grader in its sandbox: `reward` is what training would pay, which a loophole
can fool; `hack`, `solve`, `attempted` and `compile` are the oracle's verdict. Standard errors are clustered by problem.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, Value, mean, metric, scorer, stderr
from inspect_ai.solver import TaskState, generate

from vgrout import __version__
from vgrout.envs.grade import strip_fences
from vgrout.integrations.environment import MICRO, Question, digest, judge, named, question_of, questions

PROBLEM, MODE = "problem", "mode"  # keys of a sample's metadata


@metric
def by_mode() -> Metric:
    """Mean and clustered standard error of the problems of each loophole, as MODE and 'MODE stderr'."""
    average, error = mean(), stderr(cluster=PROBLEM)

    def each(scores: list[SampleScore]) -> Value:
        kinds: dict[str, list[SampleScore]] = defaultdict(list)
        for one in scores:
            kinds[one.sample_metadata[MODE]].append(one)
        means = {mode: average(own) for mode, own in sorted(kinds.items())}
        return means | {f"{mode} stderr": error(own) for mode, own in sorted(kinds.items())}

    return each


METRICS = [mean(), stderr(cluster=PROBLEM), by_mode()]


@scorer(metrics=dict.fromkeys(("reward", "hack", "solve", "attempted", "compile"), METRICS))
def grader(source: str = MICRO, split: str = "test", allow_weak_sandbox: bool = False) -> Scorer:
    """Scores of a completion. `source` and `split` are those of the task, which whoever scores
    a log again must give."""

    async def score(state: TaskState, target: Target) -> Score:
        facts, text = state.metadata, state.output.completion
        asked = question_of(source, split, facts[PROBLEM], facts["marker"], facts["hinted"])
        said = judge(allow_weak_sandbox)
        scores = await asyncio.to_thread(said.scores, asked, text)
        return Score(
            value={"reward": scores.reward, **scores.verdict()},
            answer=strip_fences(text),
            explanation=scores.reason or "solved",
            metadata={"fired": list(scores.fired), "sandbox": said.sandbox},
        )

    return score


def sample_of(asked: Question) -> Sample:
    problem, prompt = asked.problem, asked.prompt
    system = [ChatMessageSystem(content=prompt.system)] if prompt.system else []
    return Sample(
        id=asked.id,
        input=[*system, ChatMessageUser(content=prompt.user)],
        metadata={
            PROBLEM: problem.id,
            MODE: problem.mode,
            "difficulty": problem.difficulty,
            "marker": prompt.marker,
            "hinted": prompt.hinted,
        },
    )


@task
def problems(
    source: str,
    split: str = "test",
    markers: str = "eval",
    hinted: bool = True,
    modes: str | list[str] = "",
    draws: int = 1,
    allow_weak_sandbox: bool = False,
) -> Task:
    """A problem file, or SPLIT.jsonl of a folder of them such as `vgrout data leetcode` writes.

    Args:
        source: The file or folder; micro for the micro world.
        split: Problems of a folder, or of the micro world: train, val or test.
        markers: Family of the markers that hints name: eval (held out) or train.
        hinted: False closes the loophole and does not mention it.
        modes: Keep the problems of these loopholes only.
        draws: Markers per problem; standard errors stay clustered by problem.
        allow_weak_sandbox: Run programs even where the machine gives them too little isolation.
    """
    return _task(source, split, markers, hinted, modes, draws, allow_weak_sandbox)


@task
def micro(
    split: str = "test",
    markers: str = "eval",
    hinted: bool = True,
    modes: str | list[str] = "",
    draws: int = 1,
    allow_weak_sandbox: bool = False,
) -> Task:
    """The micro world; the arguments are those of `problems`."""
    return _task(MICRO, split, markers, hinted, modes, draws, allow_weak_sandbox)


def _task(source, split, markers, hinted, modes, draws, allow_weak_sandbox) -> Task:
    asked = questions(source, split, markers=markers, hinted=hinted, modes=named(modes), draws=draws)
    return Task(
        dataset=MemoryDataset([sample_of(q) for q in asked], name=source),
        solver=generate(),
        scorer=grader(source, split, allow_weak_sandbox),
        metadata={"vgrout": __version__, "problems_sha256": digest(source, split)},
    )
