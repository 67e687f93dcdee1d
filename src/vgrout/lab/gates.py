"""`vgrout lab gates`: what the gates of finished runs did, from their records alone.

Precision and recall are of what the gate flagged among the policy's rollouts, over all of training and on both sides of
saturation: the first step at which the mean share of hacks over ten steps reaches one half. AUROC needs a trace; modes
that the pairs show and modes that they do not are compared with Haar-random directions on the same rollouts. The replay
needs one too: what each gate policy would have flagged of the features that the run's own policy saw. The rollouts are
those of that run; under another policy there would have been others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vgrout.arms import ARMS
from vgrout.arms.monitors import GradientScore
from vgrout.config import Config
from vgrout.lab.direction import LEAST, compare, scored, traced
from vgrout.lab.labels import Labelled, modes_in_pairs, read_labelled
from vgrout.lab.record import finished
from vgrout.lab.tables import can_write, number_table, print_wide, write_result
from vgrout.lab.trace import FOLDER, Trace
from vgrout.method.direction import DirectionError
from vgrout.method.gate import POLICIES, Remembers, decide
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
    out = {"run": run.name, "arm": cfg.arm, "seed": cfg.seed, "policy": cfg.policy, "saturation": full}
    out |= choices(labelled, labelled.flagged, full)
    if not any((run / FOLDER).glob("step_*")):
        return out | {"auroc": None, "replayed": None}
    traces, known = traced(run)
    # A policy that remembers needs every step.
    able = [n for n, kind in POLICIES.items() if len(traces) == cfg.steps or not isinstance(kind(cfg), Remembers)]
    return out | {
        "auroc": aurocs(traces, known, cfg, draws),
        "traced": [len(traces), cfg.steps],
        "own": cfg.policy if ARMS[cfg.arm].monitor.cut is GradientScore.cut else None,
        "replayed": {name: replay(name, cfg, traces, known, full) for name in able},
    }


def choices(labelled: Labelled, flagged: np.ndarray, full: int | None) -> dict[str, dict]:
    """`choice` over the whole run, and before and from step `full` on, at which it was saturated."""
    after = labelled.step >= (np.inf if full is None else full)
    masks = dict(zip(PARTS, (np.ones(len(after), bool), ~after, after), strict=True))
    return {name: choice(flagged[mask], labelled.hacked[mask]) for name, mask in masks.items()}


def replay(policy: str, cfg: Config, traces: Sequence[Trace], labelled: Labelled, full: int | None) -> dict:
    """`choices` of a gate policy, with the settings of `cfg`, over the traced features, which have half precision: a
    score within that of a cut may fall on its other side.

    `stopped`: the step at which the policy refused the direction, from which on it flags nothing.
    """
    gate, place = POLICIES[policy](cfg), {id: i for i, id in enumerate(labelled.id)}
    flagged, stopped = np.zeros(len(labelled.id), bool), None
    for trace in traces:
        score, live = trace.direction.score(trace.unit)
        cuts = (torch.inf, torch.inf)
        try:
            if bool(live.any()):
                cuts = gate.thresholds(score[live], trace.unit[live], trace.direction)
        except DirectionError:
            stopped = trace.step
            break
        route = decide(score, live, *cuts).route.tolist()
        for id, routed in zip(trace.ids, route, strict=True):
            if id in place:
                flagged[place[id]] = routed
    return choices(labelled, flagged, full) | {"stopped": stopped}


def aurocs(traces: Sequence[Trace], labelled: Labelled, cfg: Config, draws: int) -> dict:
    """AUROC against random directions in modes that the pairs show and in those that they do not; None where hacks or
    others are too few."""
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


def replay_table(rows: Sequence[dict]) -> Table:
    """Every gate policy on the traced scores of each run."""
    caption = (
        "precision / recall of what each gate policy would have flagged of the rollouts that the run's own policy (*) "
        "saw, at the run's settings, in the traced steps. ended: where a policy stopped, since the pairs' hack sides "
        "scored below their clean ones. Measured with the oracle."
    )
    shown = []
    for row in rows:
        for name, found in row["replayed"].items():
            label = name + (" *" if name == row["own"] else "")
            end = "-" if found["stopped"] is None else f"step {found['stopped']}"
            traced = "{} of {}".format(*row["traced"])
            shown.append([row["run"], label, traced, *(_share(found[part]) for part in PARTS), end])
    head = ("run", "policy", "traced steps", "whole run", "before", "after", "ended")
    return number_table("gate policies replayed on the same rollouts", caption, head, shown, 2)


def _share(part: dict) -> str:
    return " / ".join("-" if part[key] is None else f"{part[key]:.2f}" for key in ("precision", "recall"))


def _area(found: dict | None) -> str:
    return "-" if found is None else f"{found['auroc']:.2f} ({found['auroc_null'][1]:.2f}; {found['auroc_p']:.3f})"


def show_gates(runs: Sequence[Path], draws: int, out: Path | None, console: Console) -> None:
    """Print the table; with `out` also write it as JSON. Raises UserError."""
    if draws < 1:
        raise UserError(f"draws = {draws}: give a positive whole number")
    can_write(out)
    rows = [of_run(run, draws) for run in runs]
    print_wide(gates_table(rows, draws), console)
    if replayed := [row for row in rows if row["replayed"]]:
        print_wide(replay_table(replayed), console)
    write_result(out, rows)
