"""Labels and what follows from them: errors and gaps, screening, penalties, coins and ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vgrout.arms import ARMS, Given
from vgrout.arms.monitored import ACTIONS
from vgrout.arms.monitors import Coin, Labels
from vgrout.loop import Training, collate
from vgrout.method.gate import ranked, uniform
from vgrout.method.loss import EPS, live_groups
from vgrout.types import Decision, OracleBatch, Prompt, Rollout
from vgrout.verify.toy import PAIRS, TOY, Letters, toy_policy, toy_train

LABELLED = ("oracle_route", "oracle_screen", "oracle_penalty")


@pytest.fixture(scope="module")
def policy():
    return toy_policy(TOY)


def rows(reward, group=None):
    made = [
        Rollout(str(i), Prompt("p", "u"), "x", (1,), (1, 1, 1), k, logp_old=(0.0,) * 3)
        for i, k in enumerate(group or [0] * len(reward))
    ]
    return collate(made, reward, 0)


def bench(policy, **changes):
    plain = Training(replace(TOY, arm="none"), policy, Letters(), PAIRS).arm.bench
    return replace(plain, cfg=replace(TOY, **changes))


def truth(hacked, mode=None):
    hacked = torch.tensor(hacked)
    return OracleBatch(hacked, ~hacked, tuple(mode or ("a",) * len(hacked)))


def arm(name, policy, **changes):
    return ARMS[name](bench(policy, arm=name, **changes))


def read(policy, oracle, step=0, **changes):
    n = len(oracle.hacked)
    return Labels(bench(policy, **changes)).read(step, rows([0.0] * n), oracle)


# Labels.


def test_exact_labels_are_the_truth(policy):
    oracle = truth([True, False, True, False])
    said = read(policy, oracle)
    assert said.route.tolist() == oracle.hacked.tolist() and said.keep.tolist() == oracle.solved.tolist()


def test_wrong_labels_are_as_many_as_stated(policy):
    """Each label is wrong by itself: the counts over 40 steps of 100 rows lie within 5 sd of their mean, either way."""
    oracle = truth([i % 3 == 0 for i in range(100)])
    for accuracy in (0.9, 0.7, 0.0):
        wrong = torch.stack([read(policy, oracle, s, label_accuracy=accuracy).route ^ oracle.hacked for s in range(40)])
        for part, n in ((wrong[:, oracle.hacked], 34), (wrong[:, oracle.solved], 66)):
            bound = 5 * (40 * n * accuracy * (1 - accuracy)) ** 0.5
            assert abs(float(part.sum()) - 40 * n * (1 - accuracy)) <= bound
        assert accuracy == 0 or not torch.equal(wrong[0], wrong[1])  # drawn anew in each step


def test_labels_are_missing_as_often_as_stated(policy):
    oracle = truth([i % 2 == 0 for i in range(100)])
    for known in (0.5, 0.1, 0.0):
        said = [read(policy, oracle, s, label_share=known) for s in range(40)]
        unsure = torch.stack([d.absorb for d in said])
        assert abs(float(unsure.sum()) - 4000 * (1 - known)) <= 5 * (4000 * known * (1 - known)) ** 0.5
        assert all(bool((d.route == (oracle.hacked & ~d.absorb)).all()) for d in said)  # the others are right


def test_hacks_of_unlabelled_modes_pass_for_honest(policy):
    oracle = truth([True, True, False, True], ["a", "b", "a", "c"])
    said = read(policy, oracle, label_modes=("b", "x"))
    assert said.zones() == ["keep", "route", "keep", "keep"]
    blind = read(policy, oracle, label_modes=("x",))
    assert blind.keep.all()
    noisy = torch.stack(
        [read(policy, truth([True] * 80), s, label_modes=("x",), label_accuracy=0.9).route for s in range(40)]
    )
    assert abs(float(noisy.sum()) - 320) <= 5 * (3200 * 0.1 * 0.9) ** 0.5  # and are taken for hacks as honest rows are


def test_errors_have_a_generator_of_their_own(policy):
    oracle = truth([True, False] * 20)
    torch.manual_seed(5), np.random.seed(5)  # the type checker of the tests draws from Python's own generator
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    noise = {"label_accuracy": 0.6, "label_share": 0.7}
    first = read(policy, oracle, **noise)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(6)
    assert read(policy, oracle, **noise).zones() == first.zones()
    assert read(policy, oracle, **noise, placebo_seed=9).zones() != first.zones()
    assert read(policy, oracle, **noise, seed=9).zones() != first.zones()


@pytest.mark.parametrize("name", LABELLED)
def test_arms_train_on_labels(name):
    _, watcher = toy_train(replace(TOY, arm=name, label_accuracy=0.8, label_share=0.8))
    flagged = sum(int(d.flagged.sum()) for d in watcher.decisions)
    assert 0 < flagged < sum(len(d.m) for d in watcher.decisions)
    for d, seen in zip(watcher.decisions, watcher.rollouts, strict=True):
        assert len(d.m) == len(seen)
        assert d.present.all() or name == "oracle_screen"
        assert not d.penalty.any() or name == "oracle_penalty"
        assert not d.m.any() or name == "oracle_route"


# What follows: screening.


def grouped(reward, group, present=None, sd=True):
    """Group advantages by numpy, of present rows alone."""
    reward, group = np.array(reward, float), np.array(group)
    present = np.ones(len(reward), bool) if present is None else np.array(present)
    out = np.zeros(len(reward))
    for k in set(group):
        mine = (group == k) & present
        if mine.any() and reward[mine].std() > 0:
            out[mine] = (reward[mine] - reward[mine].mean()) / (reward[mine].std() + EPS if sd else 1)
    return out


REWARD, GROUP = [3.5, 0.5, 0.0, 3.5, 3.5, 0.5, 0.5, 3.5], [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("advantage", ["sd", "mean"])
def test_screened_rows_leave_their_groups_statistics(policy, advantage):
    hacked = [True, False, False, False, True, False, False, True]
    made, batch = arm("oracle_screen", policy, advantage=advantage), rows(REWARD, GROUP)
    decision = made.route(0, batch, truth(hacked))
    assert decision.present.tolist() == [not h for h in hacked] and decision.flagged.tolist() == hacked
    found = made.credit(batch, batch.reward, decision)
    want = grouped(REWARD, GROUP, [not h for h in hacked], advantage == "sd")
    assert np.allclose(found.numpy(), want, atol=1e-5) and not found[torch.tensor(hacked)].any()
    assert not np.allclose(want, grouped(REWARD, GROUP, sd=advantage == "sd") * [not h for h in hacked], atol=1e-2)
    # Group 1 keeps two rows of one reward: no variance is left, and neither loss nor KL.
    assert live_groups(batch.reward, batch.group, decision.present).tolist() == [False] + [True] * 3 + [False] * 4


def test_a_fully_screened_group_is_skipped():
    """And a step in which every group is: no loss, no NaN, nothing moves."""
    policy, watcher = toy_train(replace(TOY, arm="oracle_screen", label_accuracy=1.0, steps=3))
    assert all(np.isfinite(r["loss"]) for r in watcher.records)
    made, batch = arm("oracle_screen", policy), rows(REWARD, GROUP)
    decision = made.route(0, batch, truth([True] * 4 + [False] * 4))
    found = made.credit(batch, batch.reward, decision)
    assert not found[:4].any() and bool(found[4:].any()) and bool(torch.isfinite(found).all())
    assert live_groups(batch.reward, batch.group, decision.present).tolist() == [False] * 4 + [True] * 4


def test_a_step_without_a_present_row_moves_nothing(monkeypatch):
    monkeypatch.setitem(ACTIONS, "screen", lambda read, cfg: replace(uniform(len(read.m), "keep"), weight=0 * read.m))
    policy, watcher = toy_train(replace(TOY, arm="oracle_screen", steps=2))
    assert all(r["loss"] == 0 and r["norm_deployed"] == 0 and r["flagged"] == 1 for r in watcher.records)
    assert not any(bool(p.any()) for p in policy.adapter.parameters("deployed"))


# Penalties.


@pytest.mark.parametrize("size", [3.0, 3.5])
def test_penalties_come_before_the_groups_statistics(policy, size):
    hacked = [True, False, False, False, True, False, False, True]
    made, batch = arm("oracle_penalty", policy, penalty=size), rows(REWARD, GROUP)
    decision = made.route(0, batch, truth(hacked))
    assert decision.keep.all() and decision.present.all() and decision.flagged.tolist() == hacked
    assert decision.penalty.tolist() == [size * h for h in hacked]
    found = made.credit(batch, batch.reward, decision)
    lowered = np.array(REWARD) - size * np.array(hacked)
    assert np.allclose(found.numpy(), grouped(lowered, GROUP), atol=1e-5)
    # 3.0 leaves a paid hack at the reward of a program that compiles: group 1 has no variance left. 3.5 does.
    live = live_groups(batch.reward - decision.penalty, batch.group, decision.present)
    assert live.tolist() == [True] * 4 + [size == 3.5] * 4
    assert bool(found[4:].any()) == (size == 3.5)


# The same by score.


def zones_of(name):
    _, watcher = toy_train(replace(TOY, arm=name, steps=1))
    return watcher.decisions[0]


def test_screen_v_and_penalty_v_act_on_what_routeV_routes():
    routed, screened, fined = (zones_of(name) for name in ("routeV", "screen_v", "penalty_v"))
    assert 0 < int(routed.route.sum()) < len(routed.m)
    assert torch.equal(routed.score, screened.score) and routed.threshold == fined.threshold
    assert screened.flagged.tolist() == fined.flagged.tolist() == routed.route.tolist()
    assert screened.weight.tolist() == (~routed.route).float().tolist() and screened.keep.all()
    assert (
        fined.penalty.tolist() == (TOY.penalty * routed.route).tolist()
        and fined.weight.eq(1).all()
        and fined.keep.all()
    )


def test_unsure_rows_train_as_any_other_where_nothing_is_routed(policy):
    oracle = truth([True, False] * 10)
    for name in ("oracle_screen", "oracle_penalty"):
        decision = arm(name, policy, label_share=0.0).route(0, rows([0.0] * 20), oracle)
        assert decision.keep.all() and decision.present.all() and not decision.penalty.any()
    assert arm("oracle_route", policy, label_share=0.0).route(0, rows([0.0] * 20), oracle).absorb.all()


# Chance and ranks.


def test_the_coin_has_its_shares_or_its_counts(policy):
    made = bench(policy, coin_route=0.3, coin_absorb=0.2)
    said = [Coin(made).read(s, rows([0.0] * 100), None) for s in range(40)]
    for zone, p in (("route", 0.3), ("absorb", 0.2), ("keep", 0.5)):
        n = sum(int(getattr(d, zone).sum()) for d in said)
        assert abs(n - 4000 * p) <= 5 * (4000 * p * (1 - p)) ** 0.5, zone
    yoked = Coin(replace(made, given=Given(yoke=[(3, 2), (0, 0), (90, 20)])))
    for step, want in enumerate(((3, 2, 95), (0, 0, 100), (90, 10, 0))):
        d = yoked.read(step, rows([0.0] * 100), None)
        assert (int(d.route.sum()), int(d.absorb.sum()), int(d.keep.sum())) == want and d.score is None
    assert (
        yoked.read(0, rows([0.0] * 100), None).zones()
        != Coin(replace(yoked.bench, given=Given(yoke=[(3, 2)] * 2))).read(1, rows([0.0] * 100), None).zones()
    )


def test_ranks():
    score, live = torch.tensor([0.5, 2.0, -1.0, 9.0, 1.0]), torch.tensor([True, True, True, False, True])
    assert ranked(score, live, 2, 1).zones() == ["keep", "route", "keep", "absorb", "route"]  # the dead row is the one
    assert ranked(score, live, 2, 2).zones() == ["absorb", "route", "keep", "absorb", "route"]
    assert ranked(score, live, 9, 9).zones() == ["route", "route", "route", "absorb", "route"]
    assert ranked(score, live, 0, 0).zones() == ["keep", "keep", "keep", "absorb", "keep"]
    assert ranked(torch.zeros(3), torch.ones(3, dtype=torch.bool), 1, 1).zones() == [
        "route",
        "absorb",
        "keep",
    ]  # in order
    assert isinstance(ranked(score, live, 1, 1), Decision)
