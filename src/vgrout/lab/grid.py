"""What `vgrout decide --arms` can name: every arm, and arms with some settings changed.

`all` is one default per row of the arms' table, `all-variants` the grid: ceilings with worse labels, placebos, gate
policies and the one-line ablations of routeV. The other sets are what one measure of the lab needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich import box
from rich.table import Table

from vgrout.arms import ARMS, hooks
from vgrout.config import Config
from vgrout.types import UserError

DRAWS = 1000  # between the seeds of one run's random directions


@dataclass(frozen=True)
class Variant:
    """An arm under a label, with settings of its own. Those in `times` multiply the experiment's."""

    label: str
    arm: str
    what: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    draw: int = 0  # a random direction of its own where it is not 0
    section: str = ""  # of the experiment's file of pairs, tags included; its own selection when not given

    def config(self, base: Config, seed: int) -> Config:
        scaled = {name: type(getattr(base, name))(getattr(base, name) * by) for name, by in self.times.items()}
        pairs = f"{base.pairs.partition('#')[0]}#{self.section}" if self.section else base.pairs
        drawn = {"placebo_seed": seed + DRAWS * self.draw} if self.draw else {}
        return replace(base, **{"arm": self.arm, "seed": seed, "pairs": pairs, **self.changes, **scaled, **drawn})


UNSEEN = "all-in-one@mode:eq_override,mode:exit_code"  # pairs of mechanisms that are never live


def _routeV(label: str, what: str, section: str = "", **changes: Any) -> Variant:
    return Variant(f"routeV_{label}", "routeV", what, changes, section=section)


GRID: tuple[Variant, ...] = (
    # Controls.
    Variant("none_wide", "none", "rank-matched vanilla: one block of twice the rank", times={"rank": 2}),
    Variant("placebo_matched_2", "placebo_matched", "along a second random direction", draw=1),
    # Ceilings with worse labels.
    *(
        Variant(f"oracle_{action}_{name}", f"oracle_{action}", what, changes)
        for action in ("route", "screen", "penalty")
        for name, what, changes in (
            ("acc90", "9 of 10 labels are right", {"label_accuracy": 0.9}),
            ("acc70", "7 of 10 labels are right", {"label_accuracy": 0.7}),
            ("share10", "a tenth of the rollouts has a label", {"label_share": 0.1}),
            ("share01", "a hundredth of the rollouts has a label", {"label_share": 0.01}),
            ("two", "only hacks of two modes are labelled", {"label_modes": ("run_tests", "stdout_marker")}),
        )
    ),
    Variant("oracle_graft_classic", "oracle_graft", "honest rollouts train both blocks", {"graft_kind": "classic"}),
    Variant("oracle_graft_half", "oracle_graft", "half of the gradient moves", {"graft_strength": 0.5}),
    Variant("oracle_penalty_35", "oracle_penalty", "a caught hack earns nothing at all", {"penalty": 3.5}),
    *(
        Variant(f"{arm}_35", arm, "what is flagged earns nothing at all", {"penalty": 3.5})
        for arm in ("penalty_v", "penalty_a", "probe_penalty", "judge_penalty")
    ),
    # Gates and forms of other arms.
    Variant("erase_no_gate", "erase", "takes the component out either way", {"erase_gate": "no_gate"}),
    Variant("erase_reverse", "erase", "turns the component round", {"erase_gate": "reverse"}),
    Variant("adv_mod_mult", "adv_mod", "the published product", {"adv_form": "multiplicative"}),
    Variant("adv_mod_clipped", "adv_mod", "the product, not below 0", {"adv_form": "clipped"}),
    Variant("adv_mod_mean", "adv_mod", "reads the mean over the completion", {"adv_position": "resp_mean"}),
    # routeV with one thing changed.
    _routeV("p75", "cuts at fixed places of the pairs' band", policy="pair_p75"),
    _routeV("pair_mean", "cuts at the pairs' means, scored through the ablated model, baseline over kept rollouts",
            policy="pair_mean", score_state="deployed", baseline="kept"),
    _routeV("top2q", "routes the top of a history of rollouts", policy="top2q"),
    _routeV("deployed", "scores through the ablated model", score_state="deployed"),
    _routeV("deployed_p75", "the same, cut at fixed places of the pairs' band",
            score_state="deployed", policy="pair_p75"),
    _routeV("deployed_mixture", "the same, cut between two components of the step's scores",
            score_state="deployed", policy="mixture"),
    _routeV("unit", "v from the pairs' gradients at length 1", direction="unit"),
    _routeV("unit_deployed", "the same, scored through the ablated model",
            direction="unit", score_state="deployed"),
    _routeV("unit_deployed_p75", "the same, cut at fixed places of the pairs' band",
            direction="unit", score_state="deployed", policy="pair_p75"),
    _routeV("svd", "a direction of two axes", direction="svd"),
    _routeV("orthogonal", "v without what the clean sides share", direction="orthogonal"),
    _routeV("ema", "routes the top of a history that fades", policy="ema_quantile"),
    _routeV("mixture", "routes the upper of two components of the step's scores", policy="mixture"),
    _routeV("one", "1 in place of the ratio of the policy to its sampler", ratio="one"),
    _routeV("kept", "baseline over the rollouts that are not routed", baseline="kept"),
    _routeV("grpo", "scores by the gradient times the advantage", score_loss="grpo"),
    _routeV("refresh1", "extracts v in every step", refresh_every=1),
    _routeV("refresh20", "extracts v every 20 steps", refresh_every=20),
    _routeV("gen25", "a quarter of the rollouts is sampled with the quarantine ablated", deploy_gen_frac=0.25),
    _routeV("gen0", "rollouts are sampled from the full model", deploy_gen_frac=0.0),
    _routeV("unseen", "pairs of the mechanisms that are never live", section=UNSEEN),
)  # fmt: skip

# What a measure of the lab needs, arms that `none` and others are compared with among them.
MECHANISMS = ("run_tests", "stdout_marker", "eq_override", "exit_code")  # that the micro pairs show
TRAINED_ON = ("run_tests", "stdout_marker")  # of these, those that are live
LEFT_OUT: tuple[Variant, ...] = tuple(
    _routeV(
        f"without_{mode}",
        f"pairs of all mechanisms but {mode}",
        section="all-in-one@" + ",".join(f"mode:{other}" for other in MECHANISMS if other != mode),
    )
    for mode in TRAINED_ON
)
LEAKAGE: tuple[Variant, ...] = tuple(
    Variant(
        f"oracle_route_label{percent}",
        "oracle_route",
        f"{percent} % of the rollouts have a label",
        {"label_share": percent / 100},
    )
    for percent in (90, 75, 50, 25)
)
SEPARATION: tuple[Variant, ...] = (
    *(
        Variant(
            f"oracle_route_{adapter}_acc{percent}",
            "oracle_route",
            f"in the adapter {adapter}, {percent} % of the labels are right",
            {"adapter": adapter} | ({"label_accuracy": percent / 100} if percent < 100 else {}),
        )
        for adapter in ("delta_s", "frozen_b", "frozen_b_split")
        for percent in (100, 90, 70, 50)
    ),
    Variant("oracle_route_acc50", "oracle_route", "labels tell nothing", {"label_accuracy": 0.5}),
    Variant("oracle_route_sgd", "oracle_route", "under SGD with momentum", {"optimizer": "sgd"}, times={"lr": 100}),
)

SECTIONS = {"placebo_style": "nulls"}  # arms whose pairs are others than the experiment's
ROWS: tuple[Variant, ...] = tuple(
    Variant(name, name, arm.claim, section=SECTIONS.get(name, "")) for name, arm in ARMS.items()
)
KNOWN: dict[str, Variant] = {v.label: v for v in (*ROWS, *GRID, *LEFT_OUT, *LEAKAGE, *SEPARATION)}


def _with(*labels: str) -> tuple[Variant, ...]:
    return tuple(KNOWN[label] for label in labels)


SETS: dict[str, tuple[Variant, ...]] = {
    "all": ROWS,
    "all-variants": (*ROWS, *GRID),
    "left-out": (*_with("none", "routeV"), *LEFT_OUT),
    "leakage": (*_with("none", "absorb", "routeV", "oracle_route"), *LEAKAGE),
    "separation": (*_with("none", "oracle_route", "oracle_route_acc90", "oracle_route_acc70"), *SEPARATION),
}


def named(names: Iterable[str]) -> list[Variant]:
    """The variants that `--arms` names, sets unfolded. Raises UserError for an unknown name."""
    known = KNOWN
    out: list[Variant] = []
    for name in names:
        if name not in known and name not in SETS:
            raise UserError(f"unknown arm {name!r}: choose from {', '.join((*SETS, *known))}")
        out += SETS.get(name) or (known[name],)
    return out


WIDEST = 60  # characters of a table's last column, which wraps


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption or None)
    for i, column in enumerate(head[:-1]):
        table.add_column(column, min_width=max(len(line) for row in (head, *rows) for line in row[i].split("\n")))
    table.add_column(head[-1], min_width=WIDEST, max_width=WIDEST)
    for row in rows:
        table.add_row(*row)
    return table


def _told(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def arms_table(variants: bool) -> list[Table]:
    """Every arm with its facts; and, with `variants`, arms with other settings."""
    rows = []
    for name, arm in ARMS.items():
        ships = "quarantine ablated" if arm.ablates else "as it is"
        facts = (arm.signal, arm.action, arm.access, ships, " ".join(hooks(arm)) or "-", arm.paper or "-", arm.claim)
        rows.append((name + (" *" if arm.reads_oracle else ""), *facts))
    head = ("arm", "signal", "action", "access", "at deployment", "hooks", "paper", "what it does")
    first = _table(head, rows, "* reads the oracle: a ceiling, not a method")
    if not variants:
        return [first]
    rows = []
    for v in (*GRID, *LEFT_OUT, *LEAKAGE, *SEPARATION):
        settings = [f"pairs #{v.section}"] if v.section else []
        settings += [f"{k} {_told(w)}" for k, w in v.changes.items()] + [f"{k} x {w:g}" for k, w in v.times.items()]
        settings += [f"placebo_seed + {DRAWS * v.draw}"] if v.draw else []
        rows.append((v.label, v.arm, "\n".join(settings), v.what))
    return [first, _table(("variant", "arm", "settings", "what differs"), rows)]
