"""`vgrout report`: one page about runs that opens from disk, without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from vgrout.lab import explorer, stats
from vgrout.lab.checkpoint import replace_file
from vgrout.lab.claims import base_cells, conclusions, experiment, findings, hits, is_decided, told
from vgrout.lab.decide import COSTS, passes
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.figures import Figure, altair, drawn, labels
from vgrout.lab.measures import MEASURES
from vgrout.lab.measures.scales import Line, lines, off_line
from vgrout.lab.measuring import home
from vgrout.lab.run import pairs_note, sandbox_note
from vgrout.lab.runs import Run, find
from vgrout.lab.tables import can_write
from vgrout.types import UserError

NAMED = 8  # most arms that a title names
TEMPLATE, SCRIPT = "report.html.j2", "explorer.js"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _text(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _row(label: str, runs: Sequence[Run], known: Mapping[int, tuple[Run, Line]]) -> dict[str, Any]:
    """A line of the arms' table: the finished runs of one arm. `known` is vanilla's shrinkage by seed."""
    done = [run for run in runs if run.oracle]
    off = [d for run in done if (d := off_line(run, known)) is not None]
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


def _measures(runs: Sequence[Run], base: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Every measure that these runs have something for, as the page wants it."""
    found = [(measure, measure.of(runs, base)) for measure in MEASURES.values()]
    return [
        {
            "name": measure.name,
            "title": measure.title,
            "note": " ".join([measure.what, *shown.notes]),
            "head": shown.head,
            "rows": shown.rows,
            "texts": shown.texts,
        }
        for measure, shown in found
        if shown is not None
    ]


@dataclass(frozen=True)
class Content:
    """What is to be said about runs. `told` has every text and table of a page, but for rollouts and drawings."""

    runs: list[Run]
    unread: Mapping[Path, str]  # why others could not be read
    figures: list[Figure]
    told: dict[str, Any]


def gathered(paths: Sequence[Path], *, decided: bool = False) -> Content:
    """`decided`: of the runs only those that count for the decision that they belong to. Raises UserError where no run
    among `paths` has done a step, or none counts."""
    altair()
    runs, unread = find(paths)
    around = home(paths)
    made = experiment(around, runs) if around is not None and (decided or is_decided(around)) else None
    if decided:
        runs = [] if made is None else list(made.runs.values())
    if not any(run.steps for run in runs):
        raise UserError(f"no run in {', '.join(map(str, paths))} has done a step yet")
    base = base_cells(around) if around else None
    known = lines(runs, base)
    same, own = _shared(runs)
    by_arm: Mapping[str, list[Run]] = {label: [r for r in runs if r.label == label] for label in labels(runs)}
    notes = [f"Could not be read: {reason}" for reason in unread.values()]
    notes += [text for run in runs if (text := sandbox_note(run.provenance))][:1]
    notes += [text for run in runs if (text := pairs_note(run.provenance))][:1]
    name = ", ".join(by_arm) if len(by_arm) <= NAMED else f"{len(by_arm)} arms"
    said: dict[str, Any] = {"title": f"vGROUT: {name}", "conclusions": [], "deviations": []}
    if made is not None:
        decision, found = made.decision, findings(made)
        said |= {"title": decision.question, "decision": decision, "deviations": made.remarks}
        said |= {"wanted": made.wanted, "missing": made.wanted - len(made.runs)}
        said |= {"conclusions": conclusions(decision, found), "findings": told(found)}
    said |= {
        "arms": list(by_arm),
        "seeds": sorted({run.seed for run in runs}),
        "few_seeds": any(sum(run.oracle for run in own) < stats.LEAST for own in by_arm.values()),
        "unfinished": [run.name for run in runs if run.cells is None],
        "notes": notes,
        "table": [_row(label, own_runs, known) for label, own_runs in by_arm.items()],
        "measures": _measures(runs, base),
        "provenance": _provenance(runs),
        "shared": sorted(same.items()),
        "runs": [
            {
                "name": r.name,
                "arm": r.label,
                "seed": r.seed,
                "folder": r.folder,
                "own": own[r.name],
                "steps": len(r.steps),
                "weights": (r.weights_sha256 or "-")[:16],
            }
            for r in runs
        ],
    }
    return Content(runs, unread, drawn(runs, base), said)


def template(name: str, **settings: Any):
    """A template of the package. Raises UserError where jinja2 is not installed."""
    try:
        import jinja2
    except ImportError:
        raise UserError("a report needs jinja2: pip install 'vgrout[report]'") from None
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, **settings)
    return environment.from_string((files("vgrout") / "data" / name).read_text())


def page(paths: Sequence[Path], limit: int = explorer.LIMIT) -> tuple[str, list[Figure], Mapping[Path, str]]:
    """The report as HTML with up to about `limit` rollouts, its figures, and why runs could not be read. Raises
    UserError."""
    form = template(TEMPLATE, autoescape=True)
    content = gathered(paths)
    from jinja2.utils import markupsafe

    safe = markupsafe.Markup
    held = explorer.table(content.runs, limit)
    every, count = held["every"], len(held["columns"]["run"])
    which = "Every rollout" if held["whole"] else f"Of training one step in {every}; of the final evaluation what ships"
    html = form.render(
        **content.told,
        explorer={
            "note": f"{which}: {count:,}.",
            "data": safe(explorer.packed(held)),
            "script": safe((files("vgrout") / "data" / SCRIPT).read_text()),
        },
        figures=[
            {"name": f.name, "title": f.title, "caption": f.caption, "svg": safe(f.svg())} for f in content.figures
        ],
    )
    return html, content.figures, content.unread


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
