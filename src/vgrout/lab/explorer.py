"""The rollouts of a page: which it holds, and how they are packed into it.

The page gets columns of numbers and lists of distinct texts, gzipped: a text that many rollouts share is there once.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from vgrout.arms import ARMS
from vgrout.lab.archive import VERDICT
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.labels import problems_of
from vgrout.lab.runs import Run
from vgrout.types import Problem, UserError

LIMIT = 50_000  # rollouts of a page
SPLITS = ("train", "val", "test")
FLAGS = ("hacked", "solved", "attempted", "compiled", "passed")  # bits of a verdict, the lowest first
COLUMNS = ("run", "phase", "step", "prompt", "text", "reward", "advantage", "score", "zone", "bits", "id")
TRAINS = {"keep": "deployed", "absorb": "both", "route": "quarantine"}  # zone -> the block that a rollout trained


class Texts:
    """Distinct values in the order of their first use, and the number of each."""

    def __init__(self) -> None:
        self.place: dict[Hashable, int] = {}

    def __call__(self, value: Hashable) -> int:
        return self.place.setdefault(value, len(self.place))

    @property
    def values(self) -> list:
        return list(self.place)


def chosen(runs: Sequence[Run], limit: int) -> tuple[tuple[str, ...], int]:
    """Which rollouts fit into a page: phases, none for all of them, and the number n of which every n-th step of
    training is shown. Where not all fit, of the evaluation only what ships on held-out markers is."""
    every = sum(sum(step_size(run) for _ in run.steps) for run in runs)
    cells = sum(len(run.cells) * run.cfg.eval_rollouts for run in runs if run.cells is not None)
    if every + cells <= limit:
        return (), 1
    kept = sum(run.cfg.eval_rollouts for run in runs if run.cells is not None)
    return ("train", f"eval:{HEADLINE}"), max(1, -(-every // max(1, limit - kept)))


def step_size(run: Run) -> int:
    return run.cfg.prompts * run.cfg.group


def table(runs: Sequence[Run], limit: int = LIMIT) -> dict[str, Any]:
    """Columns, one entry per rollout, and what their numbers stand for."""
    shown, every = chosen(runs, limit)
    prompts, texts, phases, zones, ids = (Texts() for _ in range(5))
    names: tuple[str, ...] = (
        "run",
        "phase",
        "step",
        "prompt",
        "text",
        "reward",
        "advantage",
        "score",
        "zone",
        "bits",
        "id",
    )
    columns: dict[str, list] = {name: [] for name in names}
    for r, run in enumerate(runs):
        for row in run.rollouts(shown, every):
            known = row.get(VERDICT + "compiled") is not None
            bits = sum(bool(row[VERDICT + flag]) << i for i, flag in enumerate(FLAGS)) if known else -1
            values = {
                "run": r,
                "phase": phases(row["phase"]),
                "step": row.get("step"),
                "prompt": prompts((row["problem"], row["prompt"], row["source"])),
                "text": texts(row["text"]),
                "reward": row["reward"],
                "advantage": row.get("advantage"),
                "score": row.get("score"),
                "zone": zones(row.get("zone") or ""),
                "bits": bits,
                "id": ids(row["id"]),
            }
            for name, value in values.items():
                columns[name].append(round(value, 4) if isinstance(value, float) else value)
    return {
        "runs": [_told(run) for run in runs],
        "prompts": [_asked(*said) for said in prompts.values],
        "problems": _problems({problem for problem, _, _ in prompts.values}, runs),
        "texts": texts.values,
        "phases": phases.values,
        "zones": zones.values,
        "ids": ids.values,
        "flags": FLAGS,
        "trains": TRAINS,
        "every": every,
        "whole": not shown,
        "columns": columns,
    }


def _told(run: Run) -> dict[str, Any]:
    cuts = {step["step"]: [step["t_lo"], step["t_hi"]] for step in run.steps if step.get("t_lo") is not None}
    return {"name": run.name, "arm": run.label, "seed": run.seed, "routes": ARMS[run.cfg.arm].ablates, "cuts": cuts}


def _asked(problem: str, text: str, source: str) -> dict[str, str]:
    return {"problem": problem, "text": text, "source": source}


def _problems(ids: Iterable[str], runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What is known of the problems: loophole, the task without its hint, a right program."""
    every: dict[str, Problem] = {}
    for run in {run.cfg.env: run for run in runs if run.cfg.oracle}.values():
        with suppress(UserError):  # records may be read where the files of their problems are not
            every |= {p.id: p for split in SPLITS for p in problems_of(run.cfg, split, run.provenance)}
    known = (every[id] for id in ids if id in every)
    return {p.id: {"mode": p.mode, "task": p.task, "canonical": p.canonical} for p in known}


def packed(told: dict[str, Any]) -> str:
    """Base64 of gzipped JSON; the same table gives the same text."""
    said = json.dumps(told, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(said, compresslevel=9, mtime=0)).decode()
