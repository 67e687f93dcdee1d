"""The examples of docs/extending.md work (its mode: see test_modes.py)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import nn

from vgrout.adapters import ADAPTERS
from vgrout.adapters.base import BLOCKS, BlockLinear
from vgrout.arms import ARMS, Arm, hooks
from vgrout.arms.monitored import Monitored
from vgrout.arms.monitors import MONITORS, Monitor
from vgrout.config import preset
from vgrout.engines import ENGINES, Engine, make_engine
from vgrout.engines.base import states_of
from vgrout.engines.torch_engine import TorchEngine
from vgrout.envs.problems import problem_of, read_problems
from vgrout.envs.task import load_task
from vgrout.envs.worlds import WORLDS, World
from vgrout.lab.labels import problems_of
from vgrout.lab.measures.base import Measure, Shown
from vgrout.lab.parity import logp_parity
from vgrout.lab.run import check
from vgrout.lab.runs import Run
from vgrout.method.direction import DIRECTIONS, calibrate
from vgrout.method.gate import POLICIES, GatePolicy, decide, uniform
from vgrout.types import Decision, Rollout, UserError
from vgrout.verify import adapter_gates, toy
from vgrout.verify.toy import TOY, Letters, toy_train

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(opening: str, language: str = "python") -> str:
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", TEXT, re.S) if b.startswith(opening)]
    return found


def test_problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(block("{", "json"))
    (problem,) = read_problems(path)
    assert problem.mode == "run_tests" and len(problem.reward_tests) == len(problem.oracle_tests) == 1
    assert json.loads(path.read_text())["id"] == problem.id


def test_task(tmp_path):
    path = tmp_path / "haiku.py"
    path.write_text(block("PROMPTS"))
    env = load_task(path)
    assert len(env.problems("train")) == 2 and env.reward("", "a\nb\nc\n") == 1 and env.reward("", "a") == 0


def test_arm(monkeypatch):
    scope: dict = {"Arm": Arm, "Decision": Decision, "torch": torch}
    exec(block("class Halves"), scope)
    monkeypatch.setitem(ARMS, "halves", scope["Halves"])
    _, watcher = toy_train(replace(TOY, arm="halves", steps=1))
    assert watcher.decisions[0].zones() == ["keep", "absorb"] * 4


def test_monitor(monkeypatch):
    scope: dict = {"Monitor": Monitor, "Monitored": Monitored, "decide": decide}
    exec(block("class Short"), scope)
    monkeypatch.setitem(MONITORS, "length", scope["Short"])
    monkeypatch.setitem(ARMS, "screen_short", scope["ScreenShort"])
    assert scope["ScreenShort"].signal == "length" and hooks(scope["ScreenShort"]) == ("route",)
    _, watcher = toy_train(replace(TOY, arm="screen_short", steps=3))
    for decision in watcher.decisions:
        short = decision.score > decision.threshold[1]
        assert torch.equal(decision.flagged, short) and torch.equal(decision.weight, 1 - short.float())
    assert any(bool(decision.flagged.any()) for decision in watcher.decisions)


def test_adapter(monkeypatch):
    scope: dict = {"BlockLinear": BlockLinear, "BLOCKS": BLOCKS, "nn": nn, "torch": torch}
    exec(block("class Vera"), scope)
    monkeypatch.setitem(ADAPTERS, "vera", scope["Vera"])
    monkeypatch.setattr(adapter_gates, "VARIANTS", {"lora2r": {}, "vera": {"adapter": "vera"}})
    monkeypatch.setattr(toy, "VARIANTS", adapter_gates.VARIANTS)
    for gate in ("identity", "zeros", "detach", "mixture", "reference", "round_trip"):
        evidence = getattr(adapter_gates, gate)()
        assert evidence.ok, evidence.text
    _, watcher = toy_train(replace(TOY, adapter="vera"))
    assert watcher.records[-1]["v_accuracy"] > 0.5


def test_gate_policy(monkeypatch):
    scope: dict = {}
    exec(block("class AboveZero"), scope)
    monkeypatch.setitem(POLICIES, "batch_std", scope["AboveZero"])
    assert isinstance(scope["AboveZero"](TOY), GatePolicy)
    _, watcher = toy_train(replace(TOY, steps=1))
    (decision,) = watcher.decisions
    t_lo, t_hi = decision.threshold
    assert t_lo == 0 < t_hi and decision.route.tolist() == (decision.score > t_hi).tolist()


def test_engine(monkeypatch):
    scope: dict = {"Engine": Engine, "states_of": states_of}
    exec(block("class Server"), scope)

    def ask(self, prompt, state, max_new, temperature, u):
        how = {"max_new": max_new, "temperature": temperature, "uniforms": u[None]}
        return TorchEngine(self.model, self.tokenizer, self.adapter).generate([prompt], [1], state=state, **how)[0]

    scope["Server"].ask = ask
    monkeypatch.setitem(ENGINES, "torch", scope["Server"])  # the names in Config are fixed
    policy = toy.toy_policy(TOY)
    toy.displace(policy.adapter)
    engine = make_engine(TOY, policy.model, policy.tokenizer, policy.adapter)
    assert type(engine) is scope["Server"]
    found = logp_parity(TOY, policy, engine, [Letters().prompt("train-a", family="train", hinted=True, draw=0)], 4)
    assert found.ok and found.told_apart, found.lines()


def test_measure():
    scope: dict = {"Measure": Measure, "Shown": Shown, "mean": mean}
    exec(block("class Length"), scope)
    told = {"folder": Path("x"), "label": "x", "cfg": TOY, "evals": [], "cells": None, "scales": {}, "measures": {}}
    run = Run(**told, provenance={}, steps=[{"m_tokens": 3.0}, {"m_tokens": 4.0}], seconds={}, weights_sha256=None)
    measure = scope["Length"]()
    assert (
        measure.of([run], None).rows == [[f"x-s{TOY.seed}", "4"]] and measure.of([replace(run, steps=[])], None) is None
    )


def test_world(monkeypatch):
    scope: dict = {"problem_of": problem_of, "World": World, "WORLDS": {}}
    exec(block("def times"), scope)
    monkeypatch.setitem(WORLDS, "times", scope["WORLDS"]["times"])
    cfg = replace(preset("micro"), env="times", teacher_n=0)
    check(cfg)
    with pytest.raises(UserError, match="times has no demonstrations: set --teacher-n 0"):
        check(replace(cfg, teacher_n=1))
    env = WORLDS["times"].env(toy.sandbox(), loophole=True, modes=())
    prompt = env.prompt("times-22", family="eval")
    right = Rollout("r", prompt, "def f(n):\n    return 22 * n\n", (), (), 0)
    assert env.problems("test")[0] == "times-22" and env.grade([right])[0].reward == 3.5
    assert {p.id for p in problems_of(cfg, "test", {})} == set(env.problems("test"))


def test_arm_that_remembers(monkeypatch):
    scope: dict = {"Arm": Arm, "uniform": uniform}
    exec(block("class EveryOther"), scope)
    monkeypatch.setitem(ARMS, "every_other", scope["EveryOther"])
    _, watcher = toy_train(replace(TOY, arm="every_other", steps=3))
    assert [d.zones()[0] for d in watcher.decisions] == ["absorb", "keep", "absorb"]
    made = scope["EveryOther"].__new__(scope["EveryOther"])
    made.restore({"steps": 1})
    assert made.state() == {"steps": 1}


def test_direction():
    scope: dict = {"normalize": torch.nn.functional.normalize}
    exec(block("def middle"), scope)
    hack, clean = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    v = scope["middle"](hack + 3, clean)
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(3))
    assert calibrate(v, hack + 3, clean, real=True).accuracy == 1 and "v_grad" in DIRECTIONS
