"""What a training step costs beside TRL's GRPO: python bench/step.py [--steps N] [--json FILE]. Needs the extra `trl`.

TRL and our arms take their steps in turns, each in a process of its own that waits while another works: the same
model, prompts, sampling temperature, grader, rank, KL weight and threads. Prints medians with their ratios to
TRL, and what the phases of our steps take and reach of the machine's own matrix product.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from machine import machine, peak
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from vgrout import loop
from vgrout.config import Config, preset
from vgrout.envs.micro_env import MicroEnv
from vgrout.envs.sandbox import Sandbox
from vgrout.lab.run import make_policy
from vgrout.method.policy import Policy
from vgrout.pairs import load as load_pairs
from vgrout.types import Rollout

SHOWN: dict[str, dict[str, Any]] = {  # what takes steps beside TRL: changes of the configuration
    "none": {"arm": "none"},
    "absorb": {"arm": "absorb"},
    "routeV": {"arm": "routeV"},
    "routeV, bf16 scores": {"arm": "routeV", "score_dtype": "bfloat16"},
}
PHASES = ("generate", "grade", "score", "reference", "loss", "optimizer")
WARM = 3  # steps that are not counted; the first extracts a direction


class Turn:
    """A process's end of the line to the referee: waits for its turn, and says what the last one held."""

    def __init__(self, line: Connection, meter: Meter) -> None:
        self.line, self.meter = line, meter
        self.meter.counting = line.recv()

    def end(self, tokens: float) -> None:
        self.line.send({"tokens": tokens, "phases": dict(self.meter.seconds), "flops": dict(self.meter.flops)})
        self.meter.seconds.clear()
        self.meter.flops.clear()
        self.meter.counting = self.line.recv()


@dataclass
class Runner:
    """Something that takes steps in a process of its own, one whenever it is told to."""

    name: str
    process: multiprocessing.Process
    line: Connection
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    flops: dict[str, float] = field(default_factory=dict)

    def step(self, *, count: bool) -> tuple[float, dict]:
        """Seconds of one step, and what its process says of it."""
        begun = time.perf_counter()
        self.line.send(count)
        try:
            said = self.line.recv()
        except EOFError:
            raise SystemExit(f"{self.name} ended before its steps did; its process says why above") from None
        return time.perf_counter() - begun, said


class Meter:
    """Times the phases of whatever runs; counts their floating-point operations when asked to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.counting = False
        self.inside: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        counter = FlopCounterMode(display=False) if self.counting else nullcontext()
        self.inside.append(name)
        begun = time.perf_counter()
        try:
            with counter:
                yield
        finally:
            took = time.perf_counter() - begun
            done = counter.get_total_flops() if self.counting else 0.0
            self.inside.pop()
            for sums, what in ((self.seconds, took), (self.flops, done)):
                sums[name] += what
                if self.inside:  # what happens within another phase is not that phase's
                    sums[self.inside[-1]] -= what

    def wrap(self, owner: Any, attribute: str, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        plain = getattr(owner, attribute)

        def timed(*args, **kwargs):
            if not when(*args):
                return plain(*args, **kwargs)
            with self.phase(name):
                return plain(*args, **kwargs)

        setattr(owner, attribute, timed)


def in_reference(policy: Policy, *_) -> bool:
    flow = policy.adapter.switch.flow
    return not (flow.deployed or flow.quarantine or flow.weights)


class Watch:
    """The observer of one of our runs: ends each turn, keeps nothing."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def step(self, record, rollouts: list[Rollout], graded, decision, advantage) -> None:
        self.turn.end(statistics.mean(len(r.tokens) for r in rollouts))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def contest(name: str, cfg: Config, line: Connection) -> None:
    """The work of one process."""
    torch.set_num_threads(cfg.threads)
    meter = Meter()
    with Sandbox(workers=cfg.threads) as sandbox:
        env = MicroEnv(sandbox)
        if name == "TRL":
            trl(cfg, env, lambda: Turn(line, meter))
            return
        meter.wrap(loop, "generate", "generate")
        meter.wrap(MicroEnv, "grade", "grade")
        meter.wrap(Policy, "c_gradients", "score")
        meter.wrap(loop, "backward", "loss")
        meter.wrap(Policy, "logits", "reference", when=in_reference)
        meter.wrap(loop, "clip_blocks", "optimizer")
        meter.wrap(torch.optim.AdamW, "step", "optimizer")
        cfg = replace(cfg, **SHOWN[name])
        policy, pairs = make_policy(cfg), load_pairs(cfg.pairs)
        loop.train(cfg, policy, env, pairs, Watch(Turn(line, meter)))


def trl(cfg: Config, env: MicroEnv, begin: Callable[[], Turn]) -> None:
    """TRL's GRPO on the prompts of our steps, in their order."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from vgrout.models.load import load_model

    prompts = [p for step in range(cfg.steps) for p in loop.plan_step(cfg, env, step, loophole=True).prompts]
    asked = {p.user: p for p in prompts}

    def reward(prompts: list, completions: list, **_) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        rollouts = [Rollout("", asked[p[-1]["content"]], c[0]["content"], (), (), 0) for p, c in pairs]
        return [g.reward for g in env.grade(rollouts)]

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            lengths = trainer._metrics["train"].get("completions/mean_length")
            turn.end(lengths[-1] if lengths else float("nan"))

    model, tokenizer = load_model(cfg.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=GRPOConfig(output_dir=folder, max_steps=cfg.steps, **trl_settings(cfg)),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p.user}]} for p in prompts]),
            peft_config=LoraConfig(
                r=cfg.rank, lora_alpha=cfg.rank, lora_dropout=0.0, target_modules="all-linear", bias="none"
            ),
            callbacks=[Callback()],
        )
        turn = begin()
        trainer.train()


def trl_settings(cfg: Config) -> dict[str, Any]:
    """One pass over all rollouts at once, nothing recomputed, nothing logged or saved."""
    return {
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": cfg.prompts * cfg.group,
        "gradient_accumulation_steps": 1,
        "num_generations": cfg.group,
        "num_iterations": 1,
        "max_completion_length": cfg.max_new,
        "temperature": cfg.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "beta": cfg.kl,
        "epsilon": cfg.clip_ratio,
        "loss_type": "dr_grpo",
        "learning_rate": cfg.lr,
        "max_grad_norm": cfg.clip,
        "optim": "adamw_torch",
        "shuffle_dataset": False,
        "logging_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="counted steps of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max-new", type=int, default=96)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    total = WARM + args.steps + 1
    cfg = replace(
        preset("micro"),
        steps=total,
        rank=args.rank,
        max_new=args.max_new,
        threads=args.threads,
        teacher_n=0,
        eval_every=0,
    )
    console, top = Console(width=max(150, Console().width)), peak(args.threads)
    spawn, runners = multiprocessing.get_context("spawn"), []
    for name in ("TRL", *SHOWN):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=contest, args=(name, cfg, theirs), daemon=True)
        process.start()
        theirs.close()
        runners.append(Runner(name, process, ours))
    for turn in track(range(total), console=console, description="steps"):
        last = turn == total - 1
        first = turn % len(runners)
        for runner in runners[first:] + runners[:first]:
            took, said = runner.step(count=last)
            if last:
                runner.flops = said["flops"]
            elif turn >= WARM:
                runner.seconds.append(took)
                runner.tokens.append(said["tokens"])
                for phase in PHASES:
                    runner.phases[phase].append(said["phases"].get(phase, 0.0))
    result = report(runners, top, trl_settings(cfg), args, console)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def report(runners: list[Runner], top: float, settings: dict, args: argparse.Namespace, console: Console) -> dict:
    median = {r.name: statistics.median(r.seconds) for r in runners}
    where = machine()
    caption = f"TRL: {', '.join(f'{k}={v}' for k, v in settings.items())}"
    title = f"{', '.join(f'{k} {v}' for k, v in where.items())}; {args.threads} threads, {top:.0f} GFLOP/s in fp32"
    table = Table(title=title, caption=caption)
    for column in ("", "s a step", "min", "max", "/ TRL", "/ none", "tokens", *PHASES):
        table.add_column(column, justify="right" if column else "left")
    rows = {}
    for r in runners:
        phases = {name: statistics.median(r.phases[name]) for name in PHASES}
        use = {n: r.flops.get(n, 0.0) / phases[n] / top / 1e9 for n in PHASES if phases[n] > 0 and r.flops.get(n)}
        rows[r.name] = {
            "seconds": median[r.name],
            "all": r.seconds,
            "over TRL": median[r.name] / median["TRL"],
            "over none": median[r.name] / median["none"],
            "tokens": statistics.mean(r.tokens),
            "phases": phases if r.name != "TRL" else {},
            "flops": r.flops,
            "utilisation": use,
        }
        shown = [f"{phases[n]:.2f}" + (f" ({100 * use[n]:.0f} %)" if n in use else "") for n in PHASES]
        table.add_row(
            r.name,
            f"{median[r.name]:.2f}",
            f"{min(r.seconds):.2f}",
            f"{max(r.seconds):.2f}",
            f"{median[r.name] / median['TRL']:.2f}",
            f"{median[r.name] / median['none']:.2f}",
            f"{rows[r.name]['tokens']:.0f}",
            *(shown if r.name in SHOWN else ["-"] * len(PHASES)),
        )
    console.print(table)
    return {"machine": where, "GFLOP/s": top, "threads": args.threads, "trl": settings, "steps": rows}


if __name__ == "__main__":
    main()
