"""`vgrout lab choose`: which settings to take, read from finished runs on validation problems alone.

What ships is sampled on validation problems whose loophole the pairs show, under held-out markers. Settings are ranked
by the mean over seeds of solve - hack, those with fewer seeds below the others. Test problems and modes that no pair
shows stay unread. The choice does read the oracle: who takes a default from here has to say so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.lab.evaluate import CELLS, HEADLINE, sample_cell, summary
from vgrout.lab.labels import modes_in_pairs
from vgrout.lab.record import finished
from vgrout.lab.run import MICRO, pairs_note, sandbox_note, workshop
from vgrout.lab.tables import can_write, number_table, print_wide, write_result
from vgrout.types import UserError

SPLIT = "val"


@dataclass(frozen=True)
class Shipped:
    """What one run ships, on validation problems of the development modes."""

    settings: str
    seed: int
    modes: tuple[str, ...]
    hack: float
    solve: float
    rollouts: int
    problems: int
    note: str  # what a reader has to know of the sandbox and the pairs; empty where there is nothing


def settings_of(run: Path, seed: int) -> str:
    """The name that the runs of one setting share: the folder's, without its seed."""
    return run.name.removesuffix(f"-s{seed}")


def configurations(runs: Sequence[Path]) -> dict[Path, Config]:
    """Of finished runs. Raises UserError where one is none or has no oracle, or two are of one setting and seed."""
    if not runs:
        raise UserError("name the folders of finished runs")
    found: dict[Path, Config] = {}
    for run in runs:
        if not finished(run, weights=True):
            raise UserError(f"{run} is no finished run with its weights")
        found[run] = Config.read(run / "config.json")
        if found[run].env != MICRO:
            raise UserError(f"{run} is of {found[run].env}: settings are chosen on the micro world")
    counts = Counter((settings_of(run, cfg.seed), cfg.seed) for run, cfg in found.items())
    for (settings, seed), times in counts.items():
        if times > 1:
            raise UserError(f"{times} runs of {settings} with seed {seed}: give each once")
    return found


def shipped(run: Path, cfg: Config, rollouts: int) -> Shipped:
    """Raises UserError where the run's pairs show no mode of a validation problem."""
    (cell,) = [cell for cell in CELLS if cell.name == HEADLINE]
    with workshop(cfg, trains=False) as shop:
        modes = tuple(
            sorted(modes_in_pairs(cfg.pairs) & {shop.env.problem(id).mode for id in shop.env.problems(SPLIT)})
        )
        ids = [id for id in shop.env.problems(SPLIT) if shop.env.problem(id).mode in modes]
        if not ids:
            raise UserError(f"{run}: no {SPLIT} problem has a mode that {cfg.pairs} shows")
        shop.policy.adapter.load(run / "adapter.safetensors")
        ablates = ARMS[cfg.arm].ablates
        result = sample_cell(cfg, shop.policy, shop.env, cell, problems=ids, rollouts=rollouts, ablates=ablates)
        rates = summary(result, shop.env)
        note = " ".join(filter(None, (sandbox_note(shop.provenance), pairs_note(shop.provenance))))
    hack, solve = (rates[what]["mean"] for what in ("hack", "solve"))
    return Shipped(settings_of(run, cfg.seed), cfg.seed, modes, hack, solve, rollouts, len(ids), note)


def ranked(found: Sequence[Shipped]) -> list[dict]:
    """One row per setting: of those with the most seeds the best mean of solve - hack first. Raises UserError where
    runs were not sampled on the same problems."""
    if len({one.modes for one in found}) > 1:
        said = "; ".join(sorted({f"{one.settings}: {', '.join(one.modes)}" for one in found}))
        raise UserError(f"the pairs of these runs show different modes, so they have no problems in common: {said}")
    by: dict[str, dict[int, Shipped]] = defaultdict(dict)
    for one in found:
        by[one.settings][one.seed] = one
    rows = []
    for settings, seeds in by.items():
        runs = [seeds[seed] for seed in sorted(seeds)]
        mean = {what: sum(getattr(run, what) for run in runs) / len(runs) for what in ("hack", "solve")}
        gain = mean["solve"] - mean["hack"]
        rows.append({"settings": settings, **mean, "gain": gain, "runs": [asdict(run) for run in runs]})
    return sorted(rows, key=lambda row: (-len(row["runs"]), -row["gain"], row["settings"]))


def show_choice(runs: Sequence[Path], rollouts: int, out: Path | None, console: Console) -> None:
    """Print the ranking, and write it to `out` as JSON. Raises UserError."""
    if rollouts < 1:
        raise UserError(f"rollouts = {rollouts}: give a positive whole number")
    chosen = configurations(runs)
    can_write(out)
    todo = track(chosen.items(), "evaluating", total=len(chosen), console=console, transient=True)
    found = [shipped(run, cfg, rollouts) for run, cfg in todo]
    rows = ranked(found)
    where = f"{found[0].problems} validation problems of {', '.join(found[0].modes)}"
    measured = f"What ships, {rollouts} rollouts a run on {where}. Measured with the oracle: no result."
    caption = " ".join(filter(None, (measured, *dict.fromkeys(one.note for one in found))))
    head = ("settings", "seeds", "solve - hack", "hack", "solve", "hack by seed", "solve by seed")
    shown = [
        [
            row["settings"],
            " ".join(str(run["seed"]) for run in row["runs"]),
            *(f"{row[what]:.3f}" for what in ("gain", "hack", "solve")),
            *(" ".join(f"{run[what]:.2f}" for run in row["runs"]) for what in ("hack", "solve")),
        ]
        for row in rows
    ]
    print_wide(number_table("settings on validation problems of the pairs' modes", caption, head, shown, 2), console)
    write_result(out, rows)
