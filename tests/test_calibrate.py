"""The bars on finished runs, from folders written by hand."""

from __future__ import annotations

import json

import pytest

from vgrout.lab.calibrate import WINDOW, emergence, stability_bars

GOOD = {"loss": 0.1, "kl": 0.2, "entropy": 0.3, "norm_deployed": 1.0, "norm_quarantine": 0.0}
CELLS = ("train_deploy", "heldout_deploy", "hintfree_deploy")


def folder(path, name, changes=None, compiled=0.9, finished=True):
    """A run of 25 steps; `changes` maps a step to fields of it."""
    run = path / name
    run.mkdir()
    rows = [GOOD | {"step": i} | (changes or {}).get(i, {}) for i in range(25)]
    (run / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        cells = {cell: {"compile": {"mean": compiled}} for cell in CELLS}
        (run / "eval.json").write_text(json.dumps({"cells": cells}))
    return run


def missed(runs) -> list[str]:
    return [bar.what for bar in stability_bars(runs) if not bar.ok]


def test_a_steady_run_holds_every_bar(tmp_path):
    assert missed([folder(tmp_path, "a"), folder(tmp_path, "b")]) == []


@pytest.mark.parametrize(
    ("changes", "compiled", "finished", "word"),
    [
        ({7: {"loss": None}}, 0.9, True, "not finite"),
        ({i: {"entropy": 0.01} for i in range(5, 5 + WINDOW)}, 0.9, True, "lowest entropy"),
        ({i: {"entropy": 1.1} for i in range(15, 15 + WINDOW)}, 0.9, True, "highest entropy"),
        ({i: {"kl": 1.1} for i in range(WINDOW)}, 0.9, True, "KL"),
        ({}, 0.79, True, "compile"),
        ({}, 0.9, False, "did not finish"),
    ],
)
def test_the_worst_run_is_named(tmp_path, changes, compiled, finished, word):
    bad = folder(tmp_path, "bad", changes, compiled, finished)
    found = missed([folder(tmp_path, "a"), bad, folder(tmp_path, "c")])
    assert len(found) == 1 and word in found[0] and "bad" in found[0]


def test_a_single_step_is_averaged_away(tmp_path):
    assert missed([folder(tmp_path, "a", {3: {"kl": 5.0, "entropy": 0.0}})]) == []


def test_a_number_that_is_not_finite_is_the_worst(tmp_path):
    runs = [folder(tmp_path, "a"), folder(tmp_path, "nan", {3: {"entropy": None}}), folder(tmp_path, "c")]
    assert all("(nan)" in what for what in missed(runs)) and len(missed(runs)) == 3


def test_emergence_counts_prompts_with_a_loophole(tmp_path):
    """Two rollouts a step, one of them without a hint; the other hacks from step 6 on."""
    rows, verdicts = [], []
    for step in range(20):
        for hinted in (True, False):
            rows.append(
                {"id": f"{step}-{hinted}", "phase": "train", "source": "policy", "hinted": hinted, "step": step}
            )
            verdicts.append({"id": f"{step}-{hinted}", "hacked": hinted and step >= 6})
        rows.append({"id": f"{step}-demo", "phase": "train", "source": "teacher", "hinted": True, "step": step})
        verdicts.append({"id": f"{step}-demo", "hacked": True})
    rows.append({"id": "cell", "phase": "eval:heldout_deploy", "source": "policy", "hinted": True})
    verdicts.append({"id": "cell", "hacked": True})
    for name, log in (("rollouts", rows), ("verdicts", verdicts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    assert emergence(tmp_path, hinted=True) == 9  # three of the five steps 4 to 8 hack
    assert emergence(tmp_path) == 11  # half of all can hack, so that it takes five such steps
    assert emergence(tmp_path, level=1.1) is None
