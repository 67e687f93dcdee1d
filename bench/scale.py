"""How a training step grows: python bench/scale.py [--out FOLDER]. Needs the extra `report` for the plot.

One quantity varies at a time: rollouts, completion length, model size, rank, pairs. Every point is a process of its own
that takes steps of vanilla GRPO and of routeV on a random model whose completions all have full length; for the pairs,
v is extracted in every step. Writes scale.json and scale.svg, and prints for each line the exponent of its growth
between its two largest points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from machine import machine, peak
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vgrout.adapters import attach
from vgrout.config import preset
from vgrout.loop import train
from vgrout.method.policy import Policy
from vgrout.models.load import load_model
from vgrout.models.organism import OrganismConfig, new_model
from vgrout.pairs import load as load_pairs
from vgrout.types import Graded, Prompt, Rollout

ARMS = ("none", "routeV")
STEPS, WARM = 5, 2
SIZES = {  # about as many million parameters, without the vocabulary's: (layers, hidden, feed-forward)
    1: (4, 128, 384),
    3: (4, 224, 640),
    10: (6, 352, 1056),
    30: (8, 528, 1584),
}


@dataclass(frozen=True)
class Point:
    """One measurement: 64 rollouts of 64 tokens with rank 8 and 24 pairs unless said otherwise."""

    axis: str
    arm: str
    rollouts: int = 64
    length: int = 64
    size: int = 1
    rank: int = 8
    pairs: int = 24

    @property
    def value(self) -> int:
        return getattr(self, self.axis)


AXES: dict[str, Sequence[int]] = {
    "rollouts": (16, 32, 64, 128, 256, 512),
    "length": (32, 64, 128, 256, 512),
    "size": tuple(SIZES),
    "rank": (4, 8, 16, 32, 64),
    "pairs": (12, 24, 48, 96, 192, 384),
}


class World:
    """Prompts without a meaning; the reward is a hash of the completion."""

    def problems(self, split: str) -> list[str]:
        return [str(i) for i in range(64)]

    def covered(self) -> list:
        return []

    def prompt(self, problem_id: str, *, family: str, hinted: bool, draw: int) -> Prompt:
        return Prompt(problem_id, f"Write solve(xs, k): take every number {problem_id} times and add the results.")

    def demonstrations(self, prompt: Prompt, n: int, draw: int) -> list[str]:
        return []

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        return [Graded(float(sum(r.tokens) % 7), None) for r in rollouts]


class Clock:
    """An observer that keeps the CPU-seconds of each step, which waiting for a core does not lengthen."""

    def __init__(self) -> None:
        self.last, self.seconds = time.process_time(), []

    def step(self, *_) -> None:
        now = time.process_time()
        self.seconds.append(now - self.last)
        self.last = time.process_time()

    def __getattr__(self, name: str):
        return lambda *_: None


def measure(point: Point, threads: int) -> dict:
    torch.set_num_threads(threads)
    base, tokenizer = load_model("micro")
    layers, hidden, ffn = SIZES[point.size]
    heads = hidden // 32
    sizes = OrganismConfig(
        base.config.vocab_size, layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=1, head_dim=32
    )
    model = new_model(sizes, tokenizer).eval()
    end = torch.tensor([tokenizer.eos_token_id])
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, end, -1e4))
    cfg = replace(
        preset("micro"),
        arm=point.arm,
        steps=STEPS,
        prompts=point.rollouts // 8,
        max_new=point.length,
        rank=point.rank,
        teacher_n=0,
        eval_every=0,
        threads=threads,
        micro_batch=16,
        refresh_every=1 if point.axis == "pairs" else 5,  # pairs cost where v is extracted
    )
    policy = Policy(model, tokenizer, attach(model, cfg.adapter, cfg.rank, 0), cfg.temperature, cfg.score_batch)
    bundled = load_pairs(cfg.pairs)
    clock = Clock()
    train(cfg, policy, World(), (bundled * 15)[: point.pairs], clock)
    inner = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "dA" not in n and "dB" not in n)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return asdict(point) | {
        "seconds": statistics.median(clock.seconds[WARM:]),
        "first": clock.seconds[0],
        "peak MiB": peak_mb,
        "inner parameters": inner,
    }


def plot(rows: list[dict], out: Path) -> None:
    import altair as alt

    charts = []
    for axis in AXES:
        values = [r | {"x": r[axis]} for r in rows if r["axis"] == axis]
        lines = []
        for field, title in (("seconds", "CPU-seconds a step"), ("peak MiB", "peak memory, MiB")):
            lines.append(
                alt.Chart(alt.Data(values=values), width=220, height=160)
                .mark_line(point=True)
                .encode(
                    x=alt.X("x:Q", title=axis, scale=alt.Scale(type="log")),
                    y=alt.Y(f"{field}:Q", title=title, scale=alt.Scale(type="log")),
                    color=alt.Color("arm:N", title="arm"),
                )
            )
        charts.append(alt.vconcat(*lines))
    alt.hconcat(*charts).save(out)


def exponent(rows: Sequence[dict], field: str) -> float:
    """d log(field) / d log(x) between the two largest points of a line."""
    a, b = sorted(rows, key=lambda r: r[r["axis"]])[-2:]
    return math.log(b[field] / a[field]) / math.log(b[b["axis"]] / a[a["axis"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--axes", nargs="*", default=list(AXES))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(Point(**json.loads(args.point)), args.threads)))
        return
    if find_spec("altair") is None:
        parser.error("the plot needs altair: pip install -c constraints.txt -e '.[report]'")
    console, rows = Console(), []
    points = [Point(axis, arm, **{axis: x}) for axis in args.axes for x in AXES[axis] for arm in ARMS]
    where = machine() | {"threads": args.threads, "GFLOP/s": round(peak(args.threads))}
    for point in track(points, console=console, description="measuring"):
        command = [sys.executable, __file__, "--threads", str(args.threads), "--point", json.dumps(asdict(point))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scale.json").write_text(json.dumps({"machine": where, "points": rows}, indent=1) + "\n")
    plot(rows, args.out / "scale.svg")
    table = Table(title=", ".join(f"{k} {v}" for k, v in where.items()))
    for column in ("axis", "arm", *(f"{i}" for i in range(1, 7)), "exponent", "memory's"):
        table.add_column(column)
    for axis in args.axes:
        for arm in ARMS:
            line = [r for r in rows if (r["axis"], r["arm"]) == (axis, arm)]
            cells = [f"{r[axis]}: {r['seconds']:.2f} s, {r['peak MiB']:.0f} MiB" for r in line]
            cells += [""] * (6 - len(cells))
            table.add_row(axis, arm, *cells, f"{exponent(line, 'seconds'):.2f}", f"{exponent(line, 'peak MiB'):.2f}")
    console.print(table, width=max(console.width, 220))


if __name__ == "__main__":
    main()
