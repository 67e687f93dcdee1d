"""Evaluate a run's adapter again, from its folder alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.lab.evaluate import CELLS, sample_cell, summary
from vgrout.lab.run import workshop
from vgrout.types import UserError


def evaluate_run(folder: Path, split: str, rollouts: int | None) -> dict:
    """Every cell of a run. Raises UserError where the folder is no finished run or the split is unknown."""
    if split not in ("val", "test"):
        raise UserError(f"unknown split {split!r}: choose val or test")
    cfg = Config.read(folder / "config.json")
    cfg = replace(cfg, eval_rollouts=rollouts or cfg.eval_rollouts)
    with workshop(cfg) as (policy, env):
        policy.adapter.load(folder / "adapter.safetensors")
        cells = {}
        for cell in CELLS:
            n, ablates = cfg.eval_rollouts, ARMS[cfg.arm].ablates
            result = sample_cell(cfg, policy, env, cell, problems=env.problems(split), rollouts=n, ablates=ablates)
            cells[cell.name] = summary(result, env)
        return cells


def reevaluate(folder: Path, split: str, rollouts: int | None, console: Console) -> None:
    cells = evaluate_run(folder, split, rollouts)
    table = Table(title=f"{folder.name} on {split} problems; % of rollouts [95 % interval, within-run sampling only]")
    for column in ("cell", "hack", "attempted", "solve", "compile"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for name, cell in cells.items():
        parts = [cell[k] for k in ("hack", "attempted", "solve", "compile")]
        row = [f"{100 * p['mean']:.1f} [{100 * p['low']:.1f}, {100 * p['high']:.1f}]" for p in parts]
        table.add_row(name, *row)
    console.print(table)
