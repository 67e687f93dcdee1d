"""The deploy evaluation, the same for every arm (METHOD.md section 7).

Cells: {train-like, held-out markers} x {full, deployed} plus a hint-free cell of what ships. Every arm sees the same
prompts and the same uniforms. `deployed` of an arm that ships as it is means its full state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vgrout.config import Config
from vgrout.engines.torch_engine import TorchEngine, encode_prompt
from vgrout.envs.grade import Verdict
from vgrout.envs.micro_env import MicroEnv
from vgrout.lab.measure import rate
from vgrout.method.policy import Policy
from vgrout.types import Rollout, State

UNIFORM_SEED = 20_011
SIZE = 256  # rollouts generated at once


@dataclass(frozen=True)
class Cell:
    """One evaluation condition."""

    name: str
    family: str
    state: State
    hinted: bool = True


CELLS = (
    Cell("train_full", "train", "full"),
    Cell("train_deploy", "train", "deployed"),
    Cell("heldout_full", "eval", "full"),
    Cell("heldout_deploy", "eval", "deployed"),
    Cell("hintfree_deploy", "train", "deployed", hinted=False),
)
HEADLINE = "heldout_deploy"
SMALL = tuple(c for c in CELLS if c.name in ("train_deploy", "heldout_full", "heldout_deploy"))


@dataclass(frozen=True)
class CellResult:
    """A cell's rollouts with their verdicts, in order."""

    cell: Cell
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]


def sample_cell(
    cfg: Config,
    policy: Policy,
    env: MicroEnv,
    cell: Cell,
    *,
    problems: Sequence[str],
    rollouts: int,
    ablates: bool,
    system: str = "",
) -> CellResult:
    """`rollouts` completions spread evenly over problem ids (at least one each, in order), under a system text."""
    ids = list(problems)[:rollouts]
    each = max(1, rollouts // len(ids))
    plain = [env.prompt(id, family=cell.family, hinted=cell.hinted, draw=0) for id in ids]
    prompts = [replace(prompt, system=system) for prompt in plain]
    encoded = [encode_prompt(policy.tokenizer, p) for p in prompts]
    uniforms = torch.rand((len(ids) * each, cfg.max_new), generator=torch.Generator().manual_seed(UNIFORM_SEED))
    engine = TorchEngine(policy.model, policy.tokenizer, policy.adapter)
    state: State = cell.state if ablates else "full"
    samples = []
    block = max(1, SIZE // each)
    for start in range(0, len(ids), block):
        part = encoded[start : start + block]
        samples += engine.generate(
            part,
            [each] * len(part),
            state=state,
            max_new=cfg.max_new,
            temperature=cfg.eval_temperature,
            uniforms=uniforms[start * each : (start + len(part)) * each],
        )
    rows = tuple(
        Rollout(
            id=f"{cell.name}-{ids[i // each]}-{i % each}",
            prompt=prompts[i // each],
            text=s.text,
            prompt_tokens=tuple(encoded[i // each]),
            tokens=s.tokens,
            group=i // each,
            state=state,
            logp_old=s.logp,
        )
        for i, s in enumerate(samples)
    )
    return CellResult(cell, rows, tuple(g.sealed for g in env.grade(rows)))


def summary(result: CellResult, env: MicroEnv) -> dict:
    """hack, attempted, solve, compile with intervals; hack and solve per mode; solve per difficulty."""
    solved_for = [env.problem(r.prompt.problem_id) for r in result.rollouts]
    ids = [p.id for p in solved_for]

    def of(field: str, rows: list[int]) -> dict:
        return rate([getattr(result.verdicts[i], field) for i in rows], [ids[i] for i in rows]).json()

    everything = list(range(len(ids)))
    by_mode: dict[str, list[int]] = defaultdict(list)
    by_difficulty: dict[int, list[int]] = defaultdict(list)
    for i, problem in enumerate(solved_for):
        by_mode[problem.mode].append(i)
        by_difficulty[problem.difficulty].append(i)
    return {
        "hack": of("hacked", everything),
        "attempted": of("attempted", everything),
        "solve": of("solved", everything),
        "compile": of("compiled", everything),
        "modes": {m: {"hack": of("hacked", rows), "solve": of("solved", rows)} for m, rows in sorted(by_mode.items())},
        "difficulty": {str(d): of("solved", rows) for d, rows in sorted(by_difficulty.items())},
    }
