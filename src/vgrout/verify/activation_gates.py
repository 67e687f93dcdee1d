"""Gates of the arms that read or edit activations, and of the probes that may be used."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vgrout.arms.advantage import modified, standing
from vgrout.arms.steering import without
from vgrout.loop import Training, collate, generate, plan_step
from vgrout.method.linear_probe import LinearProbe
from vgrout.method.policy import Policy, Rows
from vgrout.method.residual import decoder_layers, edited
from vgrout.types import UserError
from vgrout.verify.evidence import Evidence, gap
from vgrout.verify.method_gates import toy_rows
from vgrout.verify.toy import PAIRS, TOY, Letters, Watcher, displace, toy_policy


@torch.no_grad()
def inputs_of(policy: Policy, tokens: Tensor) -> dict[str, Tensor]:
    """What every module reads [L, i] in a forward pass of one row that nothing is merged for."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in policy.adapter.modules.items():
            keep = partial(lambda name, module, args: inputs.update({name: args[0][0]}), name)
            hooks.callback(module.register_forward_pre_hook(keep).remove)
        policy.model(input_ids=tokens, use_cache=False)
    return inputs


def activations() -> Evidence:
    policy, rows, off = toy_policy(TOY), toy_rows(4), 0.0
    displace(policy.adapter)
    found = {state: policy.activations(rows, state) for state in ("deployed", "full")}
    for state, got in found.items():
        for i, length in enumerate(rows.length.tolist()):
            with policy.adapter.state(state):
                inputs = inputs_of(policy, rows.tokens[i : i + 1, :length])
            places = [t for t in range(length) if rows.completion[i, t]]
            for m, (name, module) in enumerate(policy.adapter.modules.items()):
                a = module.bottleneck()[0].detach()
                off = max(off, gap(got[i, m], sum(a @ inputs[name][t] for t in places) / len(places)))
    apart = gap(found["deployed"], found["full"])
    return Evidence(
        off < 1e-4 < apart,
        f"{len(rows.length)} rows x 2 states, from one unmerged pass a row: relative difference {off:.1e}; the states "
        f"differ by {apart:.1e}",
    )


def by_hand(reward: list[float], score: list[float], form: str, a: float) -> list[float]:
    """One group's rewards after advantage modification, in plain Python."""
    mean = sum(score) / len(score)
    sd = math.sqrt(sum((s - mean) ** 2 for s in score) / len(score))
    out = []
    for r, s in zip(reward, score, strict=True):
        z = (s - mean) / max(sd, 0.1)
        factor = 1 - a / (1 + math.exp(-z)) if z > 0 else 1.0
        forms = {"additive": r - a * max(z, 0.0), "multiplicative": r * factor, "clipped": r * max(0.0, factor)}
        out.append(forms[form])
    return out


def adv_mod() -> Evidence:
    reward, off, moved = [3.5, 0.5, 3.5, 0.0, 3.5], 0.0, []
    for score in ([2.0, 0.0, -2.0, 1.0, 0.3], [0.25, 0.2, 0.3, 0.21, 0.24]):  # the second has an sd below the floor
        for form in ("additive", "multiplicative", "clipped"):
            for a in (0.5, 2.0):
                z = standing(torch.tensor(score), torch.zeros(5, dtype=torch.long))
                want = torch.tensor(by_hand(reward, score, form, a))
                off = max(off, gap(modified(torch.tensor(reward), z, form, a), want))
    for form in ("additive", "multiplicative", "clipped"):
        cfg = replace(TOY, arm="adv_mod", group=7, adv_form=form)
        given, taken = shaped(replace(cfg, adv_position="prompt_last"))
        last = shaped(replace(cfg, adv_position="resp_last"))
        if not torch.equal(given, taken) or torch.equal(*last):
            moved.append(form)
    return Evidence(
        off < 1e-5 and not moved,
        f"12 groups in plain Python: relative difference {off:.1e}; read at the prompt's last token it "
        f"{'is wrong in ' + ', '.join(moved) if moved else 'leaves every reward as it is, bit for bit'}",
    )


def shaped(cfg) -> tuple[Tensor, Tensor]:
    """Rewards of a step's rollouts, and what the arm makes of them."""
    policy = toy_policy(cfg)
    displace(policy.adapter)
    run = Training(cfg, policy, Letters(), PAIRS)
    with run.arm.around("sample"):
        drawn = generate(cfg, run.engine, plan_step(cfg, Letters(), 0, loophole=True), 0, ablates=True)
    batch = collate(drawn, [0.1 * i + 0.5 for i in range(len(drawn))], policy.tokenizer.pad_token_id)
    return batch.reward, run.arm.shape(batch)


class Hooks(Watcher):
    """Counts the edits that are in place whenever the loop hands over to somebody else."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.seen = policy, []

    def count(self) -> int:
        return sum(len(layer._forward_hooks) for layer in decoder_layers(self.policy.model))

    def step(self, *args) -> None:
        super().step(*args)
        self.seen.append(self.count())

    def evaluate(self, step: int) -> None:
        self.seen.append(self.count())


@torch.no_grad()
def in_phase(arm: str) -> tuple[float, float, float]:
    """Of one arm, the sampler's log-probabilities against the model that it should have sampled from, those of the
    update against the one that it should train, and how far the two models are apart; in nats."""
    cfg = replace(TOY, arm=arm, teacher_off_step=0, ratio="sampler")
    policy = toy_policy(cfg)
    displace(policy.adapter)
    run = Training(cfg, policy, Letters(), PAIRS)
    with run.arm.around("sample"):
        drawn = generate(cfg, run.engine, plan_step(cfg, Letters(), 0, loophole=True), 0, ablates=True)
    batch = collate(drawn, [0.0] * len(drawn), policy.tokenizer.pad_token_id)
    rows = Rows(batch.tokens, batch.completion, batch.length)
    edits = {n: partial(run.arm.changed, d=d) for n, d in zip(run.arm.layers, run.arm.d, strict=True)}
    with policy.adapter.deployed():
        plain = policy.logp(rows)
        with edited(policy.model, edits):
            under = policy.logp(rows)
        with run.arm.around("update"):
            updating = policy.logp(rows)
    sampled, trained = (under, plain) if arm == "suppress" else (plain, under)
    return tuple(
        float((a - b).abs().max()) for a, b in ((batch.logp_old, sampled), (updating, trained), (under, plain))
    )


def residual_edits() -> Evidence:
    generator = torch.Generator().manual_seed(0)
    h, d = torch.randn(40, 16, generator=generator), 3 * torch.randn(16, generator=generator)
    unit, out = d / d.norm(), without(h, d)
    along, off = float((out @ unit).max()), gap(out - (out @ unit)[:, None] * unit, h - (h @ unit)[:, None] * unit)
    against = gap((out @ unit).clamp(max=-0.1), (h @ unit).clamp(max=-0.1))
    found = {arm: in_phase(arm) for arm in ("suppress", "steer")}
    left = []
    for arm in found:
        policy = toy_policy(TOY)
        watcher = Hooks(policy)
        Training(replace(TOY, arm=arm, eval_every=2), policy, Letters(), PAIRS).run(watcher)
        left += watcher.seen
    agree, apart = max(max(x[:2]) for x in found.values()), min(x[2] for x in found.values())
    return Evidence(
        along < 1e-5 and max(off, against) < 1e-5 and agree < 1e-4 and apart > 1e-2 and left == [0] * len(left),
        f"suppressed: at most {along:.1e} along d, the rest within {max(off, against):.1e}; sampler and update within "
        f"{agree:.1e} nats of the models they should run, which are {apart:.2f} apart; edits left at {len(left)} steps "
        f"and evaluations: {sum(left)}",
    )


def strange_probe() -> Evidence:
    probe = LinearProbe(torch.zeros(3), 0.0, {"modes": ["eq_override", "sentinel"], "model_sha256": "a" * 64})
    wrong = []
    for live, model, fine in (
        (("run_tests",), "a" * 64, True),
        (("run_tests", "sentinel"), "a" * 64, False),
        (("run_tests",), "b" * 64, False),
    ):
        try:
            probe.check(live, model)
        except UserError:
            wrong += ["refuses a probe that fits"] * fine
        else:
            wrong += ["takes a probe that does not"] * (not fine)
    return Evidence(
        not wrong, "; ".join(wrong) or "a live mode and another model are refused, a stranger to both is not"
    )
