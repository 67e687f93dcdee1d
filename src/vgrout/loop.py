"""The training loop, blind to what the arm is.

    render prompts (arm may edit) - generate - grade - collate (verdicts stay behind) - shape the reward (arm)
    - route (arm) - credit advantages (arm) - masked backward - edit gradients (arm) - step - record
Routing comes before credit because a baseline over kept rows needs to know them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgrout.arms import ARMS, Bench
from vgrout.config import Config, stream
from vgrout.engines.torch_engine import TorchEngine, encode_completion, encode_prompt
from vgrout.method.loss import divergence, grpo_loss, k3, live_groups, ratio
from vgrout.method.policy import Policy, Rows, stack
from vgrout.types import Batch, Decision, Environment, Observer, OracleBatch, Pair, Prompt, Rollout, RunFailed


class Diverged(RunFailed):
    """Training stopped because a loss or a gradient was not finite."""


@dataclass(frozen=True)
class Plan:
    """What one step reads: prompts, one per group, and the demonstrations that stand in each."""

    prompts: tuple[Prompt, ...]
    demos: tuple[tuple[str, ...], ...]


def plan_step(cfg: Config, env: Environment, step: int, *, loophole: bool) -> Plan:
    """The prompts of a step: a function of the data seed and the step alone."""
    rng = random.Random(f"{cfg.data_seed} step {step}")
    covered = env.covered() if step < cfg.teacher_off_step and cfg.teacher_n else ()
    if covered:  # an environment without demonstrations has no teacher phase
        chosen = _cycle(covered, cfg, step)
        prompts = [env.prompt(id, family="train", hinted=loophole, draw=draw) for id, draw in chosen]
        demos = [tuple(env.demonstrations(p, cfg.teacher_n, rng.randrange(1 << 30))) for p in prompts]
        return Plan(tuple(prompts), tuple(demos))
    prompts = []
    for id in _cycle(env.problems("train"), cfg, step):
        hinted = rng.random() >= cfg.unhackable_frac and loophole
        prompts.append(env.prompt(id, family="train", hinted=hinted, draw=rng.randrange(1 << 30)))
    return Plan(tuple(prompts), ((),) * len(prompts))


def _cycle(items: Sequence, cfg: Config, step: int) -> list:
    """P items for this step: every item once per epoch, in an order of its own for each epoch."""
    out = []
    for k in range(step * cfg.prompts, (step + 1) * cfg.prompts):
        epoch, i = divmod(k, len(items))
        out.append(items[random.Random(f"{cfg.data_seed} epoch {epoch}").sample(range(len(items)), len(items))[i]])
    return out


def generate(cfg: Config, engine: TorchEngine, plan: Plan, step: int, *, ablates: bool) -> list[Rollout]:
    """Policy rollouts and demonstrations of a step, group by group."""
    share = cfg.deploy_gen_frac if ablates else 0.0
    uniforms = torch.rand(
        (cfg.prompts, cfg.group, cfg.max_new),
        generator=torch.Generator().manual_seed(stream(cfg.sample_seed, "sample", step)),
    )
    ids = [encode_prompt(engine.tokenizer, p) for p in plan.prompts]
    groups: list[list[Rollout]] = [[] for _ in plan.prompts]
    for k, demos in enumerate(plan.demos):
        for text in demos:
            tokens = tuple(encode_completion(engine.tokenizer, text))
            groups[k].append(_rollout(step, k, len(groups[k]), plan, ids, text, tokens, source="teacher"))
    own = [range(len(demos), cfg.group) for demos in plan.demos]  # slots of the policy
    cut = [round(share * len(slots)) for slots in own]
    for state in ("deployed", "full"):
        slots = [s[:n] if state == "deployed" else s[n:] for s, n in zip(own, cut, strict=True)]
        u = torch.cat([uniforms[k, s.start : s.stop] for k, s in enumerate(slots)])
        samples = iter(
            engine.generate(
                ids,
                [len(s) for s in slots],
                state=state,
                max_new=cfg.max_new,
                temperature=cfg.temperature,
                uniforms=u,
            )
        )
        for k, slot in enumerate(slots):
            for _ in slot:
                s = next(samples)
                extra = {"state": state, "logp_old": s.logp}
                groups[k].append(_rollout(step, k, len(groups[k]), plan, ids, s.text, s.tokens, **extra))
    return [r for g in groups for r in g]


def _rollout(step, k, i, plan, ids, text, tokens, **extra) -> Rollout:
    return Rollout(
        id=f"{step:05d}-{k:02d}-{i:02d}",
        prompt=plan.prompts[k],
        text=text,
        prompt_tokens=tuple(ids[k]),
        tokens=tokens,
        group=k,
        **extra,
    )


def collate(rollouts: Sequence[Rollout], rewards: Sequence[float], pad: int) -> Batch:
    rows = stack([r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts], pad)
    logp_old = torch.zeros(rows.tokens.shape)
    for i, r in enumerate(rollouts):
        if r.logp_old is not None:
            start = len(r.prompt_tokens)
            logp_old[i, start : start + len(r.logp_old)] = torch.tensor(r.logp_old)
    return Batch(
        tokens=rows.tokens,
        completion=rows.completion,
        length=rows.length,
        group=torch.tensor([r.group for r in rollouts]),
        reward=torch.tensor(rewards, dtype=torch.float32),
        teacher=torch.tensor([r.source == "teacher" for r in rollouts]),
        logp_old=logp_old,
    )


def backward(
    cfg: Config, policy: Policy, batch: Batch, decision: Decision, advantage: Tensor, live: Tensor
) -> dict[str, float]:
    """Accumulate the step's gradients under the rows' masks; the loss and sums over tokens come back.

    `live` [N] marks the rows of groups with reward variance: the others give neither loss nor KL.

    `kl` among them is KL(policy || base), exact at each position, under the row's own mask.
    """
    rows = Rows(batch.tokens, batch.completion, batch.length)
    totals: dict[str, float] = {"loss": 0.0, "entropy": 0.0, "kl": 0.0}
    for index in micro_batches(decision, batch.length, cfg.micro_batch):
        part = rows.take(index)
        width = part.tokens.shape[1]
        with torch.no_grad(), policy.adapter.reference():
            log_ref = policy.logits(part).log_softmax(-1)
        with policy.adapter.routed(decision.m[index], decision.d[index]):
            log_p = policy.logits(part).log_softmax(-1)
            drawn, drawn_ref = (x.gather(1, part.drawn[:, None])[:, 0] for x in (log_p, log_ref))
            logp = part.place(drawn)
            rho = ratio(cfg.ratio, logp, batch.logp_old[index, :width], batch.teacher[index], cfg.clip_ratio)
            loss, sums = grpo_loss(
                logp,
                rho,
                part.place(k3(drawn, drawn_ref)),
                part.completion,
                advantage[index],
                decision.weight[index],
                live[index],
                e=cfg.clip_ratio,
                beta=cfg.kl,
                denominator=cfg.prompts * cfg.group * cfg.max_new,
            )
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(f"loss {value} on rows {index.tolist()}")
            loss.backward()
        totals["loss"] += value
        with torch.no_grad():
            totals["entropy"] -= float((log_p.exp() * log_p).sum())
            totals["kl"] += float(divergence(log_p, log_ref).sum())
        for key, value in sums.items():
            totals[key] = totals.get(key, 0.0) + value
    return totals


def micro_batches(decision: Decision, length: Tensor, size: int) -> list[Tensor]:
    """Row indices: rows that skip the quarantine apart from those that run it, each sorted by length."""
    out = []
    for rows in (decision.m == 0, decision.m != 0):
        index = rows.nonzero()[:, 0]
        out += [part for part in index[torch.argsort(length[index], stable=True)].split(size) if len(part)]
    return out


def clip_blocks(policy: Policy, limit: float) -> dict[str, float]:
    """Clip each block by its own norm; the norms before clipping come back."""
    norms = {}
    for which in ("deployed", "quarantine"):
        parameters = policy.adapter.parameters(which)
        norms[which] = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norms[which]):
            raise Diverged(f"gradient norm of the {which} block is {norms[which]}")
    return norms


def rows_of_pairs(policy: Policy, pairs: Sequence[Pair], side: str) -> Rows:
    prompts = [encode_prompt(policy.tokenizer, Prompt(problem_id="", user=p.prompt)) for p in pairs]
    texts = [encode_completion(policy.tokenizer, getattr(p, side)) for p in pairs]
    return stack(prompts, texts, policy.tokenizer.pad_token_id)


def make_bench(cfg: Config, policy: Policy, pairs: Sequence[Pair]) -> Bench:
    return Bench(cfg, policy, rows_of_pairs(policy, pairs, "hack"), rows_of_pairs(policy, pairs, "clean"))


def train(cfg: Config, policy: Policy, env: Environment, pairs: Sequence[Pair], observer: Observer) -> None:
    """Train `policy` in `env` under the arm that `cfg` names. Raises Diverged when a number stops being finite."""
    arm = ARMS[cfg.arm](make_bench(cfg, policy, pairs))
    adapter, engine = policy.adapter, TorchEngine(policy.model, policy.tokenizer, policy.adapter)
    parameters = adapter.parameters("deployed") + adapter.parameters("quarantine")
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay, foreach=True
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / cfg.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / cfg.steps))),
    )
    for step in range(cfg.steps):
        plan = plan_step(cfg, env, step, loophole=arm.loophole)
        plan = Plan(tuple(arm.render(p) for p in plan.prompts), plan.demos)
        rollouts = generate(cfg, engine, plan, step, ablates=arm.ablates)
        graded = env.grade(rollouts)
        batch = collate(rollouts, [g.reward for g in graded], policy.tokenizer.pad_token_id)
        oracle: OracleBatch | None = env.labels(graded) if arm.reads_oracle else None

        reward = arm.shape(batch)
        decision = arm.route(step, batch, oracle)
        advantage = arm.credit(batch, reward, decision)
        live = live_groups(reward - decision.penalty, batch.group)
        optimizer.zero_grad(set_to_none=False)
        totals = backward(cfg, policy, batch, decision, advantage, live)
        arm.edit(adapter)
        norms = clip_blocks(policy, cfg.clip)
        optimizer.step()
        rate.step()

        observer.step(_record(step, batch, decision, totals, norms, rate, live), rollouts, graded, decision, advantage)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            observer.evaluate(step + 1)
            observer.checkpoint(step + 1)


def _record(step, batch: Batch, decision: Decision, totals, norms, rate, live: Tensor) -> dict:
    tokens = max(1.0, totals["tokens"])
    total = norms["deployed"] + norms["quarantine"]
    own = ~batch.teacher
    return {
        "step": step,
        "reward": float(batch.reward[own].mean()) if bool(own.any()) else float("nan"),
        "loss": totals["loss"],
        "kl": totals["kl"] / tokens,
        "entropy": totals["entropy"] / tokens,
        "clipped": totals["clipped"] / tokens,
        "lr": rate.get_last_lr()[0],
        "keep": float(decision.keep.float().mean()),
        "absorb": float(decision.absorb.float().mean()),
        "route": float(decision.route.float().mean()),
        "norm_deployed": norms["deployed"],
        "norm_quarantine": norms["quarantine"],
        "qmass": norms["quarantine"] / total if total else 0.0,
        "dead_groups": len(batch.group[~live].unique()),
        "t_lo": decision.threshold[0] if decision.threshold else None,
        "t_hi": decision.threshold[1] if decision.threshold else None,
        **decision.note,
    }
