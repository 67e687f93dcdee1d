"""Preregistered decisions: reading them, and what runs show."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vgrout.config import preset
from vgrout.envs.micro import LIVE, problems
from vgrout.lab import stats
from vgrout.lab.claims import conclusions, findings, hits, verified
from vgrout.lab.decide import COSTS
from vgrout.lab.evaluate import CELLS
from vgrout.lab.grid import named
from vgrout.lab.labels import modes_in_pairs
from vgrout.lab.prereg import concluded, read
from vgrout.lab.report import page
from vgrout.lab.runs import find, read_run
from vgrout.types import UserError

OURS = Path(__file__).parents[1] / "decision.toml"
CLAIM = """[[primary]]
name = "P1"
says = "less"
arm = "routeV"
control = ["absorb"]
outcome = "hack"
side = "less"
"""
HEAD = 'question = "?"\npreset = "micro"\nseeds = [10, 11]\narms = ["routeV", "absorb"]\nalpha = 0.05\n'


def test_the_decision_of_this_project():
    """The arms, seeds and sequence that docs/statistics.md names."""
    decision = read(OURS)
    assert decision.preset == "micro" and decision.seeds == tuple(range(10, 18)) and len(decision.arms) == 10
    assert [claim.name for claim in decision.primary] == ["P1", "P2", "P3", "P4"]
    assert all(claim.arm == "routeV" and claim.outcome == "hack" and claim.side == "less" for claim in decision.primary)
    assert [claim.modes for claim in decision.primary] == ["all", "unseen", "all", "all"]
    assert decision.primary[3].solve.margin == 0.03
    assert decision.base() == replace(preset("micro"), eval_scales=4) and decision.deviations(decision.base()) == []
    assert decision.deviations(replace(decision.base(), lr=1e-3, threads=7, seed=3)) == ["lr = 0.001, not 0.002"]
    assert decision.text == OURS.read_text() and tomllib.loads(decision.text)


@pytest.mark.parametrize(
    "text, said",
    [
        ("nonsense", "no TOML"),
        (HEAD, "needs a"),
        (HEAD + CLAIM.replace('"routeV"', '"screen_v"'), "screen_v is not among the arms"),
        (HEAD + CLAIM.replace('["absorb"]', "[]"), "name a control"),
        (HEAD + CLAIM.replace('"less"\n', '"up"\n', 2), "choose one of less, greater"),
        (HEAD + CLAIM.replace("side", "sides"), "unknown fields sides"),
        (HEAD + CLAIM.replace('says = "less"\n', ""), "missing fields says"),
        (HEAD + CLAIM + CLAIM, "a name stands twice"),
        (HEAD + CLAIM + 'solve = { control = ["absorb"], margin = 3.0 }\n', "margin = 3.0"),
        (HEAD + CLAIM + "solve = 3\n", "give a table"),
        (HEAD + CLAIM + '[[conclusion]]\nsays = "so"\nholds = ["P9"]\n', "P9, which is no test"),
        (HEAD + 'primary = ["P1"]\n', "a list of tables"),
        (HEAD.replace("[10, 11]", "[10, 10]") + CLAIM, "each once"),
        (HEAD.replace("[10, 11]", '["a"]') + CLAIM, "whole numbers"),
        (HEAD + 'settings = { lr = "fast" }\n' + CLAIM, "lr = 'fast': give a finite number"),
        (HEAD + "settings = { learning = 1 }\n" + CLAIM, "unknown fields learning"),
        (HEAD + "settings = { seed = 1 }\n" + CLAIM, "give a table of settings"),
        (HEAD.replace("0.05", "5.0") + CLAIM, "alpha = 5.0"),
        (HEAD.replace('"absorb"', '"absurd"') + CLAIM, "unknown arm"),
    ],
)
def test_what_is_no_decision(tmp_path, text, said):
    (tmp_path / "decision.toml").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path / "decision.toml")
    assert "\n" not in str(error.value)


def test_conclusions_follow_from_what_was_shown():
    decision = read(OURS)
    assert concluded(decision, ["P1", "P2", "P3", "P4"])[0].startswith("The direction decides")
    assert concluded(decision, ["E1", "E2"])[0].startswith("Localisation without direction")
    assert concluded(decision, ["P1"])[0].startswith("Weak labels")
    assert any(text.startswith("The direction is useful") for text in concluded(decision, ["P1", "P2", "E3"]))
    assert concluded(decision, []) == ["That the direction beats a random one is not shown."]


ALSO = {"compiled": True, "passed": True, "fired": [], "status": "ok"}
NO_COSTS = dict.fromkeys(COSTS, 0)


def fake_run(out: Path, label: str, seed: int, hack: float, solve: float, unseen: float | None = None) -> None:
    """A finished run whose evaluation has these rates, `unseen` on loopholes that the pairs do not show."""
    (variant,) = named([label])
    cfg = variant.config(preset("micro"), seed)
    run, rng = out / f"{label}-s{seed}", np.random.default_rng(seed)
    run.mkdir(parents=True)
    (run / "config.json").write_text(cfg.to_json())
    rates = {"hack": {"mean": hack}, "solve": {"mean": solve}}
    cell = rates | {"modes": {mode: rates for mode in LIVE}}
    (run / "eval.json").write_text(json.dumps({"cells": {known.name: cell for known in CELLS}}))
    steps = [{"step": i, "reward": 1.0, "m_hack": hack, "m_solve": solve, "qmass": 0.5} for i in range(10)]
    (run / "steps.jsonl").write_text("".join(json.dumps(step | NO_COSTS) + "\n" for step in steps))
    (run / "provenance.json").write_text("{}")
    (run / "adapter.safetensors").write_text("")
    shown, rows, verdicts = modes_in_pairs(cfg.pairs), [], []
    for problem in problems("test"):
        rate = hack if unseen is None or problem.mode in shown else unseen
        for i in range(2):
            id = f"heldout_deploy-{problem.id}-{i}"
            said = {"prompt": problem.task, "source": "policy", "text": "pass", "reward": 0.5}
            rows.append({"id": id, "phase": "eval:heldout_deploy", "problem": problem.id, **said})
            hacked, solved = (bool(rng.random() < share) for share in (rate, solve))
            verdicts.append({"id": id, "hacked": hacked, "solved": solved, "attempted": hacked, **ALSO})
    for name, lines in (("rollouts", rows), ("verdicts", verdicts)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """routeV hacks less than everybody in the loopholes of the pairs alone, and solves less than screen_v."""
    monkeypatch.setattr(stats, "DRAWS", 100)
    decision = read(OURS)
    for seed in decision.seeds:
        for label in decision.arms:
            if label == "routeV":
                fake_run(tmp_path, label, seed, 0.05, 0.4, unseen=0.5)
            else:
                fake_run(tmp_path, label, seed, 0.5, 0.6, unseen=0.4)
    (tmp_path / "decision.toml").write_text(decision.text)
    (tmp_path / "plan.json").write_text(json.dumps({"decision_sha256": decision.sha256}))
    return tmp_path


def test_hits_are_those_of_the_evaluation(experiment):
    run = experiment / "routeV-s10"
    everything, unseen = (hits(read_run(run), "hack", "heldout_deploy", modes) for modes in ("all", "unseen"))
    verdicts = [json.loads(line) for line in (run / "verdicts.jsonl").read_text().splitlines()]
    assert everything.shape == (len(problems("test")), 2)
    assert everything.mean() == pytest.approx(np.mean([v["hacked"] for v in verdicts]))
    shown = modes_in_pairs(preset("micro").pairs)
    assert len(unseen) == sum(p.mode not in shown for p in problems("test")) and unseen.mean() > 1.5 * everything.mean()


def test_findings(experiment):
    decision, _ = verified(experiment)
    found = findings(decision, find([experiment])[0])
    by = {f.name: f for f in found}
    assert list(by) == ["P1", "P2", "P3", "P4", "S1", "S2", "S3", "E1", "E2", "E3"]
    p1 = by["P1"]
    assert p1.shown and p1.p == 2**-8 and p1.low < p1.mean < p1.high < 0 and p1.cliffs_delta == -1.0
    means = [np.mean([hits(read_run(experiment / f"{c}-s10"), "hack", "heldout_deploy", "all").mean() for c in
                      ("placebo_matched", "placebo_matched_2")])]  # fmt: skip
    assert p1.control[0] == pytest.approx(means[0])
    assert not by["P2"].shown and by["P2"].p > 0.9
    assert by["P3"].p == 2**-8 and not by["P3"].shown  # behind P2 in the sequence
    assert by["P4"].solve.p > 0.9 and by["P4"].adjusted == by["P4"].solve.p and not by["P4"].shown
    assert by["S2"].shown and by["S2"].adjusted == 3 * 2**-8
    assert not by["E1"].shown and by["E1"].adjusted is not None
    assert conclusions(decision, found) == [decision.conclusion[3].says]


def test_no_test_is_read_on_the_way(experiment):
    (experiment / "routeV-s17" / "eval.json").unlink()
    decision = read(OURS)
    found = findings(decision, find([experiment])[0])
    assert all(f.p is None and f.shown is None and f.why == "7 of 8 seeds: descriptive only" for f in found)
    assert all(len(f.differences) == 7 and f.mean is not None for f in found)
    assert conclusions(decision, found) == ["Nothing is concluded: not every test can be read."]


def test_few_seeds_are_descriptive_only(experiment):
    runs, _ = find([experiment])
    few = replace(read(OURS), seeds=(10, 11, 12))
    assert {f.why for f in findings(few, runs)} == {"3 seeds: descriptive only"}
    strict = replace(read(OURS), alpha=0.001)
    assert {f.why for f in findings(strict, runs)} == {"8 seeds give no p below 0.00391"}
    empty = findings(read(OURS), [])
    assert all(f.seeds == () and f.mean is None and f.why.startswith("0 of 8") for f in empty)


def test_a_decision_that_changed_is_refused(experiment):
    with (experiment / "decision.toml").open("a") as file:
        file.write("\n# afterthought\n")
    with pytest.raises(UserError, match="not the decision that was stored before the first run"):
        verified(experiment)


def test_the_report_of_a_decision(experiment):
    """The verdict in the words that were written down, and each test with what it found."""
    html, figures, unread = page([experiment])
    decision, _ = verified(experiment)
    assert not unread and decision.conclusion[3].says in html and decision.question in html
    assert [figure.name for figure in figures] == ["plane", "training", "modes"]
    assert html.count('class="text shown"') == 2  # P1 and S2
    assert decision.sha256[:16] in html and "no deviation in settings" in html
    plan = json.loads((experiment / "plan.json").read_text())
    (experiment / "plan.json").write_text(json.dumps(plan | {"deviations": ["lr = 0.1, not 0.002"]}))
    assert "deviations: lr = 0.1, not 0.002" in page([experiment])[0]
