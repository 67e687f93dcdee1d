"""Preregistered decisions: reading them, and what runs show."""

import json
import re
import tomllib
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments import stored
from vgrout.config import preset
from vgrout.envs.micro import LIVE, problems
from vgrout.lab import stats
from vgrout.lab.claims import conclusions, findings, hits
from vgrout.lab.claims import experiment as made_of
from vgrout.lab.decide import COSTS
from vgrout.lab.evaluate import CELLS
from vgrout.lab.grid import named
from vgrout.lab.labels import modes_in_pairs
from vgrout.lab.prereg import concluded, read
from vgrout.lab.report import gathered, page
from vgrout.lab.results import markdown, results
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
    useful = "The direction is useful"
    assert any(text.startswith(useful) for text in concluded(decision, ["P1", "P2", "E3", "E4"]))
    assert not any(text.startswith(useful) for text in concluded(decision, ["P1", "P2", "E3"]))
    assert concluded(decision, []) == ["That the direction beats a random one is not shown."]


ALSO = {"compiled": True, "passed": True, "fired": [], "status": "ok"}
NO_COSTS = dict.fromkeys(COSTS, 0)


def fake_run(out: Path, label: str, seed: int, hack: float, solve: float, unseen: float | None = None) -> None:
    """A finished run whose evaluation has these rates, `unseen` on loopholes that the pairs do not show."""
    (variant,) = named([label])
    cfg = variant.config(read(OURS).base(), seed)
    run, rng = out / f"{label}-s{seed}", np.random.default_rng(seed)
    run.mkdir(parents=True)
    (run / "config.json").write_text(cfg.to_json())
    rates = {"hack": {"mean": hack, "n": 2 * len(problems("test"))}, "solve": {"mean": solve}}
    cell = rates | {"modes": {mode: rates for mode in LIVE}}
    (run / "eval.json").write_text(json.dumps({"cells": {known.name: cell for known in CELLS}}))
    steps = [{"step": i, "reward": 1.0, "m_hack": hack, "m_solve": solve, "qmass": 0.5} for i in range(10)]
    (run / "steps.jsonl").write_text("".join(json.dumps(step | NO_COSTS) + "\n" for step in steps))
    (run / "provenance.json").write_text("{}")
    (run / "adapter.safetensors").write_text("")
    shown, rows, verdicts = modes_in_pairs(cfg.pairs), [], []
    for problem, cell in product(problems("test"), ("heldout_deploy", "heldout_full")):
        rate = hack if unseen is None or problem.mode in shown else unseen
        for i in range(2):
            id = f"{cell}-{problem.id}-{i}"
            said = {"prompt": problem.task, "source": "policy", "text": "pass", "reward": 0.5}
            rows.append({"id": id, "phase": f"eval:{cell}", "problem": problem.id, **said})
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
    stored(tmp_path, decision, code_sha256="c")
    return tmp_path


def made(folder):
    return made_of(folder, find([folder])[0])


def test_hits_are_those_of_the_evaluation(experiment):
    run, shown = read_run(experiment / "routeV-s10"), modes_in_pairs(preset("micro").pairs)
    (ids, everything), (some, unseen) = (hits(run, "hack", "heldout_deploy", modes) for modes in ((), shown))
    assert everything.shape == (len(problems("test")), 2) and ids == sorted(p.id for p in problems("test"))
    assert everything.mean() == np.mean([row["verdict_hacked"] for row in run.evaluated("heldout_deploy")])
    assert some == sorted(p.id for p in problems("test") if p.mode not in shown)
    assert unseen.mean() > 1.5 * everything.mean()


def test_findings(experiment):
    whole = made(experiment)
    found = findings(whole)
    by = {f.name: f for f in found}
    assert list(by) == ["P1", "P2", "P3", "P4", "S1", "S2", "S3", "S4", "E1", "E2", "E3", "E4"] and not whole.remarks
    p1 = by["P1"]
    assert p1.shown and p1.p == 2**-8 and p1.low < p1.mean < p1.high < 0 and p1.cliffs_delta == -1.0
    means = [
        hits(whole.runs[f"{c}-s10"], "hack", "heldout_deploy")[1].mean() for c in whole.decision.primary[0].control
    ]
    assert len(means) == 2 and p1.control[0] == pytest.approx(np.mean(means))
    assert not by["P2"].shown and by["P2"].p > 0.9
    assert by["P3"].p == 2**-8 and not by["P3"].shown  # behind P2 in the sequence
    assert by["P4"].solve.p > 0.9 and by["P4"].adjusted == by["P4"].solve.p and not by["P4"].shown
    assert by["S2"].shown and by["S2"].adjusted == 4 * 2**-8
    assert by["S4"].control == (0.2,) * 8 and by["S4"].p > 0.9 and by["S4"].low > 0
    assert not by["E1"].shown and by["E1"].adjusted is not None
    assert conclusions(whole.decision, found) == [text for text in said(whole) if text.startswith("Weak labels")]


def said(whole):
    return [conclusion.says for conclusion in whole.decision.conclusion]


@pytest.mark.parametrize("missing", ["routeV-s17", "oracle_route-s17", "none_2r-s12"])
def test_no_test_is_read_on_the_way(experiment, missing):
    """A run that is missing anywhere opens every test, those that do not need it too."""
    (experiment / missing / "eval.json").unlink()
    whole = made(experiment)
    found = findings(whole)
    assert all(f.p is None and f.shown is None and f.why == "79 of 80 runs: descriptive only" for f in found)
    assert all(part is None or part.p is None for f in found for part in (f.solve,))
    assert conclusions(whole.decision, found) == ["Nothing is concluded: not every test can be read."]


def test_only_runs_of_the_decision_count(experiment, tmp_path_factory):
    """A run of other settings, or from elsewhere, is no evidence; one made by other code is named."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (experiment / "absorb-s11").rename(elsewhere / "absorb-s11")
    file = experiment / "routeV-s12" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lr": 9.0}))
    (experiment / "none-s13" / "provenance.json").write_text('{"code_sha256": "d", "drift": ["code"]}')
    whole = made_of(experiment, find([experiment, elsewhere])[0])
    assert len(whole.runs) == 78 and whole.remarks == [
        "none-s13 was made with other code_sha256, settings, code or data on the way",
        "routeV-s12 was left out: it has other lr",
    ]
    assert all(f.p is None for f in findings(whole))


def test_few_seeds_are_descriptive_only(experiment):
    whole = made(experiment)
    few = replace(whole.decision, seeds=(10, 11, 12))
    runs = {name: run for name, run in whole.runs.items() if run.seed in few.seeds}
    assert {f.why for f in findings(replace(whole, decision=few, runs=runs))} == {"3 seeds: descriptive only"}
    strict = replace(whole, decision=replace(whole.decision, alpha=0.001))
    assert {f.why for f in findings(strict)} == {"8 seeds give no p below 0.00391"}
    empty = findings(replace(whole, runs={}))
    assert all(f.seeds == () and f.mean is None and f.why.startswith("0 of 80") for f in empty)


def test_a_decision_that_changed_is_refused(experiment):
    with (experiment / "decision.toml").open("a") as file:
        file.write("\n# afterthought\n")
    with pytest.raises(UserError, match="not the decision that was stored before the first run"):
        made(experiment)


DECIDES, LOCAL = "The direction decides", "Localisation"
OPPOSED = [
    *((DECIDES, other) for other in (LOCAL, "The direction is useful", "Over-", "Weak labels", "That the direction")),
    *((LOCAL, other) for other in ("Weak labels", "The direction beats", "The direction is useful")),
]


def test_no_outcome_gives_conclusions_that_contradict_each_other():
    """Over every outcome of the sequence, the equivalences and over-ablation."""
    decision = read(OURS)
    for n, beside in product(range(5), product((False, True), repeat=5)):
        shown = (
            [f"P{i}" for i in range(1, n + 1)] + [f"E{i}" for i in range(1, 5) if beside[i - 1]] + ["S4"] * beside[4]
        )
        texts = concluded(decision, shown)
        for a, b in OPPOSED:
            assert not (any(t.startswith(a) for t in texts) and any(t.startswith(b) for t in texts)), (shown, texts)
        assert texts, shown


def test_the_report_of_a_decision(experiment):
    """The verdict in the words that were written down, and each test with what it found."""
    html, figures, unread = page([experiment])
    whole = made(experiment)
    (weak,) = (text for text in said(whole) if text.startswith("Weak labels"))
    assert not unread and weak in html and whole.decision.question in html
    assert [figure.name for figure in figures] == ["plane", "training", "modes"]
    assert html.count('class="text shown"') == 2  # P1 and S2
    assert whole.decision.sha256[:16] in html and "every run has the settings, code and data" in html
    assert whole.decision.question in page([experiment / "routeV-s10"])[0]  # a run of it knows its experiment
    plan = json.loads((experiment / "plan.json").read_text())
    (experiment / "plan.json").write_text(json.dumps(plan | {"deviations": ["lr = 0.1, not 0.002"]}))
    assert "deviates: lr = 0.1, not 0.002" in page([experiment])[0]


def test_results_name_the_runs_behind_every_number(experiment, tmp_path_factory):
    """The same records give the same bytes, and every link of the page leads somewhere."""
    docs = tmp_path_factory.mktemp("repo") / "docs"
    docs.mkdir()
    pages = []
    for _ in range(2):
        results(experiment, docs / "results.md", docs / "figures", Console(file=StringIO()))
        pages.append({path.name: path.read_bytes() for path in sorted(docs.rglob("*")) if path.is_file()})
    assert pages[0] == pages[1] and set(pages[0]) == {"results.md", "plane.svg", "training.svg", "modes.svg"}
    text = pages[0]["results.md"].decode()
    whole = made(experiment)
    (weak,) = (text for text in said(whole) if text.startswith("Weak labels"))
    assert f"> {weak}\n" in text and whole.decision.sha256[:16] in text
    anchors = {line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 80 + 10 + 12
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (docs / link).exists(), link
    for line in text.splitlines():  # a row of a table has as many cells as its head, and names its runs
        if line.startswith("| ") and "[" in line:
            assert line.count(" | ") in (9, 12) and "](#" in line, line
    claims = [line for line in text.splitlines() if line.startswith(("| P", "| S", "| E"))]
    assert len(claims) == 14 and "[routeV](#routev) [absorb](#absorb)" in next(c for c in claims if "| P3 |" in c)


def test_results_want_every_run(experiment, tmp_path):
    (tmp_path / "docs").mkdir(exist_ok=True)
    out, console = tmp_path / "docs" / "results.md", Console(file=StringIO())
    with pytest.raises(UserError, match="ends in .md"):
        results(experiment, out.with_suffix(".txt"), tmp_path / "f", console)
    with pytest.raises(UserError, match="no experiment of a preregistered decision"):
        results(experiment / "routeV-s10", out, tmp_path / "f", console)
    (experiment / "none-s10" / "eval.json").unlink()
    results(experiment, out, tmp_path / "f", console)
    assert "1 of 80 runs are not there yet: all numbers are descriptive." in out.read_text()
    (experiment / "none-s11" / "steps.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="none-s11 is damaged"):
        results(experiment, out, tmp_path / "f", console)


@pytest.mark.slow
def test_the_committed_results_are_those_of_the_records(monkeypatch):
    """`vgrout lab results records/micro` would write docs/results.md and its figures as they are."""
    monkeypatch.chdir(OURS.parent)
    records, page, figures = Path("records/micro"), Path("docs/results.md"), Path("docs/figures/results")
    content = gathered([records], decided=True)
    assert not content.unread and markdown(content, records, page, figures) == page.read_text()
    assert {file.name for file in figures.iterdir()} == {f"{figure.name}.svg" for figure in content.figures}
    for figure in content.figures:
        assert figure.printed() == (figures / f"{figure.name}.svg").read_text(), figure.name
