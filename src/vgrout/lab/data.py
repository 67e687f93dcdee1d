"""`vgrout data`: data sets of others as problem files of our format."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vgrout.envs.grade import Grader
from vgrout.envs.leetcode import prepare
from vgrout.envs.problems import write_problems
from vgrout.envs.sandbox import Sandbox
from vgrout.envs.selftest import self_test
from vgrout.lab.record import check_folder, claim_folder

REPORT = "report.json"


def prepare_leetcode(
    source: Path,
    out: Path,
    console: Console,
    *,
    modes: tuple[str, ...] = (),
    seed: int = 0,
    force: bool = False,
    workers: int = 1,
    allow_weak: bool = False,
) -> int:
    """Write the problems of each split and report.json into `out`, and print what is in it."""
    check_folder(out, force=force)
    with Sandbox(workers=workers, allow_weak=allow_weak) as sandbox, console.status("running canonical programs"):
        self_test(sandbox)
        console.print(f"sandbox {sandbox.tier}", markup=False, highlight=False)
        splits, report = prepare(source, Grader(sandbox), modes=modes, seed=seed)
    claim_folder(out, force=force)
    for name, problems in splits.items():
        write_problems(out / f"{name}.jsonl", problems)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    for name, rows in report["files"].items():
        console.print(f"{name}: {rows} rows", markup=False)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for name, split in report["splits"].items():
        console.print(f"{out / name}.jsonl: {split['problems']} problems, {split['modes']}", markup=False)
    table = Table()
    for column in ("", "min", "median", "mean", "max"):
        table.add_column(column, justify="left" if not column else "right")
    for name, spread in report["facts"].items():
        table.add_row(name, *(f"{value:g}" for value in spread.values()))
    console.print(table)
    tests = sum(map(len, report["dropped_tests"].values()))
    console.print(f"dropped {len(report['dropped'])} problems and {tests} tests of others, see {out / REPORT}")
    for id, reason in report["dropped"].items():
        console.print(f"dropped {id}: {reason}", markup=False)
    return 0
