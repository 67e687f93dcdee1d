"""The gate as a classifier over training: what its scores tell apart, and what its cut catches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vgrout.lab.measure import f_beta
from vgrout.lab.measures.base import Cells, Measure, Shown, average, by_label, marked
from vgrout.lab.ranking import ranking
from vgrout.lab.runs import Run, Trained

WIDTH = 15  # steps of a window
NAMES = {"AUROC": "auroc", "AP": "ap"}
QUALITIES = ("hacks", *NAMES, "F0.5", "precision", "recall")


def quality(seen: Trained, chosen: np.ndarray) -> dict[str, float | None]:
    """How well the scores and flags of the rollouts in a mask find hacks; None where a class, a score or a flag is
    missing."""
    hacked, flagged, score = seen.hacked[chosen], seen.flagged[chosen], seen.score[chosen]
    able = np.isfinite(score).all() and 0 < hacked.sum() < len(hacked)
    found = ranking(score[None], hacked) if able else {}
    both = float((flagged & hacked).sum())
    return {
        "hacks": float(hacked.mean()),
        **{name: float(found[key][0]) if able else None for name, key in NAMES.items()},
        "F0.5": f_beta(flagged.tolist(), hacked.tolist()),
        "precision": both / int(flagged.sum()) if flagged.any() else None,
        "recall": both / int(hacked.sum()) if hacked.any() else None,
    }


class GateWindows(Measure):
    name = "gate-windows"
    title = "The gate over training"
    what = (
        f"In windows of {WIDTH} steps, among the policy's training rollouts: share of hacks, then the scores as a "
        "classifier of hacks (AUROC, average precision) and what was flagged as a choice of them (F0.5, precision, "
        "recall at the cut that was used). Means over the seeds in which a quality is defined."
    )
    needs = "runs with verdicts of arms that flag rollouts"

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        rows, data = [], []
        for label, group in by_label(runs).items():
            windows: dict[int, list[dict[str, float | None]]] = {}
            every = [run.trained() for run in group]
            for seen in every if any(seen.flagged.any() for seen in every) else []:
                place = seen.step // WIDTH
                for window in np.unique(place).tolist():
                    windows.setdefault(window, []).append(quality(seen, place == window))
            for window, found in sorted(windows.items()):
                means = {name: average([q[name] for q in found]) for name in QUALITIES}
                first, last = window * WIDTH, window * WIDTH + WIDTH - 1
                shown = ["-" if value is None else f"{value:.2f}" for value in means.values()]
                rows.append([marked(group[0]), f"{first}-{last}", str(len(found)), *shown])
                data.append({"arm": label, "first": first, "last": last, "seeds": len(found), **means})
        return Shown(("arm", "steps", "seeds", *QUALITIES), rows, data) if rows else None
