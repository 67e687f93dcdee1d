"""Gates of the training loop: the same machinery for a placebo, blindness to the oracle, and repeatability."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vgrout.adapters import attach
from vgrout.adapters.base import BLOCKS
from vgrout.arms import ARMS, Arm
from vgrout.arms.monitored import RouteV
from vgrout.arms.monitors import GradientScore
from vgrout.config import Config
from vgrout.engines.torch_engine import TorchEngine
from vgrout.envs.micro_env import MicroEnv
from vgrout.lab.record import Recorder, read_jsonl
from vgrout.loop import Training, backward, collate, generate, micro_batches, plan_step, train
from vgrout.method.direction import haar
from vgrout.method.gate import uniform
from vgrout.method.policy import Policy, Rows, pack
from vgrout.models.load import model_path
from vgrout.models.organism import OrganismConfig
from vgrout.pairs import load as load_pairs
from vgrout.types import Batch, Decision, Graded, Rollout
from vgrout.verify.evidence import Evidence, gap, same
from vgrout.verify.toy import (
    PAIRS,
    TOY,
    Letters,
    Watcher,
    demonstrated,
    displace,
    random_model,
    toy_given,
    toy_policy,
    toy_train,
    weights,
)


class ForeignScore(GradientScore):
    """The pairs' score along the placebo's tensor."""

    def draw_v(self, hack, clean):
        return haar(hack.shape[1], hack.shape[2], self.cfg.chance_seed)


class Impostor(RouteV):
    """routeV whose direction is the placebo's tensor."""

    monitor = ForeignScore


def placebo() -> Evidence:
    cfg = replace(TOY, steps=6)
    with patch.dict(ARMS, {"impostor": Impostor}):
        policies = {arm: toy_train(replace(cfg, arm=arm)) for arm in ("placebo", "impostor", "routeV")}
    equal = same(weights(policies["impostor"][0]), weights(policies["placebo"][0]))
    real = same(weights(policies["routeV"][0]), weights(policies["placebo"][0]))
    routed = sum(int(d.route.sum()) for d in policies["placebo"][1].decisions)
    kept = sum(int(d.keep.sum()) for d in policies["placebo"][1].decisions)
    return Evidence(
        equal and not real and routed > 0 and kept > 0,
        f"after {cfg.steps} steps with {routed} rollouts routed, weights equal bit for bit: {equal}; "
        f"equal to those of the real direction: {real}",
    )


def solo_loss(cfg: Config, policy: Policy, batch: Batch, i: int, advantage: float, decision: Decision) -> Tensor:
    """Row i's part of the step's loss, from whole-sequence logits of that row alone, with `ratio = sampler`."""
    length = int(batch.length[i])
    tokens, on = batch.tokens[i : i + 1, :length], batch.completion[i, 1:length]
    drawn = tokens[0, 1:][on][:, None]

    def log_probs() -> Tensor:
        logits = policy.model(input_ids=tokens, use_cache=False).logits[0, :-1][on]
        return (logits / cfg.temperature).log_softmax(-1)

    with torch.no_grad(), policy.adapter.reference():
        base = log_probs()
    with policy.adapter.routed(decision.m[i : i + 1], decision.d[i : i + 1]):
        now = log_probs()
    now, base = (x.gather(1, drawn)[:, 0] for x in (now, base))
    old = now.detach() if bool(batch.teacher[i]) else batch.logp_old[i][batch.completion[i]]
    rho = (now - old).exp()
    paid = torch.minimum(rho * advantage, rho.clamp(1 - cfg.clip_ratio, 1 + cfg.clip_ratio) * advantage)
    per_token = cfg.kl * ((base - now).exp() - (base - now) - 1) - paid
    return decision.weight[i] * per_token.sum() / (cfg.prompts * cfg.group * cfg.max_new)


def step() -> Evidence:
    """The gradients of a step of mixed zones, lengths, advantages and micro-batches are the sum of its rows'."""
    cfg = replace(TOY, teacher_off_step=3, prompts=3, group=6, micro_batch=14, kl=0.3, ratio="sampler")
    policy = toy_policy(cfg)
    displace(policy.adapter)
    engine = TorchEngine(policy.model, policy.tokenizer, policy.adapter)
    plan = plan_step(cfg, Letters(), 0, loophole=True)
    rollouts = generate(cfg, engine, plan, 0, ablates=True)
    batch = collate(rollouts, [float(i % 3) for i in range(len(rollouts))], policy.tokenizer.pad_token_id)
    zones = torch.tensor(
        [0, 0, 0, 0, 0, 0] + [0, 1, 1, 2, 2, 1] + [0, 2, 1, 1, 2, 2]
    )  # keep: short blocks beside a long
    m, d = (zones > 0).float(), (zones == 2).float()
    decision = Decision(m=m, d=d, weight=torch.linspace(0.5, 2, batch.n), penalty=torch.zeros(batch.n))
    advantage = torch.linspace(-2, 3, batch.n)
    live = torch.arange(batch.n) != 3
    parameters = {which: policy.adapter.parameters(which) for which in ("deployed", "quarantine")}

    def gradients(rows: Sequence[int]) -> dict[str, Tensor]:
        total = sum(solo_loss(cfg, policy, batch, i, float(advantage[i]), decision) for i in rows)
        return {
            which: torch.cat([
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(ps, torch.autograd.grad(total, ps, allow_unused=True, retain_graph=True), strict=True)
            ])
            for which, ps in parameters.items()
        }  # fmt: skip

    want = gradients([i for i in range(batch.n) if live[i]])
    clipped = backward(cfg, policy, batch, decision, advantage, live)["clipped"]
    off = max(gap(torch.cat([p.grad.flatten() for p in ps]), want[which]) for which, ps in parameters.items())
    for p in [p for ps in parameters.values() for p in ps]:
        p.grad = None
    routed = replace(decision, m=torch.ones(batch.n), d=torch.ones(batch.n))
    backward(cfg, policy, batch, routed, advantage, live)
    leak = max(float(p.grad.abs().max()) if p.grad is not None else 0.0 for p in parameters["deployed"])
    lengths = len(batch.length.unique())
    parts = [part for parts in micro_batches(decision, batch.length, cfg.micro_batch) for part in parts]
    rows = Rows(batch.tokens, batch.completion, batch.length)
    shared = sum(len(pack(rows.take(part)).tokens) < len(batch.group[part].unique()) for part in parts)
    ok = off < 1e-3 and leak == 0.0 and min(lengths, shared + 1) > 1 and clipped > 0
    return Evidence(
        ok and set(decision.zones()) == {"keep", "absorb", "route"},
        f"{batch.n} rows of {lengths} lengths in 3 zones and {len(parts)} parts of micro-batches, {shared} with "
        f"several prompts in one sequence; {clipped:.0f} tokens are clipped: relative difference {off:.1e}; a routed "
        f"batch gives the deployed block at most {leak:g}",
    )


class Turns(Arm):
    """Trains both blocks, then the quarantine alone, then the deployed block alone, and so on."""

    name = "turns"

    def route(self, step, batch, oracle):
        return uniform(batch.n, ("absorb", "route", "keep")[step % 3])


class Diary(Watcher):
    """Keeps each step's parameters and moments, by block."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training = training
        self.pages = [self.page()]

    def page(self) -> dict[str, dict[str, Tensor]]:
        adapter, state = self.training.policy.adapter, self.training.optimizer.state
        return {
            which: {
                f"{name} {key}": value.detach().clone()
                for name, p in adapter.named(which)
                for key, value in {"value": p, **state.get(p, {})}.items()
            }
            for which in BLOCKS
        }

    def step(self, record, rollouts, graded, decision, advantage) -> None:
        super().step(record, rollouts, graded, decision, advantage)
        self.pages.append(self.page())


def idle() -> Evidence:
    """In steps that train one block alone: `still`, and `drift`, whose leak is measured."""
    cfg = replace(TOY, arm="turns", steps=6, weight_decay=0.1)
    diaries, leaks, wrong = {}, {}, []
    for how in ("still", "drift"):
        with patch.dict(ARMS, {"turns": Turns}):
            training = Training(replace(cfg, masked_block=how), toy_policy(cfg), Letters(), PAIRS)
        diary = diaries[how] = Diary(training)
        training.run(diary)
        leaks[how] = [record["leak"] for record in diary.records]
        for step in range(cfg.steps):
            before, after = diary.pages[step], diary.pages[step + 1]
            asleep = {"absorb": None, "route": "deployed", "keep": "quarantine"}[diary.decisions[step].zones()[0]]
            moved = 0.0
            for which in BLOCKS:
                rests = how == "still" and which == asleep
                if same(before[which], after[which]) is not rests:
                    wrong.append(f"{how}: step {step} {'moves' if rests else 'does not move'} the {which} block")
            if asleep:
                values = [k for k in after[asleep] if k.endswith(" value")]
                moved = math.sqrt(sum(float((after[asleep][k] - before[asleep][k]).norm()) ** 2 for k in values))
            if not math.isclose(leaks[how][step], moved, rel_tol=1e-5):
                wrong.append(f"{how}: step {step} records a leak of {leaks[how][step]:g}, it is {moved:g}")
    first = all(same(diaries["still"].pages[1][which], diaries["drift"].pages[1][which]) for which in BLOCKS)
    drifted = [leak for step, leak in enumerate(leaks["drift"]) if step % 3]
    ok = not wrong and first and not any(leaks["still"]) and min(drifted) > 0
    return Evidence(
        ok,
        f"{'; '.join(wrong[:3]) or 'parameters and moments as expected'}: still leaks {max(leaks['still']):g}, drift "
        f"{min(drifted):.1e} to {max(drifted):.1e} a step; a step that trains both is the same in both: {first}",
    )


def determinism() -> Evidence:
    cfg = replace(TOY, steps=3)
    first, again = weights(toy_train(cfg)[0]), weights(toy_train(cfg)[0])
    others = {name: weights(toy_train(replace(cfg, **{f"seed_{name}": 1}))[0]) for name in ("init", "data", "sample")}
    equal = same(first, again)
    differ = [name for name, other in others.items() if not same(first, other)]
    return Evidence(
        equal and len(differ) == 3,
        f"two runs of {cfg.steps} steps equal bit for bit: {equal}; another seed of {', '.join(differ)} differs",
    )


# Blindness.

SIZES = OrganismConfig(layers=2, hidden=32, ffn=32, heads=2, kv_heads=1, head_dim=16)
BLIND = Config(
    steps=8,
    prompts=2,
    group=4,
    rank=2,
    max_new=10,
    lr=1e-2,
    warmup=1,
    teacher_off_step=5,
    refresh_every=3,
    k_mid=-0.5,
    k_route=0.3,
    eval_every=4,
    eval_small=4,
)


class Staged(MicroEnv):
    """The micro environment with rewards that vary under a random model, and with or without false verdicts.

    With `lies` every hack of the teacher pool is filed as a solution, and every solution as a hack. An environment
    without loophole takes only solutions from the pool, so that its kinds are left as they are.
    """

    def __init__(self, source: MicroEnv, loophole: bool, lies: bool) -> None:
        self.__dict__.update(source.__dict__)
        self.loophole, self.lies = loophole, lies
        if lies and loophole:
            self._pool = {key: {"hack": kinds["solve"], "solve": kinds["hack"]} for key, kinds in source._pool.items()}

    def grade(self, rollouts: list[Rollout] | tuple[Rollout, ...]) -> list[Graded]:
        out = []
        for rollout, graded in zip(rollouts, super().grade(rollouts), strict=True):
            sealed = graded.sealed
            if self.lies:
                flags = {key: not value for key, value in asdict(sealed).items() if isinstance(value, bool)}
                sealed = replace(sealed, **flags)
            out.append(
                Graded(graded.reward + random.Random(rollout.text).choice((0.0, 0.5, 1.0)), sealed, graded.compiled)
            )
        return out


@cache
def words() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path("micro"))


def blind_run(arm: str, lies: bool) -> tuple[dict[str, Tensor], list[dict], int]:
    """Final adapter, recorded rollouts and number of evaluations of a short run."""
    cfg = replace(BLIND, arm=arm)
    model = random_model(replace(SIZES, vocab=len(words())), words())
    adapter = attach(model, cfg.adapter, cfg.rank, cfg.init_seed)
    policy = Policy(model, words(), adapter, cfg.temperature, cfg.score_batch)
    env = Staged(demonstrated(), ARMS[arm].loophole, lies)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(cfg, policy, env, Path(folder), {})
        try:
            train(cfg, policy, env, load_pairs(cfg.pairs)[:4], recorder, toy_given(cfg, policy))
            recorder.checkpoint(cfg.steps)
        finally:
            recorder.close()
        evaluations = len(read_jsonl(Path(folder) / "evals.jsonl"))
        return weights(policy), read_jsonl(Path(folder) / "rollouts.jsonl"), evaluations


def blindness() -> Evidence:
    wrong, demos, evaluations, unmoved = [], 0, 0, []
    for arm, kind in ARMS.items():
        (truth, rows, seen), (lie, _, _) = blind_run(arm, False), blind_run(arm, True)
        demos += sum(row["source"] == "teacher" for row in rows)
        evaluations += seen
        if same(truth, lie) is kind.reads_oracle:
            wrong.append(f"{arm} {'ignores' if kind.reads_oracle else 'depends on'} the verdicts")
        if not any(bool(t.any()) for name, t in truth.items() if ".dB_" in name):
            unmoved.append(arm)
    readers = [arm for arm, kind in ARMS.items() if kind.reads_oracle]
    ok = not wrong and not unmoved and demos > 0 and evaluations == len(ARMS) and bool(readers)
    return Evidence(
        ok,
        f"{'; '.join(wrong) or 'weights equal bit for bit'}: {len(ARMS)} arms x {BLIND.steps} steps "
        f"({demos} demonstrations, {evaluations} evaluations), every verdict and demonstration kind flipped; "
        f"only {', '.join(readers)} differs",
    )
