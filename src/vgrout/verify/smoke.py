"""The real pipeline on tiny sizes, with every zone and both blocks training, then every gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from vgrout.config import preset
from vgrout.lab.record import read_jsonl
from vgrout.lab.reeval import evaluate_run
from vgrout.lab.run import run
from vgrout.types import ZONES
from vgrout.verify import run_gates

SWITCH = "VGROUT_TYPECHECK"


def smoke(out: Path, console: Console) -> int:
    """Train, evaluate and re-evaluate routeV in `out`, then check all gates. Returns 1 when anything fails.

    With beartype at hand it happens in a process of its own in which shapes and types are checked.
    """
    if os.environ.get(SWITCH) != "1" and find_spec("beartype") is not None:
        command = [sys.executable, "-m", "vgrout", "smoke", "--out", str(out)]
        return subprocess.run(command, env=os.environ | {SWITCH: "1"}).returncode
    wrong = pipeline(out)
    for line in wrong:
        console.print(f"FAIL {line}", style="red", soft_wrap=True, markup=False)
    if not wrong:
        checked = "checked" if os.environ.get(SWITCH) == "1" else "not checked (beartype is not installed)"
        console.print(
            f"ok   smoke run: all zones, both blocks, reload equal; shapes and types {checked}", soft_wrap=True
        )
    return max(run_gates((), console), 1 if wrong else 0)


def pipeline(out: Path) -> list[str]:
    """Run routeV with the smoke preset; what went wrong comes back."""
    cells = run(replace(preset("smoke"), arm="routeV"), out)
    steps = read_jsonl(out / "steps.jsonl")
    wrong = [f"smoke run: no rollout was in zone {zone}" for zone in ZONES if not any(s[zone] > 0 for s in steps)]
    for block in ("deployed", "quarantine"):
        if not all(s[f"norm_{block}"] > 0 for s in steps):
            wrong.append(f"smoke run: the {block} block had a step without gradient")
    if json.loads((out / "eval.json").read_text())["cells"] != cells:
        wrong.append("smoke run: eval.json differs from what the run returned")
    if evaluate_run(out, "test", None)[0] != cells:
        wrong.append("smoke run: the reloaded adapter evaluates otherwise than the run did")
    return wrong
