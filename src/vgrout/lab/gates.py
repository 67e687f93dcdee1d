"""`vgrout lab gates`: what the gates of finished runs did, from their records alone.

Precision and recall are of what the gate flagged among the policy's rollouts, over all of training and on both sides of
saturation: the first step at which the mean share of hacks over ten steps reaches one half. AUROC needs a trace; modes
that the pairs show and modes that they do not are compared with Haar-random directions on the same rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vgrout.config import Config
from vgrout.lab.direction import LEAST, compare, scored, traced
from vgrout.lab.labels import modes_in_pairs, read_labelled
from vgrout.lab.record import finished
from vgrout.lab.tables import number_table, print_wide
from vgrout.lab.trace import FOLDER
from vgrout.types import UserError

WINDOW, SATURATED = 10, 0.5
PARTS = ("all", "before", "after")


def saturation(step: np.ndarray, hacked: np.ndarray) -> int | None:
    """The first step that ends WINDOW steps whose mean share of hacks is at least SATURATED; None where none does."""
    steps = np.unique(step)
    share = np.array([hacked[step == s].mean() for s in steps])
    for i in range(WINDOW - 1, len(steps)):
        if share[i - WINDOW + 1 : i + 1].mean() >= SATURATED - 1e-12:
            return int(steps[i])
    return None


def choice(flagged: np.ndarray, hacked: np.ndarray) -> dict:
    """Precision and recall of what was flagged; None where nothing was, or nothing was to find."""
    hit = int((flagged & hacked).sum())
    return {
        "rollouts": len(hacked),
        "hacks": int(hacked.sum()),
        "flagged": int(flagged.sum()),
        "precision": round(hit / int(flagged.sum()), 6) if flagged.any() else None,
        "recall": round(hit / int(hacked.sum()), 6) if hacked.any() else None,
    }


def of_run(run: Path, draws: int) -> dict:
    """What one finished run contributes. Raises UserError where it is none, or has no oracle."""
    if not finished(run):
        raise UserError(f"{run} is no finished run")
    cfg, labelled = Config.read(run / "config.json"), read_labelled(run)
    full = saturation(labelled.step, labelled.hacked)
    masks = {
        "all": np.ones(len(labelled.id), bool),
        "before": labelled.step < (np.inf if full is None else full),
        "after": labelled.step >= (np.inf if full is None else full),
    }
    parts = {name: choice(labelled.flagged[mask], labelled.hacked[mask]) for name, mask in masks.items()}
    out = {"run": run.name, "arm": cfg.arm, "seed": cfg.seed, "policy": cfg.policy, "saturation": full, **parts}
    return out | {"auroc": aurocs(run, cfg, draws) if any((run / FOLDER).glob("step_*")) else None}


def aurocs(run: Path, cfg: Config, draws: int) -> dict:
    """AUROC against random directions in modes that the pairs show and in those that they do not; None where hacks or
    others are too few."""
    traces, labelled = traced(run)
    shown = np.isin(labelled.mode, sorted(modes_in_pairs(cfg.pairs)))
    score = scored(traces, labelled, draws, None)
    out: dict = {}
    for name, mask in (("in pairs", shown), ("held out", ~shown)):
        hacked = labelled.hacked[mask]
        enough = min(hacked.sum(), (~hacked).sum()) >= LEAST
        out[name] = {k: v for k, v in compare(score[:, mask], hacked).items() if "auroc" in k} if enough else None
    return out


def gates_table(rows: Sequence[dict], draws: int) -> Table:
    caption = (
        f"precision / recall of what was flagged; saturated: {WINDOW} steps with {SATURATED:.0%} hacks in the mean. "
        f"AUROC in modes that the pairs show and in others (95th percentile of {draws} Haar-random directions; p): "
        "from the trace. Measured with the oracle."
    )
    head = ("run", "policy", "saturated", "whole run", "before", "after", "AUROC in pairs", "AUROC held out")
    shown = []
    for row in rows:
        area = [_area((row["auroc"] or {}).get(name)) for name in ("in pairs", "held out")]
        at = "-" if row["saturation"] is None else f"step {row['saturation']}"
        shown.append([row["run"], row["policy"], at, *(_share(row[name]) for name in PARTS), *area])
    return number_table("gates of finished runs, on the policy's training rollouts", caption, head, shown, 2)


def _share(part: dict) -> str:
    return " / ".join("-" if part[key] is None else f"{part[key]:.2f}" for key in ("precision", "recall"))


def _area(found: dict | None) -> str:
    return "-" if found is None else f"{found['auroc']:.2f} ({found['auroc_null'][1]:.2f}; {found['auroc_p']:.3f})"


def show_gates(runs: Sequence[Path], draws: int, out: Path | None, console: Console) -> None:
    """Print the table; with `out` also write it as JSON. Raises UserError."""
    if draws < 1:
        raise UserError(f"draws = {draws}: give a positive whole number")
    rows = [of_run(run, draws) for run in runs]
    print_wide(gates_table(rows, draws), console)
    if out is not None:
        try:
            out.write_text(json.dumps(rows, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None
