"""What a score pass with bfloat16 products changes: python bench/score.py [--steps N] [--policy NAME] [--state STATE].

Trains routeV on micro with the model's own numbers. In each step the same rollouts are scored once more with
`score_dtype = bfloat16`, from the direction on: log-probabilities, scores, zone labels and CPU-seconds side by side.
Needs nothing but the package; labels of the oracle are not read.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine, peak
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from vgrout import loop
from vgrout.arms.monitors import GradientScore
from vgrout.config import Config, preset
from vgrout.envs.micro_env import MicroEnv
from vgrout.envs.sandbox import Sandbox
from vgrout.lab.run import make_policy
from vgrout.method.gate import POLICIES
from vgrout.method.policy import Policy, Rows
from vgrout.pairs import load as load_pairs
from vgrout.types import Batch, Decision


class Twice(GradientScore):
    """The gradient score of an arm, with a second one beside it that multiplies in bfloat16 and decides nothing."""

    def __init__(self, bench) -> None:
        super().__init__(bench)
        low = copy.copy(bench.policy)
        low.score_dtype = torch.bfloat16
        self.low = GradientScore(replace(bench, policy=low))
        self.found: dict[str, list[float]] = defaultdict(list)

    def read(self, step: int, batch: Batch, oracle) -> Decision:
        begun = time.process_time()
        decision = super().read(step, batch, oracle)
        between = time.process_time()
        second = self.low.read(step, batch, oracle)
        ended = time.process_time()
        equal = (decision.m == second.m) & (decision.d == second.d)
        self.found["rollouts"].append(batch.n)
        self.found["equal"].append(int(equal.sum()))
        self.found["score"] += ((decision.score - second.score).abs() / decision.score.std()).tolist()
        self.found["overlap"].append(self.direction.overlap(self.low.direction))
        self.found["cpu model"].append(between - begun)
        self.found["cpu bfloat16"].append(ended - between)
        state, rows = self.cfg.score_state, Rows(batch.tokens, batch.completion, batch.length)
        one, other = (logp(policy, rows, state) for policy in (self.bench.policy, self.low.bench.policy))
        self.found["logp"] += (one - other).abs().tolist()
        return decision


@torch.no_grad()
def logp(policy: Policy, rows: Rows, state) -> Tensor:
    """Log-probability in nats of each completion token, row by row."""
    with policy.adapter.merged(state, policy.score_dtype):
        return policy.logp(rows)[rows.completion]


class Silent:
    """The observer of a run that is measured from inside."""

    def __getattr__(self, name: str):
        return lambda *_: None


def measure(cfg: Config, console: Console) -> dict[str, list[float]]:
    with Sandbox(workers=cfg.threads) as sandbox:
        policy, pairs = make_policy(cfg), load_pairs(cfg.pairs)
        training = loop.Training(cfg, policy, MicroEnv(sandbox), pairs)
        training.arm.watch = Twice(training.arm.bench)
        for _ in track(range(cfg.steps), console=console, description="steps"):
            training.advance(Silent())
        return training.arm.watch.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", choices=POLICIES, default=Config.policy)
    parser.add_argument("--state", choices=("full", "deployed"), default=Config.score_state)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = {"seed": args.seed, "policy": args.policy, "score_state": args.state, "steps": args.steps}
    console, top = Console(width=max(100, Console().width)), peak(1)
    found = measure(replace(preset("micro"), arm="routeV", **asked), console)
    cost = {dtype: statistics.median(found[f"cpu {dtype}"]) for dtype in ("model", "bfloat16")}
    rollouts, logps = int(sum(found["rollouts"])), sorted(found["logp"])
    rows = {
        "rollouts": f"{rollouts}",
        "equal zone labels": f"{100 * sum(found['equal']) / rollouts:.2f} %",
        "score error / sd of the step's scores, median": f"{statistics.median(found['score']):.4f}",
        "logp error, nats, mean": f"{statistics.mean(logps):.5f}",
        "logp error, nats, 99 % below": f"{logps[int(0.99 * len(logps))]:.4f}",
        "cosine of the directions, least": f"{min(found['overlap']):.5f}",
        "CPU-seconds a step, model": f"{cost['model']:.3f}",
        "CPU-seconds a step, bfloat16": f"{cost['bfloat16']:.3f} ({cost['bfloat16'] / cost['model']:.2f})",
    }
    where = machine()
    title = f"{', '.join(f'{k} {v}' for k, v in where.items())}; 1 thread, {top:.0f} GFLOP/s in fp32"
    table = Table("", "", title=title, show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "GFLOP/s": top, **asked, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
