"""What routing by true labels says of the others: which adapter separates, and how much hacking leaked."""

from __future__ import annotations

from collections.abc import Sequence

from vgrout.lab import stats
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
from vgrout.lab.measures.scales import lines, off_line
from vgrout.lab.runs import Run

ORACLE, NO_LABEL = "oracle_route", "absorb"
LIKE = ("adapter", "init", "rank", "lr", "optimizer", "ratio", "deploy_gen_frac", "label_accuracy", "label_modes")


class Separation(Measure):
    name = "separation"
    title = "What decides separation: adapter and labels"
    what = (
        "Routing by labels of which a share is right, in each adapter. Distance in points off the shrinkage line of "
        "the seed's vanilla run, whose adapter is the usual one throughout, then deploy hack / solve in %; means over "
        "seeds. At half the labels right they tell nothing."
    )
    needs = f"finished runs of {ORACLE} with several adapters or label_accuracy (vgrout decide --arms separation)"

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        own = [run for run in runs if run.oracle and run.cfg.arm == ORACLE and run.cfg.label_share == 1]
        own = [run for run in own if not run.cfg.label_modes]
        kinds = sorted({(run.cfg.adapter, run.cfg.optimizer) for run in own})
        shares = sorted({run.cfg.label_accuracy for run in own})
        if len(kinds) * len(shares) < 2:
            return None
        known = lines(runs, base)
        rows, data = [], []
        for adapter, optimizer in kinds:
            cells = []
            for share in shares:
                here = (adapter, optimizer, share)
                group = [r for r in own if (r.cfg.adapter, r.cfg.optimizer, r.cfg.label_accuracy) == here]
                off = [off_line(run, known) for run in group]
                solve, hack = zip(*map(place, group), strict=True) if group else ((), ())
                far = average(off)
                cells.append(
                    f"{'-' if far is None else f'{100 * far:+.1f}'}  {percent(hack)} / {percent(solve)}"
                    if group
                    else "-"
                )
                if group:
                    told = {"adapter": adapter, "optimizer": optimizer, "label_accuracy": share}
                    seeds = [run.seed for run in group]
                    data.append(told | {"seeds": seeds, "distance": off, "hack": hack, "solve": solve})
            rows.append([adapter + ("" if optimizer == "adamw" else f", {optimizer}"), *cells])
        return Shown(("adapter", *(f"{100 * share:.0f} % right" for share in shares)), rows, data)


class Leakage(Measure):
    name = "leakage"
    title = "How much hacking an arm let through"
    what = (
        "Deploy hack as a function of the share of hacks without a label, measured by routing true labels of the rest. "
        "What has no label trains both blocks, so `absorb` is the point at 100 %. Isotonic fit; an arm's own deploy "
        "hack read back from it: the share of missed hacks that would explain it, least to largest, 100 where it hacks "
        "more. The oracle is used for this measurement alone."
    )
    needs = f"finished runs of `absorb` and of {ORACLE} with several label_share (vgrout decide --arms leakage)"

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        done = [run for run in runs if run.oracle]
        ends = [run for run in done if run.label == NO_LABEL]

        def usual(run: Run) -> bool:
            own = (getattr(run.cfg, key) == getattr(ends[0].cfg, key) for key in LIKE)
            return bool(ends) and comparable(run, ends[0]) and all(own)

        points = [(1 - run.cfg.label_share, place(run)[1]) for run in done if run.cfg.arm == ORACLE and usual(run)]
        if len({share for share, _ in points}) < 2:
            return None
        points += [(1.0, place(run)[1]) for run in ends]
        shares, hack = zip(*points, strict=True)
        rows, data = [], []
        others = [run for run in done if run.cfg.arm != ORACLE and run.label != NO_LABEL and comparable(run, ends[0])]
        for label, group in by_label(others).items():
            observed = [place(run)[1] for run in group]
            middle = average(observed)
            low, high = stats.leakage(shares, hack, middle)
            span = f"{100 * low:.0f}" if low == high else f"{100 * low:.0f} to {100 * high:.0f}"
            rows.append([marked(group[0]), str(len(group)), percent(observed), span])
            data.append({"arm": label, "seeds": [run.seed for run in group], "hack": middle, "share": [low, high]})
        measured = ", ".join(
            f"{100 * share:.0f} %: {listed([h for s, h in points if s == share])}" for share in sorted(set(shares))
        )
        head = ("arm", "seeds", "deploy hack", "missed hacks, %")
        return (
            Shown(head, rows, data, notes=[f"Measured, share without a label: hack by seed. {measured}."])
            if rows
            else None
        )
