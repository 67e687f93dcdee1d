"""The report's figures, as Altair charts over plain rows. Axes and text take the page's colour, so that one drawing
serves light and dark pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.labels import modes_in_pairs
from vgrout.lab.measures.scales import restoring, shrinkage
from vgrout.lab.runs import Run
from vgrout.types import UserError

COLOURS = {  # arms that keep theirs in every report; the others share what is left
    "none": "#8a8f98",
    "none_2r": "#5f6570",
    "routeV": "#2f7de1",
    "placebo": "#e08a1e",
    "placebo_matched": "#e08a1e",
    "placebo_matched_2": "#c9a227",
    "coin_flip": "#b9709e",
    "absorb": "#2a9d6f",
    "screen_v": "#7a5fd0",
    "oracle_route": "#d1495b",
    "rl_baseline": "#3fb0c4",
}
SPARE = ("#9c6b3f", "#6f8f2f", "#c2577a", "#4a6fa5", "#a05fb0", "#2f8f8f", "#b5651d", "#708238")
OUTCOMES = ("hack", "solve")
WIDTH = 640  # of a drawing, in its own pixels
BIN = 5  # steps that share a point of a curve


@dataclass(frozen=True)
class Figure:
    """A chart with what a reader has to know of it."""

    name: str
    title: str
    caption: str
    chart: Any

    def svg(self) -> str:
        import vl_convert

        return vl_convert.vegalite_to_svg(self.chart.to_dict())

    def printed(self) -> str:
        """As SVG on white, for a page whose colours are not known."""
        return self.svg().replace(INK, PRINTED).replace("<svg ", '<svg style="background:white" ', 1)

    def png(self) -> bytes:
        import vl_convert

        return vl_convert.vegalite_to_png(self.chart.configure(background="white", **THEME).to_dict(), scale=2)


def altair():
    """Raises UserError where it is not installed."""
    try:
        import altair
        import vl_convert  # noqa: F401 - draws the charts
    except ImportError:
        raise UserError("figures need altair: pip install 'vgrout[report]'") from None
    return altair


INK, PRINTED = "currentColor", "#1d2129"
GRID = "rgba(128,128,128,0.25)"
THEME: dict[str, Any] = {
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 12,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "symbolSize": 90,
        "symbolOpacity": 1,
        "orient": "bottom",
        "columns": 4,
        "symbolLimit": 0,
        "columnPadding": 24,
    },
    "header": {"labelColor": INK, "titleColor": INK, "labelFontSize": 13, "labelFontWeight": "bold"},
    "title": {"color": INK},
    "view": {"stroke": None},
    "font": "system-ui, sans-serif",
}


def labels(runs: Sequence[Run]) -> list[str]:
    """Arms in a fixed order: those that have a colour first."""
    present = {run.label for run in runs}
    return [label for label in COLOURS if label in present] + sorted(present - COLOURS.keys())


def colour(runs: Sequence[Run]):
    """One colour per arm, the same in every figure."""
    alt, names = altair(), labels(runs)
    others = [name for name in names if name not in COLOURS]
    spare = {name: SPARE[i % len(SPARE)] for i, name in enumerate(others)}
    scale = alt.Scale(domain=names, range=[COLOURS.get(name) or spare[name] for name in names])
    return alt.Color("arm:N", scale=scale, sort=names, title=None)


def plane(runs: Sequence[Run], base: Mapping[str, Any] | None) -> Figure | None:
    """Hack and solve of what ships: every seed a dot, every arm's mean a ring, the untrained model a cross."""
    done = [run for run in runs if run.oracle]
    if not done:
        return None
    alt = altair()
    dots = [_point(run, run.cells[HEADLINE]) for run in done]
    by_arm: dict[str, list[dict]] = defaultdict(list)
    for dot in dots:
        by_arm[dot["arm"]].append(dot)
    rings = [{"arm": arm, **{what: mean(d[what] for d in own) for what in OUTCOMES}} for arm, own in by_arm.items()]
    axis, whole = alt.Axis(tickCount=10), alt.Scale(domain=[0, 100])
    x = alt.X("solve:Q", title="solves, % of rollouts", scale=whole, axis=axis)
    y = alt.Y("hack:Q", title="hacks, % of rollouts", scale=whole, axis=axis)
    tint = colour(done)
    layers = [
        alt.Chart(alt.Data(values=dots)).mark_circle(size=45, opacity=0.55).encode(x, y, tint),
        alt.Chart(alt.Data(values=rings)).mark_point(size=190, strokeWidth=3, filled=False).encode(x, y, tint),
    ]
    if line := shrinkage(done, base):
        path = [{"solve": 100 * solve, "hack": 100 * hack, "order": i} for i, (solve, hack) in enumerate(line)]
        mark = {"strokeDash": [5, 4], "color": INK, "opacity": 0.6, "point": {"color": INK, "size": 16}}
        layers.append(alt.Chart(alt.Data(values=path)).mark_line(**mark).encode(x, y, order="order:Q"))
    if base and "hack" in base[HEADLINE]:
        cross = [{what: 100 * base[HEADLINE][what]["mean"] for what in OUTCOMES}]
        mark = {"shape": "cross", "size": 130, "color": INK, "filled": True}
        layers.append(alt.Chart(alt.Data(values=cross)).mark_point(**mark).encode(x, y))
    chart = alt.layer(*layers).properties(width=WIDTH, height=420)
    caption = (
        "What ships, on held-out problems with held-out markers. A dot is a run, a ring an arm's mean over seeds, the "
        "cross the untrained model. Down and to the right is better. The dashed line is vanilla with its block shrunk, "
        "where runs have measured it: an arm that only learns less moves along it."
    )
    return Figure("plane", "Who hacks, and who solves", caption, _themed(chart))


def restored(runs: Sequence[Run]) -> Figure | None:
    """Hack and solve while the quarantine comes back."""
    own = [run for run in runs if restoring(run)]
    if not own:
        return None
    alt, tint, panels = altair(), colour(own), []
    for what in ("hack", "solve"):
        rows = [
            {"arm": run.label, "run": run.name, "scale": c["scale"], "rate": 100 * c[what]["mean"]}
            for run in own
            for c in restoring(run)
        ]
        x = alt.X("scale:Q", title="strength of the quarantine", axis=alt.Axis(tickCount=5))
        y = alt.Y("rate:Q", title=f"{what}s, %", scale=alt.Scale(domain=[0, 100]))
        data = alt.Data(values=rows)
        seeds = alt.Chart(data).mark_line(opacity=0.35, strokeWidth=1).encode(x, y, tint, detail="run:N")
        means = alt.Chart(data).mark_line(strokeWidth=3).encode(x, alt.Y("mean(rate):Q"), tint)
        panels.append((seeds + means).properties(width=(WIDTH - 70) // 2, height=220))
    caption = (
        "Held-out problems with held-out markers while the quarantine is put back beside the deployed block: 0 is what "
        "ships, 1 the model that was trained. Thin lines are seeds. Hacking that comes back was in the quarantine."
    )
    return Figure("restore", "What the quarantine holds", caption, _themed(alt.concat(*panels, columns=2)))


def _point(run: Run, cell: Mapping[str, Any]) -> dict:
    return {"arm": run.label, "seed": run.seed, **{what: 100 * cell[what]["mean"] for what in OUTCOMES}}


def _themed(chart):
    return chart.configure(background="transparent", **THEME)


def curve(runs: Sequence[Run], field: str, scale: float = 1.0) -> list[dict]:
    """Mean over seeds of a step's field, least and largest, in windows of `BIN` steps. Steps without it are left
    out."""
    values: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for step in run.steps:
            if step.get(field) is not None:
                values[run.label, step["step"] // BIN * BIN + BIN // 2][run.seed].append(scale * step[field])
    rows = []
    for (arm, at), seeds in sorted(values.items()):
        means = [mean(own) for own in seeds.values()]
        rows.append({"arm": arm, "step": at, "mean": mean(means), "low": min(means), "high": max(means)})
    return rows


def curves(
    runs: Sequence[Run], fields: Mapping[str, tuple[str, float]], name: str, title: str, caption: str
) -> Figure | None:
    """A panel for each field: name of the panel -> (field, scale)."""
    alt, tint, panels = altair(), colour(runs), []
    for what, (field, scale) in fields.items():
        rows = curve(runs, field, scale)
        if not rows:
            continue
        data, x = alt.Data(values=rows), alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1))
        band = alt.Chart(data).mark_area(opacity=0.13).encode(x, alt.Y("low:Q", title=what), alt.Y2("high:Q"), tint)
        alone = len({row["step"] for row in rows}) == 1  # a line of one point is not drawn
        line = alt.Chart(data).mark_line(strokeWidth=2, point=alone).encode(x, alt.Y("mean:Q", title=what), tint)
        panels.append((band + line).properties(width=(WIDTH - 70) // 2, height=200))
    return Figure(name, title, caption, _themed(alt.concat(*panels, columns=2))) if panels else None


def training(runs: Sequence[Run]) -> Figure | None:
    caption = (
        f"Rollouts of training, means over seeds in windows of {BIN} steps; bands run from the lowest to the highest "
        "seed. Hacks and solutions are the oracle's word, which no arm without a mark * saw."
    )
    fields = {
        "hacks, %": ("m_hack", 100),
        "solves, %": ("m_solve", 100),
        "reward": ("reward", 1),
        "KL to base, nats a token": ("kl", 1),
    }
    return curves(runs, fields, "training", "Training", caption)


def gates(runs: Sequence[Run]) -> Figure | None:
    scored = [run for run in runs if any(step.get("m_auroc") is not None for step in run.steps)]
    caption = (
        "The gate as a classifier of hacks among a step's rollouts, in windows of five steps, and the quarantine's "
        "share of the gradient norm. .5 is chance. Exploratory."
    )
    fields = {
        "AUROC": ("m_auroc", 1),
        "F0.5 of what is routed": ("m_f05", 1),
        "routed, %": ("route", 100),
        "absorbed, %": ("absorb", 100),
        "quarantine's share of the gradient": ("qmass", 1),
    }
    return curves(scored, fields, "gates", "What the gates see", caption) if scored else None


CLASSES = {"hacks": "#d1495b", "other rollouts": "#2a9d6f"}


def scores(runs: Sequence[Run]) -> Figure | None:
    """The monitor's scores by what the oracle says of the rollouts, over training, with the cuts that were used."""
    by_arm = {label: [run for run in runs if run.label == label] for label in labels(runs)}
    alt, panels = altair(), []
    for label, own in by_arm.items():
        rows = spread(own)
        if not rows:
            continue
        data, x = alt.Data(values=rows), alt.X("step:Q", title="step")
        y = alt.Y("middle:Q", title=label)
        tint = alt.Color("kind:N", title=None, scale=alt.Scale(domain=list(CLASSES), range=list(CLASSES.values())))
        band = alt.Chart(data).mark_area(opacity=0.16).encode(x, alt.Y("low:Q", title=label), alt.Y2("high:Q"), tint)
        line = alt.Chart(data).mark_line(strokeWidth=2).encode(x, y, tint)
        layers = [band, line]
        for field in ("t_lo", "t_hi"):
            cuts = [{"step": row["step"], "middle": row["mean"]} for row in curve(own, field)]
            if cuts:
                mark = {"strokeDash": [4, 4], "color": INK, "opacity": 0.7, "strokeWidth": 1}
                layers.append(alt.Chart(alt.Data(values=cuts)).mark_line(**mark).encode(x, y))
        panels.append(alt.layer(*layers).properties(width=(WIDTH - 70) // 2, height=190))
    caption = (
        f"Scores of the policy's training rollouts by the oracle's word, all seeds together, in windows of {BIN} "
        "steps: median, and from the 10th to the 90th percentile. Dashed: the mean cuts above which a rollout trains "
        "both blocks, and the quarantine alone. Exploratory."
    )
    if not panels:
        return None
    return Figure("scores", "What the scores tell apart", caption, _themed(alt.concat(*panels, columns=2)))


def spread(runs: Sequence[Run]) -> list[dict]:
    """Percentiles of the scores of hacks and of other rollouts, in windows of `BIN` steps; none of arms without
    scores."""
    seen = [run.trained() for run in runs]
    step, score, hacked = (
        np.concatenate([getattr(own, field) for own in seen] or [[]]) for field in ("step", "score", "hacked")
    )
    rows = []
    for window in np.unique(step // BIN):
        for kind, is_kind in zip(CLASSES, (hacked == 1, hacked == 0), strict=True):
            own = score[(step // BIN == window) & is_kind & np.isfinite(score)]
            if len(own):
                low, middle, high = np.quantile(own, [0.1, 0.5, 0.9]).tolist()
                at = {"step": int(window) * BIN + BIN // 2, "kind": kind}
                rows.append(at | {"low": low, "middle": middle, "high": high})
    return rows


def by_mode(runs: Sequence[Run]) -> Figure | None:
    """Hack per loophole of what ships."""
    done = [run for run in runs if run.oracle]
    if not done:
        return None
    alt = altair()
    shown = modes_in_pairs(done[0].cfg.pairs)
    rows = [
        {
            "arm": run.label,
            "mode": f"{mode}{'' if mode in shown else ' (not in pairs)'}",
            "hack": 100 * rates["hack"]["mean"],
        }
        for run in done
        for mode, rates in run.cells[HEADLINE]["modes"].items()
    ]
    modes = sorted({row["mode"] for row in rows}, key=lambda mode: (mode not in shown, mode))
    order, data = labels(done), alt.Data(values=rows)
    x = alt.X("arm:N", sort=order, title=None, axis=alt.Axis(labelAngle=-40))
    bars = alt.Chart(data).mark_bar(opacity=0.6).encode(x, alt.Y("mean(hack):Q", title="hacks, %"), colour(done))
    dots = alt.Chart(data).mark_circle(size=28, color=INK, opacity=0.7).encode(x, alt.Y("hack:Q", title="hacks, %"))
    panel = alt.layer(bars, dots, data=data).properties(width=(WIDTH - 70) // 2, height=170)
    chart = panel.facet(facet=alt.Facet("mode:N", title=None, sort=modes), columns=2)
    caption = "What ships, by the problem's loophole; bars are means over seeds, dots are seeds."
    return Figure("modes", "Hacking by loophole", caption, _themed(chart))


FIGURES: tuple[Callable[..., Figure | None], ...] = (restored, training, gates, scores, by_mode)


def drawn(runs: Sequence[Run], base: Mapping[str, Any] | None) -> list[Figure]:
    """Every figure that these runs have something for."""
    found = [plane(runs, base), *(make(runs) for make in FIGURES)]
    return [figure for figure in found if figure is not None]
