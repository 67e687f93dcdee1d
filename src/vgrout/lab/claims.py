"""What the runs of a preregistered decision show: each of its tests, and the conclusions that were written down.

p-values are there when every run of the decision has finished, and not before: no test is read on the way.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from vgrout.config import Config
from vgrout.lab import stats
from vgrout.lab.archive import VERDICT
from vgrout.lab.decide import BASE_FILE, DECISION, PLAN, TESTS
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.grid import named
from vgrout.lab.labels import modes_in_pairs, problems_of
from vgrout.lab.prereg import BASE, Claim, Decision, Sameness, concluded, read
from vgrout.lab.runs import Run, find
from vgrout.lab.source import tests_digest
from vgrout.lab.tables import can_write, number_table, print_wide, write_result
from vgrout.types import UserError

Hits1 = Float[np.ndarray, "P _"]  # 0 or 1 by problem and sample, NaN where there is no sample
VANILLA = "none"
FIELDS = {"hack": "hacked", "solve": "solved", "attempted": "attempted", "compile": "compiled"}  # of a verdict


@dataclass(frozen=True)
class Finding:
    """A test, or the solving half of one, of the first of `arms` against the others. Rates and differences are by seed,
    in the order of `seeds`. `p` is None where nothing may be claimed, `why` says then why; `shown` is whether the claim
    holds at the decision's alpha, in its sequence or family."""

    name: str
    kind: str  # primary, secondary, equivalence
    says: str
    arms: tuple[str, ...]
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


@dataclass(frozen=True)
class Experiment:
    """A decision with those of its runs that have finished and are what it says, by name; the rates of the untrained
    model; and what a reader has to know: deviations, runs that were left out, runs that were made otherwise."""

    decision: Decision
    runs: Mapping[str, Run]
    base: Mapping[str, float] | None
    remarks: Sequence[str]

    @property
    def wanted(self) -> int:
        return len(self.decision.arms) * len(self.decision.seeds)


def hits(run: Run, outcome: str, cell: str, without: Collection[str] = ()) -> tuple[list[str], Hits1]:
    """Problems of a finished run's final evaluation but those of some modes, and their verdicts by sample; NaN where a
    problem has fewer samples. Raises UserError where the run has no oracle, or no problem is left."""
    mode = {p.id: p.mode for p in problems_of(run.cfg, "test", run.provenance)}
    by_problem: dict[str, list[bool]] = {}
    for row in run.evaluated(cell):
        if mode[row["problem"]] not in without:
            by_problem.setdefault(row["problem"], []).append(row[VERDICT + FIELDS[outcome]])
    if not by_problem:
        raise UserError(f"{run.folder} has no rollout of {cell} on problems of other modes than {', '.join(without)}")
    ids = sorted(by_problem)
    out = np.full((len(ids), max(map(len, by_problem.values()))), np.nan)
    for i, problem in enumerate(ids):
        out[i, : len(by_problem[problem])] = by_problem[problem]
    return ids, out


def _found(made: Experiment, test: Claim | Sameness, kind: str) -> Finding:
    decision, runs = made.decision, made.runs
    shown = modes_in_pairs(decision.base().pairs) if test.modes == "unseen" else set()

    def stacked(arms: Sequence[str], seeds: Sequence[int], outcome: str) -> tuple[list[list[str]], stats.Hits]:
        """Arms side by side, as samples of one, and the problems of each of their runs."""
        found = [[hits(runs[f"{arm}-s{s}"], outcome, HEADLINE, shown) for arm in arms] for s in seeds]
        tables = [np.concatenate([table for _, table in row], axis=1) for row in found]
        return [ids for row in found for ids, _ in row], stats.stacked(tables)

    def measured(control: Sequence[str], outcome: str, p_of, says: str, solve: Finding | None = None) -> Finding:
        against_base = tuple(control) == (BASE,)
        arms = (test.arm,) if against_base else (test.arm, *control)
        seeds = tuple(s for s in decision.seeds if all(f"{label}-s{s}" in runs for label in arms))
        why = _why(made)
        facts = {"name": test.name, "kind": kind, "says": says, "arms": (test.arm, *control), "seeds": seeds}
        facts |= {"why": why, "solve": solve}
        if not seeds or (against_base and made.base is None):
            empty = dict.fromkeys(("mean", "low", "high", "hodges_lehmann", "cliffs_delta", "p", "adjusted", "shown"))
            return Finding(**facts | {"seeds": ()}, arm=(), control=(), **empty)
        asked, arm = stacked((test.arm,), seeds, outcome)
        ours = stats.rates(arm)
        if against_base:
            theirs = np.full(len(seeds), made.base[outcome])
            low, high = (end - made.base[outcome] for end in stats.bootstrap(arm))
        else:
            others, against = stacked(control, seeds, outcome)
            if any(ids != asked[0] for ids in (*asked, *others)):
                raise UserError(f"{test.name}: runs of {', '.join(arms)} were not evaluated on the same problems")
            theirs = stats.rates(against)
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


def _why(made: Experiment) -> str:
    """Why nothing may be claimed yet, or at all; '' where something may."""
    seeds = len(made.decision.seeds)
    if len(made.runs) < made.wanted or made.base is None:
        return f"{len(made.runs)} of {made.wanted} runs: descriptive only"
    if seeds < stats.LEAST:
        return f"{seeds} seeds: descriptive only"
    least = stats.smallest_p(seeds, "less")
    return f"{seeds} seeds give no p below {least:.3g}" if least > made.decision.alpha else ""


def _both(finding: Finding) -> float | None:
    """p of a claim with its solving half: both must hold, so the larger counts."""
    parts = [finding.p, *([finding.solve.p] if finding.solve else [])]
    return None if None in parts else max(parts)


def _judged(finding: Finding, p: float | None, shown: bool) -> Finding:
    return Finding(**{**vars(finding), "adjusted": p, "shown": None if p is None else shown})


def findings(made: Experiment) -> list[Finding]:
    """Every test. Raises UserError where runs were evaluated on different problems."""
    decision = made.decision
    primary = [_found(made, test, "primary") for test in decision.primary]
    ps = [_both(f) for f in primary]
    held = stats.in_sequence([1.0 if p is None else p for p in ps], decision.alpha)
    secondary = [_found(made, test, "secondary") for test in decision.secondary]
    adjusted = stats.holm({f.name: p for f in secondary if (p := _both(f)) is not None})
    same = [_found(made, test, "equivalence") for test in decision.equivalence]
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


def is_decided(folder: Path) -> bool:
    """Whether a folder is of an experiment whose decision was stored before its first run."""
    try:
        return "decision_sha256" in json.loads((folder / PLAN).read_text())
    except (OSError, ValueError, TypeError):
        return False


def base_cells(folder: Path) -> dict | None:
    """The untrained model's cells, where the experiment has evaluated it. Raises UserError."""
    try:
        return json.loads((folder / BASE_FILE).read_text())["cells"] if (folder / BASE_FILE).is_file() else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{folder / BASE_FILE} is damaged: {type(error).__name__}: {error}") from None


def experiment(folder: Path, runs: Sequence[Run]) -> Experiment:
    """The decision of `folder` with those of `runs` that lie in it and are what it says. Raises UserError where there
    is no decision, or its file is not the one whose hash was stored."""
    if not is_decided(folder):
        raise UserError(f"{folder} is no experiment of a preregistered decision: `vgrout decide --decision` makes one")
    decision = read(folder / DECISION)
    try:
        plan = {**json.loads((folder / PLAN).read_text())}
        base = base_cells(folder)
        rates = {what: float(base[HEADLINE][what]["mean"]) for what in FIELDS} if base else None
        settings = {key.removeprefix("config."): value for key, value in plan.items() if key.startswith("config.")}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{folder} is damaged: {type(error).__name__}: {error}") from None
    if plan.get("decision_sha256") != decision.sha256:
        raise UserError(f"{folder / DECISION} is not the decision that was stored before the first run")
    whole = Config.parse({"arm": VANILLA, "seed": 0, **settings}, folder / PLAN, grown=True)
    mine = {run.name: run for run in runs if run.folder.parent == folder and run.cells is not None}
    remarks = [f"deviates: {change}" for change in plan.get("deviations", ())]
    if plan.get(TESTS, tests_digest()) != tests_digest():
        remarks.append("the code of the tests is not that which was stored with the decision")
    if base is None:
        remarks.append("the untrained model is not evaluated yet")
    kept: dict[str, Run] = {}
    for variant in named(decision.arms):
        for seed in decision.seeds:
            run = mine.get(f"{variant.label}-s{seed}")
            if run is None:
                continue
            meant, told = (asdict(cfg) for cfg in (variant.config(whole, seed), run.cfg))
            other = [key for key in meant if key not in ("yoke", "threads") and meant[key] != told[key]]
            if other:
                remarks.append(f"{run.name} was left out: it has other {', '.join(other)}")
                continue
            kept[run.name] = run
            changed = [key for key in run.provenance if key in plan and run.provenance[key] != plan[key]]
            changed += ["settings, code or data on the way"] * ("drift" in run.provenance)
            if changed:
                remarks.append(f"{run.name} was made with other {', '.join(changed)}")
    return Experiment(decision, kept, rates, remarks)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def told(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """Every finding, and its solving half, as a line of a table."""
    rows = []
    for f in found:
        for part, name in ((f, f.name), (f.solve, f"{f.name}, solve")):
            if part is None:
                continue
            interval = "-" if part.low is None else f"[{_points(part.low)}, {_points(part.high)}]"
            rows.append(
                {
                    "name": name,
                    "says": part.says,
                    "shown": f.shown,
                    "verdict": {True: "shown", False: "not shown", None: f.why or "-"}[f.shown] if part is f else "",
                    "seeds": len(part.seeds),
                    "arms": list(part.arms),
                    "differences": " ".join(_points(d) for d in part.differences) or "-",
                    "mean": _points(part.mean),
                    "interval": interval,
                    "hodges_lehmann": _points(part.hodges_lehmann),
                    "delta": "-" if part.cliffs_delta is None else f"{part.cliffs_delta:+.2f}",
                    "p": _p(part.p),
                    "adjusted": _p(f.adjusted) if part is f else "-",
                }
            )
    return rows


HEAD = ("test", "claim", "verdict", "seeds", "differences by seed", "mean", "95 %", "HL", "delta", "p", "p in family")
SHOWN = ("name", "says", "verdict", "seeds", "differences", "mean", "interval", "hodges_lehmann", "delta", "p")


def show_claims(out: Path, result: Path | None, console: Console) -> None:
    """Print every test of an experiment and what follows, and write it to `result` as JSON. Raises UserError."""
    can_write(result)
    runs, unread = find([out])
    made = experiment(out, runs)
    decision = made.decision
    for reason in unread.values():
        console.print(f"could not be read: {reason}", style="yellow", markup=False, soft_wrap=True)
    found = findings(made)
    caption = "Differences of rates in points, arm - control. p: exact sign-flip over seeds, one-sided."
    caption += "".join(f" {remark}." for remark in made.remarks)
    rows = [[str(row[key]) for key in (*SHOWN, "adjusted")] for row in told(found)]
    print_wide(number_table(decision.question, caption, HEAD, rows, 3), console)
    said = conclusions(decision, found)
    for text in said:
        console.print(text, markup=False, soft_wrap=True)
    every = {"decision_sha256": decision.sha256, "findings": [asdict(f) for f in found], "conclusions": said}
    write_result(result, every)
