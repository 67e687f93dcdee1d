"""What an experiment stores beside its runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from vgrout.lab.evaluate import CELLS
from vgrout.lab.prereg import Decision


def stored(folder: Path, decision: Decision, **plan: str) -> None:
    """Make `folder` that of the decision's experiment. The untrained model has the rate .2 everywhere."""
    settings = {f"config.{key}": value for key, value in asdict(decision.base()).items() if key not in ("arm", "seed")}
    (folder / "decision.toml").write_text(decision.text)
    (folder / "plan.json").write_text(json.dumps({"decision_sha256": decision.sha256, **plan, **settings}))
    base = {what: {"mean": 0.2} for what in ("hack", "solve", "attempted", "compile")}
    (folder / "base.json").write_text(json.dumps({"cells": {known.name: base for known in CELLS}}))
