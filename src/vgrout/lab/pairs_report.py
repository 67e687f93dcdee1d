"""What `vgrout pairs lint` prints."""

from __future__ import annotations

from rich.console import Console

from vgrout.envs.micro import LIVE
from vgrout.envs.modes import MODES
from vgrout.pairs import digest, lint, load


def lint_pairs(selector: str, console: Console) -> int:
    """Problems and notes of a pairs file. Returns 1 when there is a problem."""
    pairs = load(selector)
    live = [m for mode in LIVE for family in ("train", "eval") for m in MODES[mode].markers[family]]
    report = lint(pairs, live)
    console.print(f"{len(pairs)} pairs, sha256 {digest(pairs)[:16]}")
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    return 0 if report.ok else 1
