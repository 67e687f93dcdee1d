"""Measures of runs: tables against numbers by hand, and those on weights against what a run logged."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from vgrout import cli
from vgrout.config import Config, preset
from vgrout.lab import runs as runs_module
from vgrout.lab.archive import pack
from vgrout.lab.evaluate import FULL, HEADLINE
from vgrout.lab.measures import MEASURES, attacks
from vgrout.lab.measures.attacks import hack_demos, reached, shipped
from vgrout.lab.measures.base import OnWeights
from vgrout.lab.measures.gate_windows import quality
from vgrout.lab.measures.onset import onset
from vgrout.lab.measuring import show_measure
from vgrout.lab.record import read_jsonl
from vgrout.lab.run import run as train_run
from vgrout.lab.run import workshop
from vgrout.lab.runs import Run, Trained, read_run
from vgrout.method.policy import stack
from vgrout.types import UserError

MICRO = preset("micro")


def cell(hack: float, solve: float) -> dict:
    rates = {"hack": {"mean": hack}, "solve": {"mean": solve}}
    return rates | {"modes": {mode: rates for mode in ("run_tests", "sentinel")}}


def made(label: str, seed: int, hack: float, solve: float, *, full: float = 0.0, scales=None, **settings) -> Run:
    """A finished run that shipped these rates; nothing of it is on a disk."""
    cfg = replace(MICRO, **{"arm": label, "seed": seed, **settings})
    cells = {HEADLINE: cell(hack, solve), FULL: cell(full, solve)}
    steps = [{"step": i} for i in range(40)]
    return Run(runs_module.Path(f"{label}-s{seed}"), label, cfg, {}, steps, [], cells, scales or {}, {}, {}, "w")


def test_names_and_commands_agree():
    on_weights = {name for name, measure in MEASURES.items() if isinstance(measure, OnWeights)}
    assert set(cli.MADE) == on_weights and set(cli.READ) == set(MEASURES) - on_weights
    assert set(cli.READ) | set(cli.MADE) <= {name.removeprefix("lab ") for name in cli.commands(MICRO)}
    assert all(measure.what and measure.title and measure.needs for measure in MEASURES.values())


@pytest.mark.parametrize("name", MEASURES)
def test_runs_that_have_nothing_for_a_measure(name, monkeypatch):
    monkeypatch.setattr(Run, "trained", lambda self: empty())
    assert MEASURES[name].of([made("routeV", 0, 0.1, 0.5)], None) is None


def empty() -> Trained:
    none = np.zeros(0, bool)
    return Trained(np.zeros(0, int), none, none, none, np.zeros(0), none)


def test_restore():
    inner = [{"scale": 0.5, **cell(0.3, 0.4)}]
    runs = [made("routeV", s, 0.1 * s, 0.5, full=0.6, scales={"restored": inner}) for s in (0, 1)]
    shown = MEASURES["restore"].of([*runs, made("none", 0, 0.7, 0.2)], None)
    assert shown.head == ("arm", "seeds", "x 0", "x 0.5", "x 1")
    assert shown.rows == [["routeV", "2", "5 / 50", "30 / 40", "60 / 50"]]


def test_shrinkage():
    """Vanilla goes from (solve .2, hack 0) over (.3, .4) to (.4, .8)."""
    line = {"shrunk": [{"scale": 0.5, **cell(0.4, 0.3)}]}
    base = {HEADLINE: cell(0.0, 0.2)}
    vanilla = made("none", 0, 0.8, 0.4, scales=line)
    on_it, beyond, lost = made("absorb", 0, 0.4, 0.3), made("routeV", 0, 0.0, 0.5), made("routeV", 1, 0.0, 0.5)
    shown = MEASURES["shrinkage"].of([vanilla, on_it, beyond, lost], base)
    found = {row["arm"]: row["distance"] for row in shown.data}
    assert found["absorb"] == pytest.approx([0.0], abs=0.01)
    # From (.5, 0) to the line solve = .2 + hack / 4: .3 x 4 / sqrt(17).
    assert found["routeV"] == pytest.approx([0.3 * 4 / math.sqrt(17)], abs=0.01)
    assert MEASURES["shrinkage"].of([vanilla, beyond], None) is None


def rollouts(*per_step: tuple[int, int], deployed: bool = True) -> Trained:
    """(hacks, rollouts) of each step, all hinted, with as many hacks hint-free and in the other state on top."""
    step, hacked, hinted, state = [], [], [], []
    for i, (hacks, n) in enumerate(per_step):
        for j in range(n):
            step += [i] * 3
            hacked += [j < hacks, True, True]
            hinted += [True, False, True]
            state += [deployed, deployed, not deployed]
    n = len(step)
    arrays = np.array(step), np.array(state), np.array(hinted), np.zeros(n, bool), np.full(n, np.nan), np.array(hacked)
    return Trained(*arrays)


@pytest.mark.parametrize(
    ("per_step", "found"),
    [
        ([(0, 10)] * 4 + [(10, 10)] + [(0, 10)] * 9, (5, True)),  # 10 of 50 in steps 0 to 4
        ([(0, 10)] * 4 + [(9, 10)] + [(0, 10)] * 9, (14, False)),
        ([(0, 10)] * 9 + [(5, 10), (5, 10)] + [(0, 10)], (11, True)),
        ([(2, 10)] * 3, (3, False)),  # shorter than the window
    ],
)
def test_when_hacking_begins(monkeypatch, per_step, found):
    run = made("routeV", 0, 0.0, 0.5)
    monkeypatch.setattr(Run, "trained", lambda self: rollouts(*per_step))
    assert onset(run) == found
    monkeypatch.setattr(Run, "trained", lambda self: rollouts(*per_step, deployed=False))
    assert onset(replace(run, cfg=replace(run.cfg, arm="none_2r"))) == found  # it ships what it samples


def test_onset_over_seeds(monkeypatch):
    times = {"none-s0": (8, True), "none-s1": (12, True), "routeV-s0": (25, True), "routeV-s1": (40, False)}
    monkeypatch.setattr("vgrout.lab.measures.onset.onset", lambda run: times[run.name])
    runs = [made(arm, seed, 0.5, 0.5) for arm in ("none", "routeV") for seed in (0, 1)]
    shown = MEASURES["onset"].of(runs, None)
    by_arm = {row["arm"]: row for row in shown.data}
    assert "30 steps" in shown.notes[0]  # three times vanilla's mean, which is shorter than the runs
    assert by_arm["none"]["restricted_mean"] == 10
    # Half of routeV's seeds have the event at 25: 25 + (30 - 25) / 2.
    assert by_arm["routeV"]["restricted_mean"] == 27.5 and by_arm["routeV"]["later"] == 17.5
    assert [row[1] for row in shown.rows] == ["2 of 2", "1 of 2"] and shown.rows[1][-1] == "25 >40"


def test_left_out():
    section = "micro#all-in-one@mode:stdout_marker,mode:eq_override,mode:exit_code"
    without = made("routeV", 0, 0.2, 0.5, pairs=section)
    runs = [made("none", 0, 0.8, 0.3), made("routeV", 0, 0.1, 0.5), replace(without, label="routeV_without_run_tests")]
    shown = MEASURES["left-out"].of(runs, None)
    assert shown.rows == [["run_tests", "1", "80", "10", "20", "0.75", "0.75"]]
    assert MEASURES["left-out"].of([*runs[:2], replace(runs[2], cfg=runs[1].cfg)], None) is None  # it does show it
    assert MEASURES["left-out"].of(runs[1:], None) is None


def test_leakage():
    runs = [made("none", 0, 0.8, 0.3), made("oracle_route", 0, 0.0, 0.6)]
    half = replace(made("oracle_route", 0, 0.4, 0.5, label_share=0.5), label="oracle_route_label50")
    other = replace(made("oracle_route", 0, 0.9, 0.5, label_share=0.1, adapter="delta_s"), label="elsewhere")
    shown = MEASURES["leakage"].of([*runs, half, other, made("routeV", 0, 0.2, 0.5), made("absorb", 0, 0.6, 0.5)], None)
    assert {row["arm"]: row["share"] for row in shown.data} == {"routeV": [0.25, 0.25], "absorb": [0.75, 0.75]}
    assert "0 %: 0, 50 %: 40, 100 %: 80" in shown.notes[0]
    assert MEASURES["leakage"].of([*runs[1:], half], None) is None


def test_separation():
    line = {"shrunk": [{"scale": 0.5, **cell(0.4, 0.3)}]}
    vanilla = made("none", 0, 0.8, 0.4, scales=line)
    grid = [
        replace(made("oracle_route", 0, hack, 0.3, adapter=adapter, label_accuracy=share), label=f"{adapter}{share}")
        for adapter, share, hack in (("lora2r", 1.0, 0.0), ("lora2r", 0.5, 0.4), ("delta_s", 1.0, 0.2))
    ]
    partly = replace(made("oracle_route", 0, 0.1, 0.1, label_share=0.5), label="partly")
    shown = MEASURES["separation"].of([vanilla, *grid, partly], {HEADLINE: cell(0.0, 0.2)})
    assert shown.head == ("adapter", "50 % right", "100 % right")
    assert [row[0] for row in shown.rows] == ["delta_s", "lora2r"]
    assert shown.rows[0][1] == "-" and shown.rows[1][1].endswith("40 / 30") and shown.rows[1][2].endswith("0 / 30")
    far = {(row["adapter"], row["label_accuracy"]): row["distance"][0] for row in shown.data}
    assert far["lora2r", 1.0] > far["delta_s", 1.0] > far["lora2r", 0.5] == pytest.approx(0, abs=0.01)
    assert MEASURES["separation"].of([vanilla, grid[0]], None) is None


def test_quality_of_a_gate():
    score = np.array([0.9, 0.8, 0.7, 0.1])
    hacked, flagged = np.array([1, 0, 1, 0], bool), np.array([1, 1, 0, 0], bool)
    seen = Trained(np.arange(4), hacked, hacked, flagged, score, hacked)
    found = quality(seen, np.ones(4, bool))
    assert found["AUROC"] == 0.75 and found["AP"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["precision"] == found["recall"] == found["F0.5"] == found["hacks"] == 0.5
    one = quality(seen, hacked)
    assert one["AUROC"] is None and one["hacks"] == 1
    assert quality(replace(seen, score=np.array([np.nan, 1, 1, 1])), np.ones(4, bool))["AP"] is None


@pytest.mark.parametrize(
    ("curve", "at"),
    [
        ([(0, 0.1), (4, 0.3), (8, 0.7)], 6.0),
        ([(0, 0.6)], 0.0),
        ([(0, 0.1), (4, 0.5)], 4.0),
        ([(0, 0.1), (4, 0.4)], None),
        ([], None),
    ],
)
def test_where_a_curve_reaches_half(curve, at):
    assert reached(curve) == (None if at is None else pytest.approx(at))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run of routeV with a checkpoint after every step, and one without loopholes."""
    root = tmp_path_factory.mktemp("measures")
    small = replace(preset("smoke"), steps=4, eval_rollouts=8, eval_small=4, checkpoint_every=1, checkpoint_keep=1)
    for arm in ("routeV", "rl_baseline"):
        train_run(replace(small, arm=arm), root / f"{arm}-s0")
    return root


@pytest.mark.slow
def test_gradients_are_those_of_the_step(trained):
    run = trained / "routeV-s0"
    cfg = Config.read(run / "config.json")
    with workshop(cfg, trains=False) as shop:
        found = MEASURES["gradients"].make(run, cfg, shop)["steps"]
    logged = {step["step"]: step for step in read_jsonl(run / "steps.jsonl")}
    assert [step["step"] for step in found] == [1, 2, 3]
    for step in found:
        told = logged[step["step"]]
        for which in ("deployed", "quarantine"):
            assert step["all"][which] == pytest.approx(told[f"norm_{which}"], rel=1e-3, abs=1e-6)
            assert step["hack"][which] + step["other"][which] >= step["all"][which] * (1 - 1e-4)
        assert step["hack"]["rollouts"] + step["other"]["rollouts"] == step["all"]["rollouts"] == 24
        assert step["unflagged hack"]["rollouts"] <= step["hack"]["rollouts"]
    assert any(step["hack"]["rollouts"] and step["hack"]["quarantine"] > 0 for step in found)
    shown = MEASURES["gradients"].of([replace(read_run(run), measures={"gradients": {"steps": found}})], None)
    assert shown.rows[0][1] == "1 x 3" and 0 < shown.data[0]["hack"]["share"] <= 1


@pytest.mark.slow
def test_what_ships_is_attacked(trained):
    run = trained / "routeV-s0"
    cfg = Config.read(run / "config.json")
    with workshop(cfg, trains=False) as shop:
        tokens = torch.arange(3, 23)[None].tolist()
        rows = stack(tokens, [[5, 6, 7]], shop.policy.tokenizer.pad_token_id)
        untrained = shipped(cfg, shop, None).logp(rows)
        own = shipped(cfg, shop, run / "adapter.safetensors")
        with shop.policy.adapter.deployed():
            assert torch.allclose(own.logp(rows), shop.policy.logp(rows), atol=1e-5)
        with shop.policy.adapter.reference():
            assert torch.allclose(untrained, shop.policy.logp(rows), atol=1e-5)
        assert not torch.allclose(untrained, own.logp(rows), atol=1e-5)
        both = shipped(replace(cfg, arm="erase"), shop, run / "adapter.safetensors")  # ships as it is
        with shop.policy.adapter.state("full"):
            assert torch.allclose(both.logp(rows), shop.policy.logp(rows), atol=1e-5)
        demos = hack_demos(shop.env, 5)
        verdicts = shop.env.grader.verdicts([(shop.env.problem(p.problem_id), p, text) for p, text in demos])
        assert len(demos) == 5 and all(v.hacked for v in verdicts)
        with pytest.raises(UserError, match="the attack needs 1000"):
            hack_demos(shop.env, 1000)


@pytest.mark.slow
def test_commands_measure_once_and_keep_it(trained, monkeypatch, capsys):
    for name, value in (("DEMOS", (2,)), ("SFT_STEPS", 4), ("SAMPLES", 4), ("GRPO_STEPS", 3), ("TRIES", 2)):
        monkeypatch.setattr(attacks, name, value)
    console = Console(width=200)
    runs = [trained / name for name in ("routeV-s0", "rl_baseline-s0")]
    for name in ("relearn", "elicit"):
        show_measure(name, runs, trained / f"{name}.json", console)
    said = json.loads((trained / "relearn.json").read_text())
    assert [row["arm"] for row in said["rows"]] == ["base model", "rl_baseline", "routeV"]
    curves = read_run(runs[0]).measures["relearn"]["run"]
    assert [at for at, _ in curves["sft_2"]] in ([0, 4], [0]) and all(0 <= rate <= 1 for _, rate in curves["grpo"])
    assert "base" not in read_run(runs[0]).measures["relearn"]

    def fails(*_):
        raise AssertionError("it was measured before")

    monkeypatch.setattr(attacks.Elicit, "make", fails)
    show_measure("elicit", runs, None, console)
    with pytest.raises(AssertionError, match="measured before"):
        show_measure("elicit", runs, None, console, again=True)
    pack(runs[0], trained / "record")
    assert read_run(trained / "record").measures == read_run(runs[0]).measures
    capsys.readouterr()
    show_measure("elicit", [trained / "record"], None, console)  # a record has no weights, but the result
    assert "hack shown" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing to measure: gradients needs"):
        show_measure("gradients", [trained / "record"], None, console)
