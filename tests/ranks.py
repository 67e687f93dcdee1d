"""Toy trainings as one of several processes: `python tests/ranks.py OUT JOBS` under what torchrun sets.

JOBS is a JSON list of [name, settings of the toy]; OUT gets a file for each with all that the process saw.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

SRC = Path(__file__).parents[1] / "src"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def started(args: list[str], world: int = 2, **extra: str) -> list[subprocess.Popen]:
    """`world` processes of one run that execute `python ARGS`, as torchrun would start them on one machine."""
    port, out = str(free_port()), []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC)}
        env = {**os.environ, **place, **meet, **extra}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        out.append(subprocess.Popen([sys.executable, *args], env=env, **pipes))
    return out


def ended(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each. Nobody outlives the test."""
    try:
        said = [p.communicate(timeout=seconds) for p in processes]
        return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.wait()


def toy(settings: dict, ranks) -> dict:
    """What a toy training of `settings` leaves: records, zones, scores, advantages, gradients, texts, weights."""
    from vgrout.loop import train
    from vgrout.method.shard import join
    from vgrout.types import RunFailed
    from vgrout.verify.toy import PAIRS, SIZES, TOY, Letters, Watcher, displace, toy_given, toy_policy, weights

    class Keeper(Watcher):
        def step(self, record, rollouts, graded, decision, advantage):
            super().step(record, rollouts, graded, decision, advantage)
            grads = [(n, p.grad) for which in ("deployed", "quarantine") for n, p in policy.adapter.named(which)]
            seen.append(
                {
                    "text": [(r.id, r.text, r.tokens, r.logp_old) for r in rollouts],
                    "reward": [g.reward for g in graded],
                    "zones": decision.zones(),
                    "score": decision.score,
                    "features": decision.features,
                    "threshold": decision.threshold,
                    "advantage": advantage,
                    "grads": {n: g.clone() for n, g in grads if g is not None},
                }
            )

    class Fails(Letters):
        """Its second grading fails in the second process."""

        gradings = 0

        def grade(self, rollouts):
            self.gradings += 1
            if ranks.rank == 1 and self.gradings == 2:
                raise RunFailed("the grader fell over")
            return super().grade(rollouts)

    settings = dict(settings)
    env = Fails() if settings.pop("fails", False) else Letters()
    ends = settings.pop("ends", 0)
    cfg, seen = replace(TOY, **settings), []
    policy = toy_policy(cfg)
    if ends:  # so many tokens end a completion: their lengths differ
        policy.model.generation_config.eos_token_id = list(range(SIZES.vocab - ends, SIZES.vocab))
    displace(policy.adapter, seed=ranks.rank if cfg.seed == 7 else 0)  # seed 7: only the first process's may count
    join(policy, ranks, "cpu", shard=cfg.shard and ranks.world > 1)
    watcher = Keeper()
    train(cfg, policy, env, PAIRS, watcher, toy_given(cfg, policy))
    frozen = [p for layer in policy.body.layers for p in layer.parameters() if not p.requires_grad]
    held = sum(getattr(p, "_local_tensor", p).numel() for p in frozen) / sum(p.numel() for p in frozen)
    return {"records": watcher.records, "seen": seen, "weights": weights(policy), "held": held}


def main(out: Path, jobs: list[tuple[str, dict]]) -> None:
    from vgrout.dist import joined, leave

    torch.set_num_threads(1)
    with joined() as ranks:
        for name, settings in jobs:
            found = toy({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}, ranks)
            torch.save(found, out / f"{name}-{ranks.rank}.pt")
            ranks.sharded = False
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
