"""What the runs of a preregistered decision show: each of its tests, and the conclusions that were written down.

p-values are there when every seed of the decision has its runs, and not before: no test is read on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich.console import Console

from vgrout.envs.micro import problems
from vgrout.lab import stats
from vgrout.lab.archive import VERDICT
from vgrout.lab.decide import DECISION, PLAN
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.labels import modes_in_pairs
from vgrout.lab.prereg import Claim, Decision, Sameness, concluded, read
from vgrout.lab.run import MICRO
from vgrout.lab.runs import Run, find
from vgrout.lab.tables import can_write, number_table, print_wide, write_result
from vgrout.types import UserError

FIELDS = {"hack": "hacked", "solve": "solved", "attempted": "attempted", "compile": "compiled"}  # of a verdict


@dataclass(frozen=True)
class Finding:
    """A test, or the solving half of one. Rates and differences are by seed, in the order of `seeds`. `p` is None where
    nothing may be claimed, `why` says then why; `shown` is whether the claim holds at the decision's alpha, in its
    sequence or family."""

    name: str
    kind: str  # primary, secondary, equivalence
    says: str
    seeds: tuple[int, ...]
    arm: tuple[float, ...]
    control: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    hodges_lehmann: float | None
    cliffs_delta: float | None
    p: float | None
    adjusted: float | None
    shown: bool | None
    why: str
    solve: Finding | None = None

    @property
    def differences(self) -> list[float]:
        return [a - c for a, c in zip(self.arm, self.control, strict=True)]


def hits(run: Run, outcome: str, cell: str, modes: str = "all") -> Float[np.ndarray, "P K"]:
    """Verdicts of a finished run's final evaluation by problem and sample; NaN where a problem has fewer samples.

    Raises UserError where the run is none of micro, or no problem has such a mode.
    """
    if run.cfg.env != MICRO:
        raise UserError(f"{run.folder} is of {run.cfg.env}, which has no oracle")
    mode = {p.id: p.mode for p in problems("test")}
    shown = modes_in_pairs(run.cfg.pairs) if modes == "unseen" else set()
    by_problem: dict[str, list[bool]] = {}
    for row in run.evaluated(cell):
        if mode[row["problem"]] not in shown:
            by_problem.setdefault(row["problem"], []).append(row[VERDICT + FIELDS[outcome]])
    if not by_problem:
        raise UserError(f"{run.folder} has no rollout of {cell} on problems of {modes} modes")
    out = np.full((len(by_problem), max(map(len, by_problem.values()))), np.nan)
    for i, problem in enumerate(sorted(by_problem)):
        out[i, : len(by_problem[problem])] = by_problem[problem]
    return out


def _found(decision: Decision, test: Claim | Sameness, kind: str, done: Mapping[str, Run]) -> Finding:
    def complete(control: Sequence[str]) -> tuple[int, ...]:
        arms = (test.arm, *control)
        return tuple(s for s in decision.seeds if all(f"{label}-s{s}" in done for label in arms))

    def stacked(arms: Sequence[str], seeds: Sequence[int], outcome: str) -> stats.Hits:
        """Arms side by side, as samples of one."""
        tables = [[hits(done[f"{arm}-s{s}"], outcome, HEADLINE, test.modes) for arm in arms] for s in seeds]
        return stats.stacked([np.concatenate(row, axis=1) for row in tables])

    def measured(control: Sequence[str], outcome: str, p_of, says: str, solve: Finding | None = None) -> Finding:
        seeds = complete(control)
        why = _why(seeds, decision)
        facts = {"name": test.name, "kind": kind, "says": says, "seeds": seeds, "why": why, "solve": solve}
        if not seeds:
            empty = dict.fromkeys(("mean", "low", "high", "hodges_lehmann", "cliffs_delta", "p", "adjusted", "shown"))
            return Finding(**facts, arm=(), control=(), **empty)
        arm, against = (stacked(arms, seeds, outcome) for arms in ((test.arm,), control))
        ours, theirs = stats.rates(arm), stats.rates(against)
        low, high = stats.bootstrap(arm, against)
        return Finding(
            **facts,
            arm=tuple(map(float, ours)),
            control=tuple(map(float, theirs)),
            mean=float((ours - theirs).mean()),
            low=low,
            high=high,
            hodges_lehmann=stats.hodges_lehmann(ours - theirs),
            cliffs_delta=stats.cliffs_delta(ours, theirs),
            p=None if why else p_of(ours - theirs),
            adjusted=None,
            shown=None,
        )

    if isinstance(test, Sameness):
        return measured(test.control, test.outcome, lambda d: stats.equivalent(d, test.margin), test.says)
    solve = None
    if test.solve:
        margin = test.solve.margin
        says = f"solves no less than {' and '.join(test.solve.control)} by more than {margin:g}"
        solve = measured(test.solve.control, "solve", lambda d: stats.not_worse(d, margin), says)
    return measured(test.control, test.outcome, lambda d: stats.sign_flip(d, test.side), test.says, solve)


def _why(seeds: Sequence[int], decision: Decision) -> str:
    """Why nothing may be claimed from these seeds; '' where something may."""
    if len(seeds) < len(decision.seeds):
        return f"{len(seeds)} of {len(decision.seeds)} seeds: descriptive only"
    if len(seeds) < stats.LEAST:
        return f"{len(seeds)} seeds: descriptive only"
    least = stats.smallest_p(len(seeds), "less")
    return f"{len(seeds)} seeds give no p below {least:.3g}" if least > decision.alpha else ""


def _both(finding: Finding) -> float | None:
    """p of a claim with its solving half: both must hold, so the larger counts."""
    parts = [finding.p, *([finding.solve.p] if finding.solve else [])]
    return None if None in parts else max(parts)


def _judged(finding: Finding, p: float | None, shown: bool) -> Finding:
    return Finding(**{**vars(finding), "adjusted": p, "shown": None if p is None else shown})


def findings(decision: Decision, runs: Sequence[Run]) -> list[Finding]:
    """Every test on those of the runs that have finished. Raises UserError."""
    done = {run.name: run for run in runs if run.cells is not None}
    primary = [_found(decision, test, "primary", done) for test in decision.primary]
    ps = [_both(f) for f in primary]
    held = stats.in_sequence([1.0 if p is None else p for p in ps], decision.alpha)
    secondary = [_found(decision, test, "secondary", done) for test in decision.secondary]
    known = {f.name: p for f in secondary if (p := _both(f)) is not None}
    adjusted = stats.holm(known)
    same = [_found(decision, test, "equivalence", done) for test in decision.equivalence]
    return [
        *(_judged(f, p, h) for f, p, h in zip(primary, ps, held, strict=True)),
        *(_judged(f, adjusted.get(f.name), adjusted.get(f.name, 1.0) <= decision.alpha) for f in secondary),
        *(_judged(f, f.p, f.p is not None and f.p <= decision.alpha) for f in same),
    ]


def conclusions(decision: Decision, found: Sequence[Finding]) -> list[str]:
    """What follows, in the words that were written down. One sentence says so where tests are open, or none fits."""
    if any(f.shown is None for f in found):
        return ["Nothing is concluded: not every test can be read."]
    said = concluded(decision, [f.name for f in found if f.shown])
    return said or ["None of the conclusions that were written down fits."]


def verified(folder: Path) -> tuple[Decision, list[str]]:
    """The decision that an experiment was made for, and what its runs deviate from it in. Raises UserError where there
    is none, or its file is not the one whose hash was stored."""
    decision = read(folder / DECISION)
    try:
        plan = {**json.loads((folder / PLAN).read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {folder / PLAN}: {error}") from None
    if plan.get("decision_sha256") != decision.sha256:
        raise UserError(f"{folder / DECISION} is not the decision that was stored before the first run")
    return decision, list(plan.get("deviations", ()))


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _rows(found: Sequence[Finding]) -> list[list[str]]:
    rows = []
    for f in found:
        for part, name in ((f, f.name), (f.solve, f"{f.name}, solve")):
            if part is None:
                continue
            interval = "-" if part.low is None else f"[{_points(part.low)}, {_points(part.high)}]"
            verdict = {True: "shown", False: "not shown", None: part.why or "-"}[f.shown]
            rows.append(
                [
                    name,
                    part.says,
                    verdict if part is f else "",
                    str(len(part.seeds)),
                    " ".join(_points(d) for d in part.differences) or "-",
                    _points(part.mean),
                    interval,
                    _points(part.hodges_lehmann),
                    "-" if part.cliffs_delta is None else f"{part.cliffs_delta:+.2f}",
                    "-" if part.p is None else f"{part.p:.4f}",
                    "-" if f.adjusted is None or part is not f else f"{f.adjusted:.4f}",
                ]
            )
    return rows


HEAD = ("test", "claim", "verdict", "seeds", "differences by seed", "mean", "95 %", "HL", "delta", "p", "p in family")


def show_claims(out: Path, result: Path | None, console: Console) -> None:
    """Print every test of an experiment and what follows, and write it to `result` as JSON. Raises UserError."""
    can_write(result)
    decision, deviations = verified(out)
    runs, unread = find([out])
    for reason in unread.values():
        console.print(f"could not be read: {reason}", style="yellow", markup=False, soft_wrap=True)
    found = findings(decision, runs)
    caption = "Differences of rates in points, arm - control. p: exact sign-flip over seeds, one-sided."
    caption += "".join(f" Deviates: {change}." for change in deviations)
    print_wide(number_table(decision.question, caption, HEAD, _rows(found), 3), console)
    said = conclusions(decision, found)
    for text in said:
        console.print(text, markup=False, soft_wrap=True)
    told: Mapping = {"decision_sha256": decision.sha256, "findings": [asdict(f) for f in found], "conclusions": said}
    write_result(result, told)
