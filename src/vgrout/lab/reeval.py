"""Evaluate a run's adapter again, from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.lab.evaluate import NO_ORACLE, final, size_note, summaries
from vgrout.lab.record import read_json
from vgrout.lab.run import header, sandbox_note, workshop
from vgrout.types import UserError

WORLD = ("model_sha256", "task_sha256", "chat_template_sha256", "tokenizer_sha256")  # that an evaluation is about


def check_same(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Raises UserError where model, problems or template are not those that a run was trained with."""
    made = read_json(folder / "provenance.json")
    if other := [name for name in WORLD if name in made and made[name] != provenance.get(name)]:
        raise UserError(f"{folder} was made with another {', '.join(name.removesuffix('_sha256') for name in other)}")


def evaluate_run(
    folder: Path, split: str, rollouts: int | None, device: str | None = None
) -> tuple[dict[str, dict], Mapping[str, Any]]:
    """(every cell of a run, what this evaluation ran on). Raises UserError where the folder is no finished run, the
    split is unknown or the number of rollouts is none."""
    if split not in ("val", "test"):
        raise UserError(f"unknown split {split!r}: choose val or test")
    cfg = Config.read(folder / "config.json")
    if rollouts is not None:
        cfg = replace(cfg, eval_rollouts=rollouts)
    if device is not None:
        cfg = replace(cfg, device=device)
    with workshop(cfg, trains=False) as shop:
        check_same(folder, shop.provenance)
        shop.policy.adapter.load(folder / "adapter.safetensors")
        results = final(cfg, shop.policy, shop.env, ablates=ARMS[cfg.arm].ablates, split=split)
        return summaries(results, shop.env), shop.provenance


def reevaluate(folder: Path, split: str, rollouts: int | None, console: Console, device: str | None = None) -> None:
    """Print every cell. Raises what `evaluate_run` raises."""
    cells, provenance = evaluate_run(folder, split, rollouts, device)
    console.print(header(provenance), markup=False, highlight=False, soft_wrap=True)
    tasked = not any("hack" in cell for cell in cells.values())
    what = "mean reward" if tasked else "% of rollouts"
    title = f"{folder.name} on {split} problems; {what} [95 % interval, within-run sampling only]"
    notes = " ".join(filter(None, (size_note(cells), sandbox_note(provenance))))
    table = Table(title=title, caption=notes or None)
    verdicts = ("hack", "attempted", "solve", "compile")
    for column in ("cell", *(["reward"] if tasked else []), *verdicts):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for name, cell in cells.items():
        if tasked:
            mean, low, high = (cell["reward"][key] for key in ("mean", "low", "high"))
            table.add_row(name, f"{mean:.3f} [{low:.3f}, {high:.3f}]", *[NO_ORACLE] * len(verdicts))
            continue
        parts = [cell[k] for k in verdicts]
        row = [f"{100 * p['mean']:.1f} [{100 * p['low']:.1f}, {100 * p['high']:.1f}]" for p in parts]
        table.add_row(name, *row)
    console.print(table)
