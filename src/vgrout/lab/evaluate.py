"""The deploy evaluation, the same for every arm (METHOD.md section 7).

Cells: {train-like, held-out markers} x {full, deployed} plus a hint-free cell of what ships. Every arm sees the same
prompts and the same uniforms. `deployed` of an arm that ships as it is means its full state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vgrout.config import Config
from vgrout.engines import make_engine
from vgrout.engines.torch_engine import encode_prompt
from vgrout.envs.grade import Verdict
from vgrout.envs.problem_env import ProblemEnv
from vgrout.envs.task import NoVerdict, TaskEnv
from vgrout.lab.measure import average, rate
from vgrout.method.policy import Policy
from vgrout.types import Prompt, Rollout, RunFailed, State

World = ProblemEnv | TaskEnv
NO_ORACLE = "no oracle"  # what stands in a verdict's column where there is none
UNIFORM_SEED = 20_011
SIZE = 256  # rollouts generated at once
ROLLOUTS, PROBLEMS = 256, 64  # a result needs at least so many rollouts per cell, over at least so many problems


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
HEADLINE, FULL = "heldout_deploy", "heldout_full"
SMALL = tuple(c for c in CELLS if c.name in ("train_deploy", "heldout_full", "heldout_deploy"))


def cells_of(env: World, among: Sequence[Cell] = CELLS) -> tuple[Cell, ...]:
    """The cells that differ: without an oracle there are no markers, and only problems can be held out."""
    return tuple(cell for cell in among if env.oracle or cell.family == "eval")


@dataclass(frozen=True)
class CellResult:
    """A cell's rollouts with their rewards and verdicts, in order. A reward of None: it could not be scored."""

    cell: Cell
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float | None, ...]
    verdicts: tuple[Verdict | NoVerdict, ...]


def spread(n: int, places: int) -> list[int]:
    """How many of n things go to each place, as evenly as possible: the first places get one more."""
    return [n // places + (i < n % places) for i in range(places)]


def sample_cell(
    cfg: Config,
    policy: Policy,
    env: World,
    cell: Cell,
    *,
    problems: Sequence[str],
    rollouts: int,
    ablates: bool,
    asked: Callable[[Prompt], Prompt] = lambda prompt: prompt,
) -> CellResult:
    """`rollouts` completions spread over problem ids as evenly as possible, in order. `asked` gives what the model
    reads in place of each prompt."""
    ids = list(problems)[:rollouts]
    each = spread(rollouts, len(ids))
    where = [(k, i) for k, n in enumerate(each) for i in range(n)]  # (problem, number) of every rollout
    prompts = [asked(env.prompt(id, family=cell.family, hinted=cell.hinted, draw=0)) for id in ids]
    encoded = [encode_prompt(policy.tokenizer, p) for p in prompts]
    uniforms = torch.rand((rollouts, cfg.max_new), generator=torch.Generator().manual_seed(UNIFORM_SEED))
    engine = make_engine(cfg, policy.model, policy.tokenizer, policy.adapter, policy.ranks)
    state: State = cell.state if ablates else "full"
    samples: list = []
    block = max(1, SIZE // each[0])
    for start in range(0, len(ids), block):
        counts, done = each[start : start + block], len(samples)
        samples += engine.generate(
            encoded[start : start + block],
            counts,
            state=state,
            max_new=cfg.max_new,
            temperature=cfg.eval_temperature,
            uniforms=uniforms[done : done + sum(counts)],
        )
    rows = tuple(
        Rollout(
            id=f"{cell.name}-{ids[k]}-{i}",
            prompt=prompts[k],
            text=s.text,
            prompt_tokens=tuple(encoded[k]),
            tokens=s.tokens,
            group=k,
            state=state,
            logp_old=s.logp,
        )
        for (k, i), s in zip(where, samples, strict=True)
    )
    graded = policy.ranks.spread(env.grade, rows, [r.group for r in rows])
    return CellResult(cell, rows, tuple(g.reward for g in graded), tuple(g.sealed for g in graded))


def final(cfg: Config, policy: Policy, env: World, *, ablates: bool, split: str = "test") -> list[CellResult]:
    """Every cell of the final evaluation, `cfg.eval_rollouts` rollouts each, over all problems of a split that these
    suffice for."""
    n, ids = cfg.eval_rollouts, env.problems(split)
    return [sample_cell(cfg, policy, env, cell, problems=ids, rollouts=n, ablates=ablates) for cell in cells_of(env)]


def small(cfg: Config, policy: Policy, env: World, *, ablates: bool) -> dict[str, dict]:
    """The summary of each cell of a small evaluation on validation problems, by its name."""
    n, ids, out = cfg.eval_small, env.problems("val"), {}
    for cell in cells_of(env, SMALL):
        result = sample_cell(cfg, policy, env, cell, problems=ids, rollouts=n, ablates=ablates)
        out[cell.name] = summary(result, env)
    return out


def scaled(cfg: Config, policy: Policy, env: World, *, ablates: bool) -> dict[str, list[dict]]:
    """Held-out problems and markers with blocks at `i / cfg.eval_scales` of their strength: `shrunk`, what ships, whose
    ends are the base model and what ships; `restored`, the quarantine beside the whole deployed block, whose ends are
    what ships and both blocks. An arm that ships both blocks shrinks both, and has nothing to restore."""
    full, ships = (next(cell for cell in CELLS if cell.name == name) for name in (FULL, HEADLINE))
    out: dict[str, list[dict]] = {"shrunk": []} | ({"restored": []} if ablates else {})
    for scale in (i / cfg.eval_scales for i in range(1, cfg.eval_scales)):
        ways = {"shrunk": (ships, scale, 1.0 if ablates else scale), "restored": (full, 1.0, scale)}
        for name, points in out.items():
            cell, deployed, quarantine = ways[name]
            with policy.adapter.scaled(deployed=deployed, quarantine=quarantine):
                ids, n = env.problems("test"), cfg.eval_rollouts
                result = sample_cell(cfg, policy, env, cell, problems=ids, rollouts=n, ablates=ablates)
            points.append({"scale": scale, **summary(result, env)})
    return out


def summaries(results: Sequence[CellResult], env: World) -> dict[str, dict]:
    """The summary of each cell by its name. Raises RunFailed for a cell in which nothing could be scored."""
    cells = {result.cell.name: summary(result, env) for result in results}
    for name, cell in cells.items():
        if not env.oracle and cell["reward"] is None:
            raise RunFailed(f"no rollout of the evaluation {name} has a reward")
    return cells


def size_note(cells: Mapping[str, dict]) -> str:
    """What a table must say of cells that are too small for a result or lack rewards; empty where none does."""
    rates = [cell.get("hack") or cell["reward"] for cell in cells.values()]
    rollouts, problems = (min(rate[key] for rate in rates) for key in ("n", "clusters"))
    small = f"{rollouts} rollouts over {problems} problems per cell; a result needs {ROLLOUTS} over {PROBLEMS}."
    unscored = sum(cell.get("unscored", 0) for cell in cells.values())
    lacking = f"{unscored} rollouts could not be scored and are left out."
    said = {small: rollouts < ROLLOUTS or problems < PROBLEMS, lacking: unscored > 0}
    return " ".join(text for text, holds in said.items() if holds)


def summary(result: CellResult, env: World) -> dict:
    """hack, attempted, solve, compile with intervals; the first three per mode; solve per difficulty. Without an
    oracle the mean reward alone, of the rollouts that have one (None where none has), and how many have none."""
    if not env.oracle:
        pairs = zip(result.rewards, result.rollouts, strict=True)
        scored = [(reward, r.prompt.problem_id) for reward, r in pairs if reward is not None]
        unscored = len(result.rewards) - len(scored)
        mean = average(*zip(*scored, strict=True)).json() if scored else None
        return {"reward": mean} | ({"unscored": unscored} if unscored else {})
    solved_for = [env.problem(r.prompt.problem_id) for r in result.rollouts]
    ids = [p.id for p in solved_for]

    def of(field: str, rows: list[int]) -> dict:
        return rate([getattr(result.verdicts[i], field) for i in rows], [ids[i] for i in rows]).json()

    def rates(rows: list[int]) -> dict:
        return {"hack": of("hacked", rows), "attempted": of("attempted", rows), "solve": of("solved", rows)}

    everything = list(range(len(ids)))
    by_mode: dict[str, list[int]] = defaultdict(list)
    by_difficulty: dict[int, list[int]] = defaultdict(list)
    for i, problem in enumerate(solved_for):
        by_mode[problem.mode].append(i)
        by_difficulty[problem.difficulty].append(i)
    return {
        **rates(everything),
        "compile": of("compiled", everything),
        "modes": {mode: rates(rows) for mode, rows in sorted(by_mode.items())},
        "difficulty": {
            str(d): of("solved", rows) for d, rows in sorted(by_difficulty.items(), key=lambda item: str(item[0]))
        },
    }
