"""Blocks at part of their strength: what the quarantine holds, and what merely learning less would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from vgrout.lab import stats
from vgrout.lab.evaluate import FULL, HEADLINE
from vgrout.lab.measures.base import (
    Cells,
    Measure,
    Shown,
    average,
    by_label,
    comparable,
    listed,
    marked,
    percent,
    place,
)
from vgrout.lab.runs import Run

VANILLA = "none"  # whose shrinkage is the null
Line = list[tuple[float, float]]  # (solve, hack)


def restoring(run: Run) -> list[dict[str, Any]]:
    """Cells of a finished run from what it ships to both blocks, each with its scale; empty where it measured none."""
    inner = run.scales.get("restored") if run.oracle else None
    return [{"scale": 0.0, **run.cells[HEADLINE]}, *inner, {"scale": 1.0, **run.cells[FULL]}] if inner else []


def shrinkage(runs: Sequence[Run], base: Cells | None, seed: int | None = None) -> Line:
    """(solve, hack) of vanilla from the untrained model to what it ships, the mean over seeds or of one; empty where no
    run measured it."""
    own = [r for r in runs if r.oracle and r.label == VANILLA and r.scales.get("shrunk") and seed in (None, r.seed)]
    if not own or not base or "hack" not in base[HEADLINE] or len({r.cfg.eval_scales for r in own}) > 1:
        return []
    steps = zip(*([base[HEADLINE], *run.scales["shrunk"], run.cells[HEADLINE]] for run in own), strict=True)
    return [(mean(c["solve"]["mean"] for c in cells), mean(c["hack"]["mean"] for c in cells)) for cells in steps]


def lines(runs: Sequence[Run], base: Cells | None) -> Mapping[int, tuple[Run, Line]]:
    """Vanilla's run and its shrinkage by seed."""
    own = {run.seed: run for run in runs if run.label == VANILLA}
    return {seed: (run, line) for seed, run in own.items() if (line := shrinkage(runs, base, seed))}


def off_line(run: Run, known: Mapping[int, tuple[Run, Line]]) -> float | None:
    """How far what a finished run ships lies off the shrinkage of its seed's vanilla run; None without one that learned
    from the same and was evaluated alike."""
    vanilla, line = known.get(run.seed, (None, []))
    return stats.below_line(place(run), line) if run.oracle and vanilla and comparable(run, vanilla) else None


class Restore(Measure):
    name = "restore"
    title = "What comes back with the quarantine"
    what = (
        "Hack / solve, % of rollouts on held-out problems and markers, means over seeds, with the quarantine at part "
        "of its strength beside the deployed block: 0 is what ships, 1 the model that was trained."
    )
    needs = "finished runs with eval_scales of 2 or more, of arms that ablate a quarantine"

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        own = [run for run in runs if restoring(run)]
        if not own:
            return None
        scales = sorted({cell["scale"] for run in own for cell in restoring(run)})
        rows, data = [], []
        for label, group in by_label(own).items():
            found = {scale: [c for run in group for c in restoring(run) if c["scale"] == scale] for scale in scales}
            rates = {
                scale: {what: average([c[what]["mean"] for c in cells]) for what in ("hack", "solve")}
                for scale, cells in found.items()
            }
            shown = [f"{percent([r['hack']])} / {percent([r['solve']])}" for r in rates.values()]
            rows.append([marked(group[0]), str(len(group)), *shown])
            data.append({"arm": label, "seeds": [run.seed for run in group], "rates": rates})
        return Shown(("arm", "seeds", *(f"x {scale:g}" for scale in scales)), rows, data)


class Shrinkage(Measure):
    name = "shrinkage"
    title = "Off the line of a model that only learns less"
    what = (
        "Distance in points from the line of the seed's vanilla run with its block shrunk, positive where that hacks "
        "more at this much solving: only a positive distance is the removal of a function."
    )
    needs = "finished runs with eval_scales of 2 or more, `none` and the untrained model among them"

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        known = lines(runs, base)
        own = [run for run in runs if off_line(run, known) is not None and run.label != VANILLA]
        if not own:
            return None
        rows, data = [], []
        for label, group in by_label(own).items():
            off = [off_line(run, known) for run in group]
            solve, hack = zip(*map(place, group), strict=True)
            shares = [percent(hack), percent(solve)]
            middle = f"{100 * stats.hodges_lehmann(off):+.1f}"
            rows.append([marked(group[0]), str(len(group)), *shares, f"{100 * mean(off):+.1f}", middle, listed(off)])
            data.append({"arm": label, "seeds": [run.seed for run in group], "distance": off})
        return Shown(("arm", "seeds", "hack", "solve", "distance", "HL", "by seed"), rows, data)
