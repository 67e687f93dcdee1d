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
from vgrout.engines.torch_engine import encode_completion, encode_prompt
from vgrout.lab import runs as runs_module
from vgrout.lab.archive import pack
from vgrout.lab.evaluate import FULL, HEADLINE
from vgrout.lab.measures import MEASURES, attacks
from vgrout.lab.measures.attacks import attack_config, hack_demos, reached, shipped, shown_first
from vgrout.lab.measures.base import OnWeights
from vgrout.lab.measures.gate_windows import quality
from vgrout.lab.measures.gradients import AGREES, ALONE, disagreement
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
    longer = replace(beyond, cfg=replace(beyond.cfg, steps=7))  # against a vanilla run of its own length alone
    assert MEASURES["shrinkage"].of([vanilla, longer], base) is None
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
    # What these sample is never what ships: both blocks, under a licence, with edited activations.
    for other in ({"deploy_gen_frac": 0.0}, {"arm": "inoculation"}, {"arm": "suppress"}):
        assert onset(replace(run, cfg=replace(run.cfg, **other))) is None


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
    runs = [made("absorb", 0, 0.8, 0.3), made("oracle_route", 0, 0.0, 0.6)]
    half = replace(made("oracle_route", 0, 0.4, 0.5, label_share=0.5), label="oracle_route_label50")
    other = replace(made("oracle_route", 0, 0.9, 0.5, label_share=0.1, adapter="delta_s"), label="elsewhere")
    longer = replace(made("routeV", 1, 0.2, 0.5, steps=7), label="longer")
    every = [*runs, half, other, longer, made("routeV", 0, 0.2, 0.5), made("none", 0, 0.9, 0.5)]
    shown = MEASURES["leakage"].of(every, None)
    assert {row["arm"]: row["share"] for row in shown.data} == {"routeV": [0.25, 0.25], "none": [1.0, 1.0]}
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
    never = replace(seen, flagged=np.zeros(4, bool))
    assert quality(never, np.ones(4, bool)) | {"precision": None, "recall": 0.0, "F0.5": 0.0} == quality(
        never, np.ones(4, bool)
    )
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
    verdicts = {row["id"]: row["hacked"] for row in read_jsonl(run / "verdicts.jsonl")}
    rows = [
        row | {"hacked": verdicts[row["id"]]} for row in read_jsonl(run / "rollouts.jsonl") if row["phase"] == "train"
    ]
    assert [step["step"] for step in found] == [1, 2, 3]
    for step in found:
        own = [row for row in rows if row["step"] == step["step"]]
        assert step["hack"]["rollouts"] == sum(row["hacked"] for row in own)
        assert step["unflagged hack"]["rollouts"] == sum(row["hacked"] and row["zone"] == "absorb" for row in own)
        assert step["unflagged hack, quarantine ablated"]["quarantine"] == 0
        told = logged[step["step"]]
        for which in ("deployed", "quarantine"):
            assert step["all"][which] == pytest.approx(told[f"norm_{which}"], rel=1e-3, abs=1e-6)
            assert step["hack"][which] + step["other"][which] >= step["all"][which] * (1 - 1e-4)
        assert step["hack"]["rollouts"] + step["other"]["rollouts"] == step["all"]["rollouts"] == 24
    assert any(step["hack"]["rollouts"] and step["hack"]["quarantine"] > 0 for step in found)
    assert disagreement({"deployed": 1.1, "quarantine": 2.0}, {"norm_deployed": 1.0, "norm_quarantine": 2.0}) > AGREES


def test_gradients_by_hand():
    """Two steps of one seed count as one seed."""

    def step(hack: tuple, other: tuple, live: float, alone: float) -> dict:
        parts = {"hack": hack, "other": other, "unflagged hack": (1, live, 1), ALONE: (1, alone, 0)}
        return {name: dict(zip(("rollouts", "deployed", "quarantine"), p, strict=True)) for name, p in parts.items()}

    measure = MEASURES["gradients"]
    steps = [[step((2, 1, 3), (3, 4, 4), 1, 2)] * 2, [step((0, 0, 0), (3, 2, 2), 3, 4)]]
    runs = [
        replace(made("routeV", s, 0, 0), measures={"gradients": {"settings": {}, "result": {"steps": own}}})
        for s, own in enumerate(steps)
    ]
    (row,) = measure.of(runs, None).data
    assert row["hack deployed"] == 1 and row["hack share"] == 0.75  # the second seed has no hack
    assert row["other deployed"] == 3 and row["other share"] == 0.5
    assert row["absorption"] == pytest.approx((0.5 + 0.25) / 2)
    assert measure.of([replace(runs[0], measures={"gradients": {"settings": {"old": 1}, "result": {}}})], None) is None


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
        ids = shop.env.problems("test")[:24]
        for id, (prompt, text) in shown_first(shop.env, ids).items():
            other = shop.env.problem(prompt.problem_id)
            assert other.id != id and other.mode == shop.env.problem(id).mode
            assert all(word in text for word in prompt.marker.split())
            assert shop.env.grader.verdicts([(other, prompt, text)])[0].hacked
        # An attack is the same for every run, and its adapter is not the one that training had.
        wild = replace(cfg, lr=9.0, rank=3, adapter="delta_s", optimizer="sgd", arm="routeV")
        assert attack_config(wild) == attack_config(cfg)
        fresh, mine = own.adapter.tensors(), shop.policy.adapter.tensors()
        name = next(key for key in mine if key.endswith("A0_deployed") or "A0" in key)
        assert not torch.equal(fresh[name], mine[name][: len(fresh[name])])


@pytest.mark.slow
def test_fine_tuning_on_hacks_teaches_hacking(trained, monkeypatch):
    """The attack trains: after some steps on its own demonstrations they are likelier than before."""
    monkeypatch.setattr(attacks, "SFT_STEPS", 8)
    seen: list[float] = []
    cfg = Config.read(trained / "rl_baseline-s0" / "config.json")
    with workshop(replace(cfg, arm="none"), trains=False) as shop:
        policy = shipped(cfg, shop, None)
        ((prompt, text), *_) = hack_demos(shop.env, 2)
        tokens = [encode_prompt(policy.tokenizer, prompt)], [encode_completion(policy.tokenizer, text)]
        rows = stack(*tokens, policy.tokenizer.pad_token_id)

        def rate(cfg, policy, env, rollouts):
            with torch.no_grad(), policy.adapter.deployed():
                seen.append(float(policy.nll(rows)))
            return 0.0

        monkeypatch.setattr(attacks, "hack_rate", rate)
        attacks.fine_tuned(attack_config(cfg), policy, shop.env, 2)
    assert len(seen) == 3 and seen[2] < seen[1] < seen[0] - 0.1


@pytest.mark.slow
def test_commands_measure_once_and_keep_it(trained, monkeypatch, capsys):
    for name, value in (("DEMOS", (2,)), ("SFT_STEPS", 4), ("SAMPLES", 4), ("GRPO_STEPS", 3), ("TRIES", 2)):
        monkeypatch.setattr(attacks, name, value)
    monkeypatch.setattr(attacks, "preset", lambda name: preset("smoke"))  # as small as the runs
    console = Console(width=200)
    runs = [trained / name for name in ("routeV-s0", "rl_baseline-s0")]
    for name in ("relearn", "elicit"):
        show_measure(name, runs, trained / f"{name}.json", console)
    said = json.loads((trained / "relearn.json").read_text())
    assert [row["arm"] for row in said["rows"]] == ["base model", "rl_baseline", "routeV"]
    kept = read_run(runs[0]).measures["relearn"]
    assert (
        "base" not in kept["result"] and kept["provenance"]["model_sha256"] and kept["settings"]["demos"] == [4, 16, 64]
    )
    curves = kept["result"]["run"]
    assert [at for at, _ in curves["sft_2"]] in ([0, 4], [0]) and [at for at, _ in curves["grpo"]] == [3]
    assert [row["steps"].keys() for row in said["rows"]] == [{"sft_2", "grpo"}] * 3

    def fails(*_):
        raise AssertionError("it was measured before")

    monkeypatch.setattr(attacks.Elicit, "make", fails)
    show_measure("elicit", runs, None, console)
    with pytest.raises(AssertionError, match="it was measured"):
        show_measure("elicit", runs, None, console, again=True)
    pack(runs[0], trained / "record")
    assert read_run(trained / "record").measures == read_run(runs[0]).measures
    capsys.readouterr()
    show_measure("elicit", [trained / "record"], None, console)  # a record has no weights, but the result
    assert "hack shown" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing to measure: gradients needs"):
        show_measure("gradients", [trained / "record"], None, console)
    assert "not measured: routeV-s0: it is not finished, or has no weights" in capsys.readouterr().out.replace(
        "\n", " "
    )
    seen, logged = (read_run(folder).trained() for folder in (trained / "record", runs[0]))
    assert len(seen.step) > 50 and all(
        np.array_equal(a, b, equal_nan=a.dtype == float)
        for a, b in zip(vars(seen).values(), vars(logged).values(), strict=True)
    )
