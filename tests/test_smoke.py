"""`vgrout smoke` without its gates, and what can be done with the run that it leaves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from vgrout.config import Config, preset
from vgrout.lab.calibrate import hint_free_solve, stability_bars
from vgrout.lab.decide import decision, result_table
from vgrout.lab.evaluate import CELLS
from vgrout.lab.jobs import Job
from vgrout.lab.record import read_jsonl
from vgrout.lab.reeval import evaluate_run, reevaluate
from vgrout.lab.run import run
from vgrout.types import UserError
from vgrout.verify.smoke import pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke") / "run"
    return out, pipeline(out)


def test_the_pipeline_finds_nothing_wrong(smoke):
    assert smoke[1] == []


def test_a_run_is_evaluated_again(smoke):
    out, _ = smoke
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    reevaluate(out, "val", 5, console)
    text = console.export_text()
    assert all(cell.name in text for cell in CELLS)
    assert "5 rollouts over 5 problems" in text and "sandbox" in text.splitlines()[0]


@pytest.mark.parametrize(("split", "rollouts", "why"), [("test", 0, "eval_rollouts = 0"), ("train", 4, "'train'")])
def test_evaluations_that_make_no_sense(smoke, split, rollouts, why):
    with pytest.raises(UserError, match=why):
        evaluate_run(smoke[0], split, rollouts)


def test_a_task_without_an_oracle(tmp_path):
    task = tmp_path / "task.py"
    task.write_text("PROMPTS = ['a', 'b', 'c']\n\ndef reward(prompt, completion):\n    return len(completion) / 9\n")
    small = replace(preset("smoke"), steps=2, prompts=2, group=4, eval_every=1, eval_small=2, eval_rollouts=4)
    cells = run(replace(small, env=str(task), teacher_n=0), tmp_path / "run")
    assert set(cells) == {"heldout_full", "heldout_deploy"} and cells["heldout_full"]["reward"]["n"] == 4
    rollouts = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 2 * 8 + 2 * 4 and all(
        r["reward"] == pytest.approx(len(r["text"]) / 9) for r in rollouts[-8:]
    )
    assert read_jsonl(tmp_path / "run" / "verdicts.jsonl") == []
    assert not any(key.startswith("m_") for step in read_jsonl(tmp_path / "run" / "steps.jsonl") for key in step)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    reevaluate(tmp_path / "run", "test", None, console)
    text = console.export_text()
    assert text.count("no oracle") == 2 * 4 and f"{cells['heldout_full']['reward']['mean']:.3f} [" in text
    job = Job("routeV", 0, Config.read(tmp_path / "run" / "config.json"))
    (tmp_path / "run").rename(tmp_path / job.name)
    result = decision([job], tmp_path, job.cfg, {"cells": cells}, {"sandbox": "none"})
    table = result_table(result, {})
    assert [len(column._cells) for column in table.columns] == [2] * 14
    assert "deploy reward" in [column.header for column in table.columns]


def test_the_bars_read_a_run(smoke):
    out, _ = smoke
    bars = {bar.what.split(" (")[0]: bar for bar in stability_bars([out])}
    assert bars["numbers that are not finite"].value == 0 and bars["runs that did not finish"].ok
    assert all("run" in bar.what or bar.what.endswith("(none)") for bar in bars.values())
    solve = hint_free_solve(Config.read(out / "config.json"), out / "adapter.safetensors", rollouts=8)
    cells = json.loads((out / "eval.json").read_text())["cells"]
    assert 0 <= solve <= 1 and set(cells["heldout_deploy"]["modes"]["sentinel"]) == {"hack", "attempted", "solve"}
