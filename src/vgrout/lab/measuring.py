"""`vgrout lab MEASURE RUNS`: measure what is not measured yet, and show the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from vgrout.lab.claims import base_cells
from vgrout.lab.decide import PLAN
from vgrout.lab.measures import MEASURES
from vgrout.lab.measures.base import OnWeights
from vgrout.lab.measures.scales import VANILLA
from vgrout.lab.record import finished
from vgrout.lab.run import MICRO, workshop
from vgrout.lab.runs import Run, find, is_run
from vgrout.lab.tables import can_write, number_table, print_wide, write_result
from vgrout.types import RunFailed, UserError


def home(paths: Sequence[Path]) -> Path | None:
    """The folder of the experiment that the runs belong to: one that was given, or the one around a run that was."""
    places = [path.parent if is_run(path) else path for path in paths]
    return next((folder for folder in places if (folder / PLAN).is_file()), None)


def measure_runs(measure: OnWeights, runs: Sequence[Run], console: Console, *, again: bool) -> None:
    """Measure the runs that have weights, and no result yet unless `again`. One line for each that was not measured,
    and why."""
    for run in runs:
        if measure.is_made(run) and not again:
            continue
        why = _unable(run)
        if not why:
            console.print(f"measuring {measure.name} of {run.name}", markup=False, soft_wrap=True)
            try:
                # Where the loopholes are open, whatever the run was trained on.
                with workshop(replace(run.cfg, arm=VANILLA), trains=False) as shop:
                    if shop.provenance["model_sha256"] != run.provenance.get("model_sha256"):
                        raise UserError("the model under its adapter is not the one that it was trained on")
                    measure.store(run.folder, measure.make(run.folder, run.cfg, shop), shop.provenance)
            except (UserError, RunFailed) as error:
                why = str(error)
        if why:
            console.print(f"not measured: {run.name}: {why}", style="yellow", markup=False, soft_wrap=True)


def _unable(run: Run) -> str:
    """Why a run cannot be measured; '' where it may be tried."""
    if not run.cfg.oracle:
        return f"{run.cfg.env} has no oracle"
    if run.cfg.env != MICRO:
        return f"it is of {run.cfg.env}: weights are measured on the micro world alone"
    return "" if finished(run.folder, weights=True) else "it is not finished, or has no weights"


def show_measure(name: str, paths: Sequence[Path], out: Path | None, console: Console, *, again: bool = False) -> None:
    """Print a measure of runs, and write it to `out` as JSON. Raises UserError where they have nothing for it."""
    can_write(out)
    measure = MEASURES[name]
    runs, unread = find(paths)
    for reason in unread.values():
        console.print(f"could not be read: {reason}", style="yellow", markup=False, soft_wrap=True)
    if isinstance(measure, OnWeights):
        measure_runs(measure, runs, console, again=again)
        runs, _ = find([run.folder for run in runs])
    where = home(paths)
    shown = measure.of(runs, base_cells(where) if where else None)
    if shown is None:
        raise UserError(f"nothing to measure: {name} needs {measure.needs}")
    caption = " ".join([measure.what, *shown.notes, "Exploratory."])
    print_wide(number_table(measure.title, caption, shown.head, shown.rows, shown.texts), console)
    write_result(out, {"measure": name, "runs": [run.name for run in runs], "rows": shown.data})
