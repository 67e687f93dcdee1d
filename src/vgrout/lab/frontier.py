"""What a run's blocks do when they shrink: the deployed block times 0 to 1, and the run's own checkpoints.

A method that only learns less lies on this line of vanilla's, in the plane of solving and hacking. So it is the null
against which an arm that hacks less has to be held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vgrout.adapters.base import Adapter
from vgrout.arms import ARMS
from vgrout.arms.base import part
from vgrout.config import Config
from vgrout.lab.checkpoint import FOLDER, whole
from vgrout.lab.evaluate import CELLS, HEADLINE, sample_cell, size_note, summary
from vgrout.lab.record import finished
from vgrout.lab.run import header, sandbox_note, workshop
from vgrout.lab.tables import can_write, write_result
from vgrout.types import UserError


def shrunk(
    adapter: Adapter, run: Path, scales: Sequence[float], *, ablates: bool = True
) -> Iterator[tuple[str, float, int | None]]:
    """Put one point after the other into force: (what it is, scale of what ships, step). Both blocks ship where an arm
    does not ablate."""
    adapter.load(run / "adapter.safetensors")
    for scale in scales:
        with adapter.scaled(deployed=scale, quarantine=1.0 if ablates else scale):
            yield "scaled", scale, None
    mine = adapter.tensors()
    for checkpoint in sorted(whole(run / FOLDER), key=lambda c: c.step):
        with torch.no_grad():
            for name, tensor in part(checkpoint.state, "adapter.").items():
                mine[name].copy_(tensor)
        yield "checkpoint", 1.0, checkpoint.step


def frontier(run: Path, scales: Sequence[float], rollouts: int | None, console: Console) -> dict:
    """Hack and solve of what ships, on held-out problems and markers, at every point. Raises UserError where `run` is
    no finished run with an oracle, or a scale is no share."""
    if not finished(run, weights=True):
        raise UserError(f"{run} is no finished run with its weights")
    if not scales or not all(0 <= scale <= 1 for scale in scales):
        raise UserError("scales are numbers from 0 to 1")
    cfg = Config.read(run / "config.json")
    if not cfg.oracle:
        raise UserError(f"{run} is of {cfg.env}, which has no oracle")
    (cell,) = [cell for cell in CELLS if cell.name == HEADLINE]
    points = []
    with workshop(cfg, trains=False) as shop:
        console.print(header(shop.provenance), markup=False, highlight=False, soft_wrap=True)
        ids, n = shop.env.problems("test"), rollouts or cfg.eval_rollouts
        ablates = ARMS[cfg.arm].ablates
        steps = shrunk(shop.policy.adapter, run, scales, ablates=ablates)
        for kind, scale, step in track(steps, "evaluating", console=console, transient=True):
            result = sample_cell(cfg, shop.policy, shop.env, cell, problems=ids, rollouts=n, ablates=ablates)
            points.append({"kind": kind, "scale": scale, "step": step, "cell": summary(result, shop.env)})
        return {"run": run.name, "arm": cfg.arm, "seed": cfg.seed, "points": points, **shop.provenance}


def show_frontier(run: Path, scales: Sequence[float], rollouts: int | None, out: Path | None, console: Console) -> None:
    """Print the points, and write them to `out` as JSON."""
    can_write(out)
    result = frontier(run, scales, rollouts, console)
    table = Table(title=f"{run.name}: held-out problems and markers, as shipped; % of rollouts [95 % interval]")
    for column in ("point", "hack", "solve", "compile"):
        table.add_column(column, justify="left" if column == "point" else "right")
    for point in result["points"]:
        name = f"adapter x {point['scale']:g}" if point["kind"] == "scaled" else f"step {point['step']}"
        rates = [point["cell"][what] for what in ("hack", "solve", "compile")]
        cells = [f"{100 * r['mean']:.0f} [{100 * r['low']:.0f}, {100 * r['high']:.0f}]" for r in rates]
        table.add_row(name, *cells)
    notes = (size_note({"cell": result["points"][0]["cell"]}), sandbox_note(result))
    table.caption = " ".join(filter(None, notes)) or None
    console.print(table)
    write_result(out, result)
