"""What the loop's gates leave open: plans, generation, collation, schedules and divergence."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from vgrout.arms import ARMS
from vgrout.engines.torch_engine import TorchEngine
from vgrout.loop import (
    Diverged,
    backward,
    clip_blocks,
    collate,
    generate,
    make_optimizer,
    micro_batches,
    plan_step,
    rate,
    train,
)
from vgrout.method.gate import decide, uniform
from vgrout.method.policy import Rows
from vgrout.types import Graded, Prompt, Rollout
from vgrout.verify.toy import PAIRS, TOY, Letters, Watcher, displace, toy_policy, toy_train, weights

AFTER = replace(TOY, teacher_off_step=0)


def test_plan_follows_seed_and_step():
    a, b = (plan_step(AFTER, Letters(), 3, loophole=True) for _ in range(2))
    random.seed(9)
    assert a == b == plan_step(AFTER, Letters(), 3, loophole=True)
    plans = {plan_step(replace(AFTER, seed_data=s), Letters(), 3, loophole=True).prompts for s in range(8)}
    assert len(plans) > 4


def test_every_problem_once_an_epoch():
    seen = [p.problem_id for s in range(8) for p in plan_step(AFTER, Letters(), s, loophole=True).prompts]
    assert set(Counter(seen[:8]).values()) == {1} and set(Counter(seen[8:]).values()) == {1}
    assert seen[:8] != seen[8:]


def test_hint_free_share_is_redrawn():
    cfg = replace(AFTER, unhackable_frac=0.25)
    flags = [[p.hinted for p in plan_step(cfg, Letters(), s, loophole=True).prompts] for s in range(400)]
    share = sum(not h for row in flags for h in row) / 800
    assert 0.2 < share < 0.3
    closed = plan_step(AFTER, Letters(), 1, loophole=False)
    assert not any(p.hinted for p in closed.prompts)


def test_teacher_phase():
    cfg = replace(TOY, unhackable_frac=1.0)
    taught = plan_step(cfg, Letters(), 1, loophole=True)
    assert all(p.hinted for p in taught.prompts) and all(len(d) == 2 for d in taught.demos)
    assert all(len(d) == 0 for d in plan_step(cfg, Letters(), 2, loophole=True).demos)
    assert all(len(d) == 0 for d in plan_step(replace(cfg, teacher_n=0), Letters(), 1, loophole=True).demos)


def rollouts_of(cfg, *, ablates=True, step=0):
    policy = toy_policy(cfg)
    displace(policy.adapter)
    engine = TorchEngine(policy.model, policy.tokenizer, policy.adapter)
    plan = plan_step(cfg, Letters(), step, loophole=True)
    return policy, generate(cfg, engine, plan, step, ablates=ablates)


@pytest.mark.parametrize(
    ("share", "ablates", "deployed"), [(1.0, True, 4), (0.5, True, 2), (0.0, True, 0), (1, False, 0)]
)
def test_states_that_sample(share, ablates, deployed):
    _, rollouts = rollouts_of(replace(AFTER, deploy_gen_frac=share), ablates=ablates)
    assert [r.group for r in rollouts] == [0] * 4 + [1] * 4
    assert Counter(r.state for r in rollouts if r.group == 0)["deployed"] == deployed
    assert len({r.id for r in rollouts}) == 8


def test_demonstrations_come_first_and_have_no_sampler():
    _, rollouts = rollouts_of(TOY)
    assert [r.source for r in rollouts[:4]] == ["teacher", "teacher", "policy", "policy"]
    assert all((r.logp_old is None) == (r.source == "teacher") for r in rollouts)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_sampler_and_trainer_agree(share):
    policy, rollouts = rollouts_of(replace(AFTER, deploy_gen_frac=share))
    batch = collate(rollouts, [0.0] * 8, policy.tokenizer.pad_token_id)
    with policy.adapter.state(rollouts[0].state):
        logp = policy.logp(Rows(batch.tokens, batch.completion, batch.length))
    assert torch.allclose(logp, batch.logp_old, atol=1e-4)
    assert batch.completion.sum() == sum(len(r.tokens) for r in rollouts)


@torch.no_grad()
def test_samples_do_not_depend_on_their_neighbours(monkeypatch):
    policy = toy_policy(TOY)
    engine = TorchEngine(policy.model, policy.tokenizer, policy.adapter)
    prompts, u = [[7, 8, 9, 10], [11, 12]], torch.rand(5, 6, generator=torch.Generator().manual_seed(0))

    def tokens(part, counts, rows):
        return [
            s.tokens for s in engine.generate(part, counts, state="full", max_new=6, temperature=1.0, uniforms=rows)
        ]

    both = tokens(prompts, [3, 2], u)
    assert both == tokens(prompts[:1], [3], u[:3]) + tokens(prompts[1:], [2], u[3:])
    assert len(set(both)) == 5
    decode = TorchEngine._decode

    def two_at_most(self, part, counts, *more):
        if sum(counts) > 2:
            raise MemoryError
        return decode(self, part, counts, *more)

    monkeypatch.setattr(TorchEngine, "_decode", two_at_most)
    assert both == tokens(prompts, [3, 2], u)


def test_kl_term_of_the_step():
    """Without advantages only the KL term is left: its gradient and its record against whole-sequence softmaxes."""
    cfg = replace(AFTER, kl=0.3)
    policy, rollouts = rollouts_of(cfg)
    batch = collate(rollouts, [0.0, 1.0] * 4, policy.tokenizer.pad_token_id)
    on = batch.completion[:, 1:]

    def log_probs():
        return policy.model(input_ids=batch.tokens, use_cache=False).logits[:, :-1].log_softmax(-1)[on]

    with torch.no_grad(), policy.adapter.reference():
        base = log_probs()
    now = log_probs()
    drawn = batch.tokens[:, 1:][on][:, None]
    d = (base - now).gather(1, drawn)
    term = d.exp() - d - 1
    parameters = policy.adapter.parameters("deployed") + policy.adapter.parameters("quarantine")
    want = torch.autograd.grad(0.3 * term.sum() / (8 * cfg.max_new), parameters)
    totals = backward(cfg, policy, batch, uniform(8, "absorb"), torch.zeros(8), torch.ones(8, dtype=torch.bool))
    for parameter, gradient in zip(parameters, want, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert totals["kl"] == pytest.approx(float((now.exp() * (now - base)).sum()), rel=1e-3)
        assert totals["entropy"] == pytest.approx(-float((now.exp() * now).sum()), rel=1e-3)
        assert totals["tokens"] == len(now)


def test_collate():
    prompt = Prompt("p", "u")
    rows = [
        Rollout("a", prompt, "x", (1, 2), (3,), 0, logp_old=(-0.5,)),
        Rollout("b", prompt, "yz", (1,), (4, 5), 0, source="teacher"),
    ]
    batch = collate(rows, [1.0, 2.0], 0)
    assert batch.logp_old.tolist() == [[0, 0, -0.5], [0, 0, 0]]
    assert batch.teacher.tolist() == [False, True] and batch.reward.tolist() == [1, 2] and batch.n == 2


def test_micro_batches_cover_every_row_once():
    score = torch.arange(7.0)
    decision = decide(score, torch.ones(7, dtype=torch.bool), 2.0, 4.0)
    batches = micro_batches(decision, torch.tensor([5, 3, 9, 1, 2, 8, 4]), 2)
    parts = [part.tolist() for batch in batches for part in batch]
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert [sum(map(len, batch)) for batch in batches] == [2, 2, 2, 1]
    assert all(len({(float(decision.m[i]), float(decision.d[i])) for i in part}) == 1 for part in parts)


def test_blocks_are_clipped_apart():
    policy = toy_policy(TOY)
    for which, size in (("deployed", 1e-3), ("quarantine", 1e3)):
        for p in policy.adapter.parameters(which):
            p.grad = torch.full_like(p, size)
    before = [p.grad.clone() for p in policy.adapter.parameters("deployed")]
    norms = clip_blocks(policy, 1.0)
    assert norms["deployed"] < 1 < norms["quarantine"]
    assert all(torch.equal(p.grad, g) for p, g in zip(policy.adapter.parameters("deployed"), before, strict=True))
    total = torch.stack([p.grad.norm() for p in policy.adapter.parameters("quarantine")]).norm()
    assert total.item() == pytest.approx(1, rel=1e-3)
    policy.adapter.parameters("quarantine")[0].grad[0] = float("nan")
    with pytest.raises(Diverged, match="quarantine"):
        clip_blocks(policy, 1.0)


class Calls(Watcher):
    """Notes evaluations, and spends random numbers as an evaluation may."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def evaluate(self, step):
        self.calls.append(("evaluate", step))
        torch.rand(3), random.random()

    def checkpoint(self, step):
        self.calls.append(("checkpoint", step))


def test_evaluations_come_in_time_and_change_nothing():
    cfg, calls, policy = replace(TOY, eval_every=2, steps=4), Calls(), toy_policy(TOY)
    train(cfg, policy, Letters(), PAIRS, calls)
    assert calls.calls == [("evaluate", 2), ("checkpoint", 4)]
    quiet, _ = toy_train(replace(cfg, eval_every=0))
    assert all(torch.equal(a, b) for a, b in zip(weights(policy).values(), weights(quiet).values(), strict=True))


def test_checkpoints_come_in_time():
    for every, due in ((3, [3, 6, 8]), (4, [4, 8]), (0, [8])):
        calls = Calls()
        train(replace(TOY, arm="none", steps=8, checkpoint_every=every), toy_policy(TOY), Letters(), PAIRS, calls)
        assert [step for what, step in calls.calls] == due


def test_log_rho_by_zone():
    """Against passes in the block state that each zone's mask stands for; demonstrations have no sampler."""
    policy, rollouts = rollouts_of(AFTER)
    rollouts[0] = replace(rollouts[0], source="teacher", logp_old=None)
    batch = collate(rollouts, [0.0, 1.0] * 4, policy.tokenizer.pad_token_id)
    rows = Rows(batch.tokens, batch.completion, batch.length)
    m = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    decision = replace(uniform(8, "keep"), m=m, d=torch.tensor([0.0] * 6 + [1, 1]))
    totals = backward(AFTER, policy, batch, decision, torch.ones(8), torch.ones(8, dtype=torch.bool))
    with torch.no_grad():
        by_state = {}
        for state in ("deployed", "full"):
            with policy.adapter.state(state):
                by_state[state] = (policy.logp(rows) - batch.logp_old) * batch.completion
    for zone, state, own in (
        ("keep", "deployed", slice(1, 3)),
        ("absorb", "full", slice(3, 6)),
        ("route", "full", slice(6, 8)),
    ):
        assert totals[f"log_rho_{zone}"] == pytest.approx(float(by_state[state][own].sum()), rel=1e-3, abs=1e-4)
        assert totals[f"tokens_{zone}"] == int(batch.completion[own].sum())
    assert max(abs(totals[f"log_rho_{zone}"]) for zone in ("keep", "absorb")) > 0.01


@pytest.mark.parametrize(("name", "moved"), [("adamw", [[-0.1, 0.1], [-0.2, 0.2]]), ("sgd", [[-0.2, 0.4], [-0.5, 1]])])
def test_optimizers(name, moved):
    cfg = replace(TOY, optimizer=name, lr=0.1, beta1=0.5, beta2=0.5)
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(cfg, [p])
    for expected in moved:  # by hand: Adam moves by lr where gradients repeat; momentum adds half of the last update
        p.grad = torch.tensor([2.0, -4.0])
        optimizer.step()
        assert torch.allclose(p, torch.tensor(expected), atol=1e-6)


def test_learning_rate():
    cfg = replace(TOY, lr=0.5, warmup=4, steps=100)
    assert [rate(cfg, s) / 0.5 for s in range(3)] == pytest.approx([0.25, 0.5, 0.75], rel=2e-3)
    assert rate(cfg, 50) == pytest.approx(0.25) and 0 < rate(cfg, 99) < 2e-4 and rate(cfg, 100) == 0


def test_records():
    _, watcher = toy_train(replace(TOY, warmup=2, steps=4))
    assert [r["step"] for r in watcher.records] == [0, 1, 2, 3]
    assert [r["v_age"] for r in watcher.records] == [0, 1, 0, 1]
    assert [r["lr"] / TOY.lr for r in watcher.records] == pytest.approx([0.5, 0.853553, 0.5, 0.146447], rel=1e-5)
    assert all(r["skipped"] is None and r["unscored"] == 0 for r in watcher.records)
    for r, d in zip(watcher.records, watcher.decisions, strict=True):
        assert r["keep"] + r["absorb"] + r["route"] == pytest.approx(1)
        assert r["route"] == pytest.approx(d.route.float().mean().item())
        assert 0 <= r["qmass"] <= 1


class Flat(Letters):
    """Pays everybody alike."""

    def grade(self, rollouts):
        return [Graded(1.0, g.sealed) for g in super().grade(rollouts)]


def test_groups_without_variance_train_nothing():
    policy, watcher = toy_policy(TOY), Watcher()
    train(replace(TOY, arm="absorb"), policy, Flat(), PAIRS, watcher)
    assert all(r["loss"] == 0 and r["dead_groups"] == TOY.prompts for r in watcher.records)
    assert not any(bool(p.any()) for w in ("deployed", "quarantine") for p in policy.adapter.parameters(w))


def test_a_loss_that_stays_broken_stops_training(monkeypatch):
    class Broken(ARMS["none"]):
        def credit(self, batch, reward, decision):
            return torch.full((batch.n,), float("nan"))

    monkeypatch.setitem(ARMS, "broken", Broken)
    with pytest.raises(Diverged, match="loss nan"):
        toy_train(replace(TOY, arm="broken", steps=6))


def test_an_arm_that_keeps_everything_leaves_the_quarantine_alone():
    policy, _ = toy_train(replace(TOY, arm="none"))
    assert not any(bool(p.any()) for p in policy.adapter.parameters("quarantine"))
    assert all(bool(p.any()) for p in policy.adapter.parameters("deployed"))
    assert uniform(2, "keep").zones() == ["keep", "keep"]
