"""`vgrout direction export` and `vgrout direction check`: a direction on stored rollouts, against random ones.

The null is the placebo itself: Haar-random directions of the same shape, standardised with the same pairs and averaged
over the same modules. Two directions are checked: that of the gate file, on every step of the trace, and what each step
was scored along, which a run draws anew every `refresh_every` steps.
Read by nobody that trains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from vgrout.config import Config
from vgrout.lab.gatefile import HASHES, NAME, GateFile, direction_of, gate_meta, load_gate, save_gate
from vgrout.lab.labels import Labelled, read_labelled, windows
from vgrout.lab.ranking import MEASURES, chance, ranking
from vgrout.lab.record import one_writer, read_jsonl
from vgrout.lab.run import make_policy, newest
from vgrout.lab.tables import can_write, number_table, print_wide, write_result
from vgrout.lab.trace import FOLDER, Trace, init_digest, read_traces
from vgrout.method.direction import Direction, haar_like
from vgrout.types import UserError

ALL = "all"
LEAST = 3  # hacks and others that a cell needs
LIKE = ("features", "score_loss")  # of gate and trace: one scores the other's rollouts
CHUNK = 250  # draws scored at once


def export(run: Path, out: Path | None = None) -> Path:
    """Write the gate of a run, finished or not, from its newest checkpoint; the file's path.

    Raises UserError where there is no checkpoint, or no direction in it.
    """
    cfg = Config.read(run / "config.json")
    if out is not None and out.exists():
        raise UserError(f"{out} exists: give another name")
    with one_writer(run):
        start = newest(run)
        direction = None if start is None else direction_of(start.state)
        if start is None or direction is None:
            raise UserError(f"{run} has no checkpoint with a direction: {cfg.arm} scores along none, or has not begun")
        adapter = make_policy(cfg).adapter
        last = [s for s in read_jsonl(run / "steps.jsonl") if s["step"] < start.step][-1:]
        provenance = json.loads((run / "provenance.json").read_text())
        meta = gate_meta(cfg, provenance, init_digest(adapter), list(adapter.modules), last[0] if last else None)
        path = out or run / NAME
        try:
            save_gate(path, direction, meta)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        return path


def draw_scores(
    unit: Float[Tensor, "N M R"], pairs: Float[Tensor, "C2 M R"], v: Float[Tensor, "D M *K R"]
) -> Float[Tensor, "D N"]:
    """What `calibrate` and `Direction.score` give for each of D directions."""
    out = []
    for part in v.split(CHUNK):
        at_pairs, at_rows = (_many_cosines(normalize(g, dim=-1), part) for g in (pairs, unit))
        sd = at_pairs.std(1).clamp(min=1e-8)
        out.append(((at_rows - at_pairs.mean(1)[:, None]) / sd[:, None]).mean(-1))
    return torch.cat(out)


def _many_cosines(unit: Float[Tensor, "N M R"], v: Float[Tensor, "D M *K R"]) -> Float[Tensor, "D N M"]:
    if v.ndim == 3:
        return torch.einsum("nmr,dmr->dnm", unit, v)
    along = torch.einsum("nmr,dmkr->dnmk", unit, v)
    return along.clamp(min=0).norm(dim=-1) - along.clamp(max=0).norm(dim=-1)


def haar_draws(v: Float[Tensor, "M *K R"], count: int) -> Float[Tensor, "D M *K R"]:
    """Random directions of the shape of `v`, of seeds 0, 1, ..."""
    return torch.stack([haar_like(v, seed) for seed in range(count)])


def scored(traces: Sequence[Trace], labelled: Labelled, draws: int, gate: Direction | None) -> np.ndarray:
    """[1 + draws, rollouts]: scores of a direction and of random ones, for the labelled rollouts in their order.

    `gate` is one direction for all steps; None: that of each step.
    """
    place = {id: i for i, id in enumerate(labelled.id)}
    out = np.full((1 + draws, len(place)), np.nan, np.float32)
    random: Tensor | None = None
    for trace in traces:
        rows = [i for i, id in enumerate(trace.ids) if id in place]
        direction = trace.direction if gate is None else gate
        unit = trace.unit[rows]
        at = [place[trace.ids[i]] for i in rows]
        out[0, at] = direction.score(unit)[0].numpy()
        if draws:
            random = haar_draws(direction.v, draws) if random is None else random
            out[1:, at] = draw_scores(unit, direction.pairs, random).numpy()
    return out


def traced(run: Path) -> tuple[list[Trace], Labelled]:
    """A run's traces, and its labelled rollouts that are in them."""
    traces, labelled = read_traces(run), read_labelled(run)
    known = {id for trace in traces for id in trace.ids}
    return traces, labelled.take(np.array([id in known for id in labelled.id]))


def cells(labelled: Labelled, width: int) -> list[tuple[tuple[int, int], str, np.ndarray]]:
    """(steps, mode, mask) of every window and mode with enough of both classes; the whole trace first."""
    steps = labelled.step.tolist()
    spans = list(dict.fromkeys((*windows(steps, 0), *windows(steps, width))))
    out = []
    for first, last in spans:
        inside = (labelled.step >= first) & (labelled.step <= last)
        for mode in (ALL, *sorted(set(labelled.mode))):
            mask = inside if mode == ALL else inside & (labelled.mode == mode)
            if min(labelled.hacked[mask].sum(), (~labelled.hacked[mask]).sum()) >= LEAST:
                out.append(((first, last), mode, mask))
    return out


def compare(score: np.ndarray, hacked: np.ndarray) -> dict:
    """The measures of the first score, of the others their mean and 95th percentile, and p."""
    found = ranking(score, hacked)
    out: dict = {}
    for key in MEASURES:
        value, null = float(found[key][0]), found[key][1:]
        out[key] = round(value, 6)
        out[f"{key}_null"] = [round(float(null.mean()), 6), round(float(np.quantile(null, 0.95)), 6)]
        out[f"{key}_p"] = round(chance(value, null), 6)
    return out


def fits(gate: GateFile, traces: Sequence[Trace], run: Path) -> None:
    """Raises UserError where a gate's coordinates are not those of a trace: other modules, adapter init, model, or
    features of another kind."""
    provenance = json.loads((run / "provenance.json").read_text())
    there = {
        **{key: provenance.get(key) for key in HASHES},
        **{k: traces[0].meta[k] for k in ("modules", "init_sha256", *LIKE)},
    }
    wrong = [key for key in ("modules", "init_sha256", "model_sha256", *LIKE) if gate.meta[key] != there[key]]
    if wrong:
        raise UserError(f"the gate does not fit the trace of {run}: other {', '.join(wrong)}")


def check(gate: Path, trace: Path, *, draws: int, window: int) -> dict:
    """What `vgrout direction check` shows, JSON-ready. `trace`: a run's folder, or the trace folder in it.

    Raises UserError where gate and trace do not fit, there are no labels, or no cell has enough of both classes.
    """
    if draws < 1:
        raise UserError(f"draws = {draws}: give a positive whole number")
    if window < 0:
        raise UserError(f"window = {window}: give a number of steps, or 0 for no windows")
    run = trace.parent if trace.name == FOLDER else trace
    file = load_gate(gate)
    traces, labelled = traced(run)
    fits(file, traces, run)
    if any(t.direction.pairs is None for t in traces) or file.direction.pairs is None:
        raise UserError("gate or trace does not hold its pairs' features: random directions cannot be standardised")
    shown = cells(labelled, window)
    if not shown:
        raise UserError(
            f"{run}: {int(labelled.hacked.sum())} hacks among {len(labelled.id)} traced rollouts are too few"
        )
    rows = []
    for name, direction in (("gate file", file.direction), ("of each step", None)):
        score = scored(traces, labelled, draws, direction)
        for (first, last), mode, mask in shown:
            counts = {"rollouts": int(mask.sum()), "hacks": int(labelled.hacked[mask].sum())}
            cell = {"direction": name, "steps": [first, last], "mode": mode, **counts}
            rows.append(cell | compare(score[:, mask], labelled.hacked[mask]))
    used = sorted({t.meta["step"] for t in traces})
    return {
        "gate": {k: file.meta[k] for k in ("arm", "seed", "steps", "direction", "score_state", "policy", "thresholds")},
        "trace": {
            "steps": [used[0], used[-1]],
            "traced": len(used),
            **{k: traces[0].meta[k] for k in ("arm", "score_state")},
        },
        "draws": draws,
        "least_p": round(1 / (1 + draws), 6),
        "cells": rows,
    }


def check_table(result: dict) -> Table:
    """Every cell with p against random directions."""
    caption = (
        f"{result['draws']} Haar-random directions through the same scoring; p = (1 + as good) / (1 + draws). "
        "In brackets the 95th percentile of chance. F0.5: at the best cut. Measured with the oracle."
    )
    head = ("direction", "mode", "steps", "rollouts", "hacks", "AUROC", "p", "AP", "p", "F0.5", "p")
    rows = []
    for cell in result["cells"]:
        first, last = cell["steps"]
        row = [cell["direction"], cell["mode"], f"{first}-{last}", str(cell["rollouts"]), str(cell["hacks"])]
        for key in MEASURES:
            row += [f"{cell[key]:.2f} ({cell[f'{key}_null'][1]:.2f})", f"{cell[f'{key}_p']:.3f}"]
        rows.append(row)
    return number_table("directions on stored rollouts of the policy", caption, head, rows, 2)


def show_check(gate: Path, trace: Path, draws: int, window: int, out: Path | None, console: Console) -> None:
    can_write(out)
    result = check(gate, trace, draws=draws, window=window)
    print_wide(check_table(result), console)
    write_result(out, result)
    if out is not None:
        console.print(f"{out}")
