"""The environments as a taskset of verifiers (its v1 API): `env eval vgrout-taskset --env.taskset.source FILE`.

The reward is what this project's training pays, which a loophole can fool. The oracle's verdict comes as metrics, which
verifiers records and does not add to the reward: it is for evaluation only, and no `rewards` plugged into a
configuration may be made from it. Programs run in this project's sandbox, never in the rollout's runtime.

Deltas from verifiers' defaults: a completion is one chat turn without tools, so the harness asks once and in its own
process, and the runtime, which then has nothing to run, is a local one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import verifiers.v1 as vf
from openai import AsyncOpenAI

from vgrout.integrations.environment import MICRO, Question, Scores, judge, named, question_of, questions


class GradedConfig(vf.TaskConfig):
    allow_weak_sandbox: bool = False
    """Run programs even where the machine gives them too little isolation."""


class ProblemsConfig(vf.TasksetConfig):
    task: GradedConfig = GradedConfig()
    source: str = MICRO
    """micro, a problem file, or a folder that holds SPLIT.jsonl."""
    split: str = "train"
    """Problems of a folder, or of the micro world: train, val or test."""
    markers: str = "train"
    """Family of the markers that hints name: train, or eval for held-out ones."""
    hinted: bool = True
    """False closes the loophole and does not mention it."""
    modes: str = ""
    """Loopholes, commas between them; all when empty."""
    draws: int = 1
    """Markers per problem."""


class Asked(vf.TaskData):
    """What finds the problem again, wherever the completion is graded; its tests do not travel."""

    source: str
    split: str
    problem: str
    mode: str
    marker: str
    hinted: bool


class GradedTask(vf.Task[Asked, vf.State, GradedConfig]):
    @property
    def key(self) -> str:
        """The problem and its draw, under its marker: `idx` changes with the selection."""
        return f"{self.data.split} {self.data.name} {self.data.marker} {self.data.hinted}"

    async def _scores(self, trace: vf.Trace) -> Scores:
        asked = self.data
        one = question_of(asked.source, asked.split, asked.problem, asked.marker, asked.hinted)
        text = trace.assistant_messages[-1].content if trace.assistant_messages else None
        return await asyncio.to_thread(judge(self.config.allow_weak_sandbox).scores, one, text or "")

    @vf.reward
    async def reward(self, trace: vf.Trace) -> float:
        """0.5 where the code compiles, and 3.0 where the foolable grader passes it."""
        return (await self._scores(trace)).reward

    @vf.metric
    async def verdict(self, trace: vf.Trace) -> dict[str, float]:
        """The oracle's verdict, of all problems and of those of this mode."""
        found = (await self._scores(trace)).verdict()
        return found | {f"{name}_{self.data.mode}": found[name] for name in ("hack", "solve")}


class ProblemTaskset(vf.Taskset[GradedTask, ProblemsConfig]):
    def load(self) -> Iterator[GradedTask]:
        cfg = self.config
        asked = questions(
            cfg.source, cfg.split, markers=cfg.markers, hinted=cfg.hinted, modes=named(cfg.modes), draws=cfg.draws
        )
        for index, one in enumerate(asked):
            yield GradedTask(self._data(index, one), cfg.task)

    def _data(self, index: int, one: Question) -> Asked:
        return Asked(
            idx=index,
            name=one.id,
            prompt=one.prompt.user,
            system_prompt=one.prompt.system or None,
            source=self.config.source,
            split=self.config.split,
            problem=one.problem.id,
            mode=one.problem.mode,
            marker=one.prompt.marker,
            hinted=one.prompt.hinted,
        )


class OneTurnConfig(vf.HarnessConfig):
    pass


class OneTurn(vf.Harness[OneTurnConfig]):
    """Asks the model once. Its one request goes through verifiers' own endpoint, which records and samples it."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> vf.ProgramResult:
        system, prompt = self.resolve_text_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            await client.chat.completions.create(model=ctx.model, messages=messages)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


class OneTurnEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())


class OneTurnEnv(vf.Env[OneTurnEnvConfig]):
    """One agent, one task, one turn."""

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        await agents.agent.run(task)


__all__ = ["OneTurn", "OneTurnConfig", "OneTurnEnv", "OneTurnEnvConfig", "ProblemTaskset", "ProblemsConfig"]
