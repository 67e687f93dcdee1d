"""`vgrout report`: one page about runs that opens from disk, without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from vgrout.lab import explorer, stats
from vgrout.lab.checkpoint import replace_file
from vgrout.lab.claims import Finding, base_cells, conclusions, experiment, findings, hits, is_decided
from vgrout.lab.decide import COSTS, PLAN, passes
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.figures import Figure, altair, drawn, labels, shrinkage
from vgrout.lab.run import pairs_note, sandbox_note
from vgrout.lab.runs import Run, find, is_run
from vgrout.lab.tables import can_write
from vgrout.types import UserError

TEMPLATE, SCRIPT = "report.html.j2", "explorer.js"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _text(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _row(label: str, runs: Sequence[Run], lines: Mapping[int, Line]) -> dict[str, Any]:
    """A line of the arms' table: the finished runs of one arm. `lines` is vanilla's shrinkage by seed."""
    done = [run for run in runs if run.oracle]
    off = [stats.below_line(_place(run), lines[run.seed]) for run in done if run.seed in lines]
    row: dict[str, Any] = {
        "arm": label + (" *" if runs[0].reads_oracle else ""),
        "access": runs[0].access,
        "seeds": f"{len(done)} of {len(runs)}" if len(done) < len(runs) else str(len(done)),
        "auroc": _text(_mean([s.get("m_auroc") for run in runs for s in run.steps]), 2),
        "qmass": _text(_mean([s.get("qmass") for run in runs for s in run.steps]), 2),
        "cpu": _text(_mean([run.seconds.get("cpu") for run in runs])),
        "off": " ".join(_signed(d, 0) for d in off) or "-",
        "passes": passes({what: sum(s.get(what) or 0 for s in runs[0].steps) for what in COSTS}),
    }
    rates = {
        "full_hack": ("heldout_full", "hack"),
        "hack": (HEADLINE, "hack"),
        "solve": (HEADLINE, "solve"),
        "free": ("hintfree_deploy", "solve"),
    }
    for key, (cell, what) in rates.items():
        values = [run.cells[cell][what]["mean"] for run in done]
        row[key] = _text(_mean(values), scale=100)
        row[f"{key}_seeds"] = " ".join(_text(v, scale=100) for v in values)
        row[f"{key}_interval"] = ""
        if key in ("hack", "solve") and len(done) >= stats.LEAST:
            low, high = stats.bootstrap(stats.stacked([hits(run, what, HEADLINE)[1] for run in done]))
            row[f"{key}_interval"] = f"[{100 * low:.0f}, {100 * high:.0f}]"
    return row


Line = Sequence[tuple[float, float]]  # (solve, hack)


def _place(run: Run) -> tuple[float, float]:
    return run.cells[HEADLINE]["solve"]["mean"], run.cells[HEADLINE]["hack"]["mean"]


def _told(f: Finding) -> list[dict[str, Any]]:
    """A finding and its solving half as lines of the table."""
    rows = []
    for part in filter(None, (f, f.solve)):
        signed = {key: _signed(getattr(part, key)) for key in ("mean", "low", "high", "hodges_lehmann")}
        p = f.adjusted if part is f else part.p
        rows.append(
            {
                "name": f.name if part is f else f"{f.name}, solve",
                "says": part.says,
                "shown": f.shown,
                "verdict": {True: "shown", False: "not shown", None: f.why}[f.shown] if part is f else "",
                "seeds": len(part.seeds),
                "mean": signed["mean"],
                "interval": "-" if part.low is None else f"[{signed['low']}, {signed['high']}]",
                "hodges_lehmann": signed["hodges_lehmann"],
                "delta": "-" if part.cliffs_delta is None else f"{part.cliffs_delta:+.2f}",
                "p": "-" if p is None else f"{p:.4f}",
            }
        )
    return rows


def _signed(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{round(100 * value, digits) + 0.0:+.{digits}f}"  # no -0


def _shared(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings that all runs have, and those of each run that differ, by its name."""
    told = {run.name: asdict(run.cfg) for run in runs}
    first = next(iter(told.values()))
    same = {key: value for key, value in first.items() if all(t[key] == value for t in told.values())}
    hidden = {"arm", "seed", "yoke", *same}
    own = {
        name: ", ".join(f"{key} = {value}" for key, value in values.items() if key not in hidden) or "-"
        for name, values in told.items()
    }
    return same, own


def _provenance(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the runs were made with; where they differ, each value with how many runs have it."""
    keys = dict.fromkeys(key for run in runs for key in run.provenance)
    out = []
    for key in keys:
        values = [json.dumps(run.provenance.get(key)).strip('"') for run in runs]
        counts = {value: values.count(value) for value in dict.fromkeys(values) if value != "null"}
        text = next(iter(counts)) if len(counts) == 1 else "; ".join(f"{v} ({n} runs)" for v, n in counts.items())
        out.append((key, text))
    return out


def _home(paths: Sequence[Path]) -> Path | None:
    """The folder of the experiment that the runs belong to: one that was given, or the one around a run that was."""
    places = [path.parent if is_run(path) else path for path in paths]
    return next((folder for folder in places if (folder / PLAN).is_file()), None)


def page(paths: Sequence[Path], limit: int = explorer.LIMIT) -> tuple[str, list[Figure], dict[Path, str]]:
    """The report as HTML with up to about `limit` rollouts, its figures, and why runs could not be read. Raises
    UserError."""
    try:
        import jinja2
    except ImportError:
        raise UserError("a report needs jinja2: pip install 'vgrout[report]'") from None
    altair()
    runs, unread = find(paths)
    if not any(run.steps for run in runs):
        raise UserError(f"no run in {', '.join(map(str, paths))} has done a step yet")
    home = _home(paths)
    base = base_cells(home) if home else None
    figures = drawn(runs, base)
    done = [run for run in runs if run.oracle]
    lines = {run.seed: line for run in done if (line := shrinkage(done, base, run.seed))}
    same, own = _shared(runs)
    by_arm: Mapping[str, list[Run]] = {label: [r for r in runs if r.label == label] for label in labels(runs)}
    seeds = sorted({run.seed for run in runs})
    notes = [f"Could not be read: {reason}" for reason in unread.values()]
    notes += [text for run in runs if (text := sandbox_note(run.provenance))][:1]
    notes += [text for run in runs if (text := pairs_note(run.provenance))][:1]
    told: dict[str, Any] = {"title": f"vGROUT: {', '.join(by_arm)}", "conclusions": [], "deviations": []}
    if home is not None and is_decided(home):
        made = experiment(home, runs)
        decision, found = made.decision, findings(made)
        told |= {"title": decision.question, "decision": decision, "deviations": made.remarks}
        told |= {"conclusions": conclusions(decision, found), "findings": [row for f in found for row in _told(f)]}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = (files("vgrout") / "data" / TEMPLATE).read_text()
    markup = jinja2.utils.markupsafe.Markup
    held = explorer.table(runs, limit)
    every, count = held["every"], len(held["columns"]["run"])
    which = "Every rollout" if held["whole"] else f"Of training one step in {every}; of the final evaluation what ships"
    html = environment.from_string(text).render(
        **told,
        explorer={
            "note": f"{which}: {count:,}.",
            "data": markup(explorer.packed(held)),
            "script": markup((files("vgrout") / "data" / SCRIPT).read_text()),
        },
        arms=list(by_arm),
        seeds=seeds,
        few_seeds=any(sum(run.oracle for run in own) < stats.LEAST for own in by_arm.values()),
        unfinished=[run.name for run in runs if run.cells is None],
        notes=notes,
        table=[_row(label, own_runs, lines) for label, own_runs in by_arm.items()],
        figures=[{"name": f.name, "title": f.title, "caption": f.caption, "svg": markup(f.svg())} for f in figures],
        provenance=_provenance(runs),
        shared=sorted(same.items()),
        runs=[
            {"name": r.name, "own": own[r.name], "steps": len(r.steps), "weights": (r.weights_sha256 or "-")[:16]}
            for r in runs
        ],
    )
    return html, figures, unread


def report(paths: Sequence[Path], out: Path, figures_to: Path | None, console: Console) -> int:
    """Write the page, and each figure as SVG and PNG where `figures_to` is given. Returns 1 where a run could not be
    read. Raises UserError."""
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"{out}: give a file that ends in .html")
    can_write(out)
    if figures_to is not None and figures_to.exists() and not figures_to.is_dir():
        raise UserError(f"{figures_to} is a file: give a folder for the figures")
    with console.status("reading runs and drawing"):
        html, figures, unread = page(paths)
    try:
        replace_file(out, html)
        if figures_to is not None:
            figures_to.mkdir(parents=True, exist_ok=True)
            for figure in figures:
                (figures_to / f"{figure.name}.svg").write_text(figure.svg())
                (figures_to / f"{figure.name}.png").write_bytes(figure.png())
    except OSError as error:
        raise UserError(f"cannot write the report: {error.strerror}") from None
    for reason in unread.values():
        console.print(f"could not be read: {reason}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"{out}", markup=False, soft_wrap=True)
    return 1 if unread else 0
