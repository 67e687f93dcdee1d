"""The gate of interrupted runs: stopped, saved, read back into other hands, and as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from vgrout.adapters import ADAPTERS
from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.lab.checkpoint import Checkpoint, save, whole
from vgrout.loop import Training
from vgrout.method.gate import POLICIES, Remembers
from vgrout.signals import Interrupted
from vgrout.types import Graded, Rollout
from vgrout.verify.evidence import Evidence
from vgrout.verify.toy import PAIRS, TOY, Letters, Watcher, toy_given, toy_policy

STEPS, STOP = 6, 4


class Halt(Watcher):
    """Ends training after STOP steps."""

    def checkpoint(self, step: int) -> None:
        if step == STOP:
            raise Interrupted(signal.SIGTERM)


def step_of(rollouts: Sequence[Rollout]) -> int:
    return int(rollouts[0].id.split("-")[0])


class Mute(Letters):
    """Scores nothing from the step before the stop on: steps are skipped on both sides of it."""

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        graded = super().grade(rollouts)
        return graded if step_of(rollouts) < STOP - 1 else [replace(g, reward=None) for g in graded]


class Reformed(Letters):
    """Sees no hack after the stop: the quarantine gets no gradient any more."""

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        graded = super().grade(rollouts)
        none = SimpleNamespace(hacked=False)
        return graded if step_of(rollouts) < STOP else [replace(g, sealed=none) for g in graded]


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys of two states whose values are not the same, bit for bit."""

    def equal(x: Any, y: Any) -> bool:
        return type(x) is type(y) and (torch.equal(x, y) if isinstance(x, Tensor) else x == y)

    return sorted(key for key in {*a, *b} if key not in a or key not in b or not equal(a[key], b[key]))


def toy_training(cfg: Config, env: Letters) -> Training:
    policy = toy_policy(cfg)
    return Training(cfg, policy, env, PAIRS, toy_given(cfg, policy))


def in_two(cfg: Config, env: type[Letters]) -> tuple[dict[str, Any], list[dict], list[str]]:
    """Of a run that is stopped, and that goes on from its checkpoint in a new model: its last state, its records, and
    what of its state did not come back."""
    watchers = Halt(), Watcher()
    first = toy_training(cfg, env())
    with suppress(Interrupted):
        first.run(watchers[0])
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        save(Path(folder), Checkpoint(first.step, first.state(), {}, {}), 0)
        torch.rand(7), random.random()  # a new process has other global generators
        second = toy_training(cfg, env())
        second.restore(next(whole(Path(folder))).state)
        lost = unlike(first.state(), second.state())
        second.run(watchers[1])
    return second.state(), [record for watcher in watchers for record in watcher.records], lost


def resume() -> Evidence:
    cases: dict[str, tuple[dict[str, str], type[Letters]]] = {arm: ({"arm": arm}, Letters) for arm in ARMS}
    for name, kind in POLICIES.items():
        if issubclass(kind, Remembers):
            cases[f"routeV with {name}"] = {"policy": name}, Letters
    cases["sgd"] = {"arm": "oracle_route", "optimizer": "sgd"}, Letters
    cases["skipped steps"] = {"arm": "none"}, Mute
    for what in get_args(get_type_hints(Config)["masked_block"]):
        cases[f"no gradient, {what}"] = {"arm": "oracle_route", "masked_block": what}, Reformed
    for kind in ADAPTERS:
        cases[kind] = {"adapter": kind}, Letters
    cases["signed_corda"] = {"init": "signed_corda", "detach": "params"}, Letters
    wrong = []
    for name, (changes, env) in cases.items():
        # The stop lies between two extractions of the direction, so that the old one is needed.
        cfg = replace(TOY, steps=STEPS, checkpoint_every=1, refresh_every=3, buffer=12, **changes)
        usual, watcher = toy_training(cfg, env()), Watcher()
        usual.run(watcher)
        state, records, lost = in_two(cfg, env)
        if lost:
            wrong.append(f"{name}: {', '.join(lost[:3])} did not come back")
        if other := unlike(usual.state(), state):
            wrong.append(f"{name}: other {', '.join(other[:3])}")
        if json.dumps(records) != json.dumps(watcher.records):
            wrong.append(f"{name}: other records")
    return Evidence(
        not wrong,
        f"{'; '.join(wrong[:4]) or 'states and records equal bit for bit'}: {len(cases)} arms, policies and cases, "
        f"stopped after {STOP} of {STEPS} steps",
    )
