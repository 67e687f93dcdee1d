"""The training loop, blind to what the arm is.

    render prompts (arm may edit) - generate - grade - collate (verdicts stay behind) - shape the reward (arm)
    - route (arm) - credit advantages (arm) - masked backward - edit gradients (arm) - step - record
Routing comes before credit because a baseline over kept rows needs to know them.

Every random number comes from a seed and the step. So `Training.state` is a whole run, and a run that was stopped goes
on bit for bit.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vgrout.adapters import attach
from vgrout.adapters.base import BLOCKS
from vgrout.adapters.inits import INITS
from vgrout.arms import ARMS, Bench, Given
from vgrout.arms.base import EMPTY, part
from vgrout.config import Config, stream
from vgrout.engines import Engine, make_engine
from vgrout.engines.torch_engine import encode_completion, encode_prompt
from vgrout.method.gate import uniform
from vgrout.method.inputs import input_moments
from vgrout.method.loss import divergence, grpo_loss, k3, live_groups, ratio
from vgrout.method.policy import PACK, Policy, Rows, stack
from vgrout.models.load import recomputing
from vgrout.signals import held
from vgrout.types import (
    ZONES,
    Batch,
    Decision,
    Environment,
    Graded,
    Observer,
    OracleBatch,
    Pair,
    Prompt,
    Rollout,
    RunFailed,
    UserError,
)

SKIPS = 5  # steps in a row that may move nothing
WINDOW = 10  # steps that a guard averages over
GUARDED = {"entropy": ("entropy_floor", 1), "kl": ("kl_ceiling", -1), "compiled": ("compile_floor", 1)}
LARGEST = torch.finfo(torch.float32).max


class Diverged(RunFailed):
    """A loss or a gradient is not finite; or too many of them in a row, or a guarded mean is out of bounds."""


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


def generate(cfg: Config, engine: Engine, plan: Plan, step: int, *, ablates: bool) -> list[Rollout]:
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
    # Both states in one call, which an engine may sample at once.
    asked = [(state, k) for state in ("deployed", "full") for k in range(len(ids))]
    slots = [own[k][: cut[k]] if state == "deployed" else own[k][cut[k] :] for state, k in asked]
    samples = iter(
        engine.generate(
            [ids[k] for _, k in asked],
            [len(s) for s in slots],
            state=[state for state, _ in asked],
            max_new=cfg.max_new,
            temperature=cfg.temperature,
            uniforms=torch.cat([uniforms[k, s.start : s.stop] for (_, k), s in zip(asked, slots, strict=True)]),
        )
    )
    for (state, k), slot in zip(asked, slots, strict=True):
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
        texts=tuple((r.prompt.read, r.text) for r in rollouts),
    )


def backward(
    cfg: Config, policy: Policy, batch: Batch, decision: Decision, advantage: Tensor, live: Tensor
) -> dict[str, float]:
    """Accumulate the step's gradients under the rows' masks; the loss and sums over tokens come back. Each of several
    processes does so for the rows of its groups, and with the whole step's normaliser.

    `live` [N] marks the rows of groups with reward variance: the others give neither loss nor KL.

    `kl` among them is KL(policy || base), exact at each position, under the row's own mask. `log_rho_ZONE` sums
    log policy - log sampler over the `tokens_ZONE` tokens that a zone's rows have and the policy sampled.
    """
    rows = Rows(batch.tokens, batch.completion, batch.length)
    totals: dict[str, float] = {"loss": 0.0, "entropy": 0.0, "kl": 0.0}
    totals |= {f"{what}_{zone}": 0.0 for zone in ZONES for what in ("log_rho", "tokens")}
    zones = decision.zones()
    of_rows = (batch.completion, batch.logp_old, batch.teacher, advantage, decision.weight, live)
    completion, logp_old, teacher, advantage, weight, live = (x.to(policy.device) for x in of_rows)
    fault, parameters = "", [p for which in BLOCKS for p in policy.adapter.parameters(which)]
    here = policy.ranks.owners(batch.group.tolist()) == policy.ranks.rank
    units = micro_batches(decision, batch.length, cfg.micro_batch, here)
    if policy.ranks.sharded:  # where masks mix, processes would run different numbers of passes
        units = [[index] for parts in units for index in parts]
    for parts, real in policy.ranks.level(units, [torch.tensor([0])]):
        with torch.no_grad(), policy.adapter.reference():  # no mask reaches it: one pass for all parts
            log_refs = policy.logits(rows.take(torch.cat(parts))).log_softmax(-1)
        counts = [int(batch.completion[index].sum()) for index in parts]
        for index, log_ref in zip(parts, log_refs.split(counts), strict=True):
            part = rows.take(index)
            width = part.tokens.shape[1]
            share = None if decision.share is None else decision.share[index]
            old, own, mine = logp_old[index, :width], ~teacher[index], completion[index, :width]
            with policy.adapter.routed(decision.m[index], decision.d[index], share):
                log_p = policy.logits(part).log_softmax(-1)
                if not real:  # a backward pass that leaves no trace
                    torch.autograd.grad(log_p.sum(), parameters, allow_unused=True)
                    continue
                token = part.drawn.to(policy.device)[:, None]
                drawn, drawn_ref = (x.gather(1, token)[:, 0] for x in (log_p, log_ref))
                logp = part.place(drawn)
                rho = ratio(cfg.ratio, logp, old, ~own, cfg.clip_ratio)
                loss, sums = grpo_loss(
                    logp,
                    rho,
                    part.place(k3(drawn, drawn_ref)),
                    mine,
                    advantage[index],
                    weight[index],
                    live[index],
                    e=cfg.clip_ratio,
                    beta=cfg.kl,
                    denominator=cfg.prompts * cfg.group * cfg.max_new,
                )
                value = loss.item()
                if not math.isfinite(value):
                    fault = fault or f"loss {value} on rows {index.tolist()}"
                loss.backward()
            totals["loss"] += value
            with torch.no_grad():
                totals["entropy"] -= float((log_p.exp() * log_p).sum())
                totals["kl"] += float(divergence(log_p, log_ref).sum())
                zone = zones[int(index[0])]  # that of all rows of one mask
                totals[f"log_rho_{zone}"] += float((logp - old)[mine & own[:, None]].sum())
                totals[f"tokens_{zone}"] += float(mine[own].sum())
            for key, value in sums.items():
                totals[key] = totals.get(key, 0.0) + value
    if fault:  # only now: other processes may need the passes of this one
        raise Diverged(fault)
    return totals


def micro_batches(decision: Decision, length: Tensor, size: int, mine: Tensor | None = None) -> list[list[Tensor]]:
    """Row indices of micro-batches of `size` rows, each in parts of one mask; only rows that are `mine` where that is
    given. Long rows are sorted by length, which saves padding; short ones stay by group, so that they share their
    prompts (`policy.pack`)."""
    _, mask = torch.stack((decision.m, decision.d), dim=1).unique(dim=0, return_inverse=True)
    order = torch.argsort(torch.where(length > PACK, length, 0), stable=True)
    order = order if mine is None else order[mine[order]]
    return [[rows[mask[rows] == kind] for kind in mask[rows].unique()] for rows in order.split(size) if len(rows)]


def clip_blocks(policy: Policy, limit: float) -> dict[str, float]:
    """Clip each block by its own norm; the norms before clipping come back."""
    norms = {}
    for which in BLOCKS:
        parameters = policy.adapter.parameters(which)
        norms[which] = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norms[which]):
            raise Diverged(f"gradient norm of the {which} block is {norms[which]}")
    return norms


def checksum(policy: Policy) -> float:
    """A number that the weights of the adapter have in all processes, or they have drifted apart."""
    return float(sum(p.detach().double().sum() for which in BLOCKS for p in policy.adapter.parameters(which)))


def rows_of_pairs(policy: Policy, pairs: Sequence[Pair], side: str) -> Rows:
    return encode_pairs(policy.tokenizer, pairs, side)


def encode_pairs(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], side: str) -> Rows:
    prompts = [encode_prompt(tokenizer, Prompt(problem_id="", user=p.prompt)) for p in pairs]
    texts = [encode_completion(tokenizer, getattr(p, side)) for p in pairs]
    return stack(prompts, texts, tokenizer.pad_token_id)


def adapted(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> Policy:
    """The policy that a run starts from: `model`, which gets the adapter of `cfg`, in place.

    Raises UserError where the adapter does not fit the model, or the init the pairs.
    """
    moments = None
    if cfg.init in INITS and INITS[cfg.init].calibrated:
        sides = (encode_pairs(tokenizer, pairs, side) for side in ("hack", "clean"))
        moments = input_moments(model, *sides, cfg.score_batch)
    how = {"init": cfg.init, "detach": cfg.detach, "moments": moments}
    adapter = attach(model, cfg.adapter, cfg.rank, cfg.init_seed, **how)
    score_dtype = torch.bfloat16 if cfg.score_dtype == "bfloat16" else None
    recomputed = recomputing(model) if cfg.gradient_checkpointing else ()
    return Policy(model, tokenizer, adapter, cfg.temperature, cfg.score_batch, score_dtype, recomputed)


def make_bench(cfg: Config, policy: Policy, pairs: Sequence[Pair], given: Given = EMPTY) -> Bench:
    return Bench(cfg, policy, rows_of_pairs(policy, pairs, "hack"), rows_of_pairs(policy, pairs, "clean"), given)


class Training:
    """A run's training, step by step. `state` is all that its next step depends on.

    It changes in `held` sections only: a signal finds it as the last whole step left it.
    """

    def __init__(
        self,
        cfg: Config,
        policy: Policy,
        env: Environment,
        pairs: Sequence[Pair],
        given: Given = EMPTY,
    ) -> None:
        self.cfg, self.policy, self.env = cfg, policy, env
        self.arm = ARMS[cfg.arm](make_bench(cfg, policy, pairs, given))
        self.ranks = policy.ranks
        self.engine = make_engine(cfg, policy.model, policy.tokenizer, policy.adapter, self.ranks)
        parameters = policy.adapter.parameters("deployed") + policy.adapter.parameters("quarantine")
        self.optimizer = make_optimizer(cfg, parameters)
        self.step = 0  # steps done
        self.begun = False  # the arm has done what it does before the first step
        self.skips: list[str] = []  # why each of the latest steps, in a row, moved nothing
        self.recent: dict[str, list[float]] = {what: [] for what in GUARDED}  # of the latest steps
        self.arm_state = self.arm.state()  # as the last whole step left it

    def run(self, observer: Observer) -> None:
        """Train to the last step. Raises Diverged, OutOfMemory where a single rollout does not fit, and Interrupted
        where somebody listens to signals."""
        cfg = self.cfg
        self.check()
        if not self.begun:
            with held():  # half of it is no state to go on from
                self.arm.begin()
                self.begun, self.arm_state = True, self.arm.state()
        while self.step < cfg.steps:
            if self.step and cfg.eval_every and self.step % cfg.eval_every == 0:
                observer.evaluate(self.step)
            self.advance(observer)
            self.check()
            if self.step == cfg.steps or (cfg.checkpoint_every and self.step % cfg.checkpoint_every == 0):
                observer.checkpoint(self.step)

    def advance(self, observer: Observer) -> None:
        """One step."""
        cfg, arm, step = self.cfg, self.arm, self.step
        plan = plan_step(cfg, self.env, step, loophole=arm.loophole)
        plan = Plan(tuple(arm.render(p) for p in plan.prompts), plan.demos)
        with arm.around("sample"):
            drawn = generate(cfg, self.engine, plan, step, ablates=arm.ablates)
        rollouts, graded = scored(drawn, self.ranks.spread(self.env.grade, drawn, [r.group for r in drawn]))
        record = {"step": step, "lr": rate(cfg, step), "unscored": len(drawn) - len(rollouts)}
        if not rollouts:
            self._close(observer, record | NOTHING, [], [], uniform(0, "keep"), torch.zeros(0))
            return
        batch = collate(rollouts, [g.reward for g in graded], self.policy.tokenizer.pad_token_id)
        oracle: OracleBatch | None = self.env.labels(rollouts, graded) if arm.reads_oracle else None

        reward = arm.shape(batch)
        decision = arm.route(step, batch, oracle)
        advantage = arm.credit(batch, reward, decision)
        live = live_groups(reward - decision.penalty, batch.group, decision.present)
        record |= self._gradients(batch, decision, advantage, live)
        record |= _facts(batch, graded, decision, live)
        self._close(observer, record, rollouts, graded, decision, advantage)

    def _gradients(self, batch: Batch, decision: Decision, advantage: Tensor, live: Tensor) -> dict[str, Any]:
        """Fill in the step's gradients. What the record says of them: `skipped` is None, or why they are of no use."""
        try:
            with self.arm.around("update"):
                sums = self._backward(batch, decision, advantage, live)
            said = self.arm.edit(self.policy.adapter)
            norms = clip_blocks(self.policy, self.cfg.clip)
            self.ranks.check(lambda: (*norms.values(), checksum(self.policy)))
        except Diverged as fault:
            return dict.fromkeys(OF_GRADIENTS, math.nan) | {"skipped": str(fault)}
        tokens, total = max(1.0, sums["tokens"]), sum(norms.values())
        return {
            "loss": sums["loss"],
            "kl": sums["kl"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "clipped": sums["clipped"] / tokens,
            **{f"log_rho_{z}": _share(sums[f"log_rho_{z}"], sums[f"tokens_{z}"]) for z in ZONES},
            "micro_batch": sums["micro_batch"],
            "norm_deployed": norms["deployed"],
            "norm_quarantine": norms["quarantine"],
            "qmass": norms["quarantine"] / total if total else 0.0,
            "skipped": None,
            **said,
        }

    def _backward(self, batch: Batch, decision: Decision, advantage: Tensor, live: Tensor) -> dict[str, float]:
        """`backward`, in micro-batches half the size whenever memory is short: the same update. Sums and gradients are
        those of all processes. Raises Diverged in all of them where one does."""

        def in_batches(size: int) -> dict[str, float]:
            self._clear_gradients()
            cfg = replace(self.cfg, micro_batch=size)
            return backward(cfg, self.policy, batch, decision, advantage, live) | {"micro_batch": size}

        try:
            size = min(self.cfg.micro_batch, batch.n)
            own, fault = self.ranks.fitting(size, "the update", in_batches), ""
        except Diverged as error:
            own, fault = {}, str(error)
        everyones = self.ranks.gather((own, fault))
        if faults := [fault for _, fault in everyones if fault]:
            raise Diverged(faults[0])
        self._sum_gradients()
        parts = [sums for sums, _ in everyones]
        total = {key: sum(sums.get(key, 0.0) for sums in parts) for key in {key for sums in parts for key in sums}}
        return total | {"micro_batch": min(sums["micro_batch"] for sums in parts)}

    def _sum_gradients(self) -> None:
        """Add up the gradients of all processes: one flat sum. A parameter has one where it has one in any process."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        self.ranks.sum_([has])
        trained = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.ranks.sum_([p.grad for p in trained])

    def _clear_gradients(self) -> None:
        # The optimizer leaves out what has no gradient, but moves by its moments what has a zero one. So it is the
        # moments that decide, which a checkpoint has, and not which gradients this process has seen.
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p in self.optimizer.state else None

    def _close(self, observer: Observer, record: dict[str, Any], *seen: Any) -> None:
        """End a step: its update unless it is skipped, what later steps need of it, its record."""
        with held():
            record["leak"] = 0.0
            if record["skipped"] is None:
                for group in self.optimizer.param_groups:
                    group["lr"] = record["lr"]
                record["leak"] = self._update()
            self.skips = [] if record["skipped"] is None else [*self.skips, record["skipped"]]
            for what, past in self.recent.items():
                if math.isfinite(record[what]):
                    self.recent[what] = [*past, record[what]][-WINDOW:]
            self.arm_state = self.arm.state()
            self.step += 1
            observer.step(record, *seen)

    @torch.no_grad()
    def _update(self) -> float:
        """Move the blocks. Comes back: how far those moved that nothing trains, by moments and decay alone."""
        idle = [p for which in BLOCKS for p in untrained(self.policy.adapter.parameters(which))]
        before = [p.clone() for p in idle]
        if self.cfg.masked_block == "still":
            for p in idle:
                p.grad = None  # the optimizer leaves it out: no update, no moments, no decay
        self.optimizer.step()
        moved = [(p - old).norm() for p, old in zip(idle, before, strict=True)]
        return float(torch.stack(moved).norm()) if moved else 0.0

    def check(self) -> None:
        """Raises Diverged where steps were skipped in a row, or a mean over WINDOW steps passes the bound of the
        configuration."""
        if len(self.skips) >= SKIPS:
            raise Diverged(f"{len(self.skips)} steps in a row moved nothing; the last: {self.skips[-1]}")
        for what, (field, sign) in GUARDED.items():
            bound, past = getattr(self.cfg, field), self.recent[what]
            if len(past) == WINDOW and sign * fmean(past) < sign * bound:
                raise Diverged(f"{what} is {fmean(past):.3g} over the last {WINDOW} steps, {field} is {bound:g}")

    def state(self) -> dict[str, Any]:
        """Flat, and by reference: tensors, and plain values that JSON keeps exactly."""
        moments = self.optimizer.state_dict()["state"]
        return {
            **{f"adapter.{name}": tensor for name, tensor in self.policy.adapter.tensors().items()},
            **{f"moments.{i}.{key}": value for i, own in moments.items() for key, value in own.items()},
            **{f"arm.{key}": value for key, value in self.arm_state.items()},
            "step": self.step,
            "begun": self.begun,
            "skips": self.skips,
            "recent": self.recent,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave. Raises UserError where it is of another arm, adapter or model."""
        saved, mine = part(state, "adapter."), self.policy.adapter.tensors()
        if {k: t.shape for k, t in saved.items()} != {k: t.shape for k, t in mine.items()}:
            raise UserError("the checkpoint's adapter has other tensors than this run's")
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in part(state, "moments.").items():
            index, _, name = key.partition(".")
            moments[int(index)][name] = value.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
        try:
            self.arm.restore(part(state, "arm."))
        except (KeyError, TypeError) as error:
            raise UserError(f"the checkpoint is not of arm {self.cfg.arm}: {error}") from None
        for name, tensor in mine.items():
            tensor.copy_(saved[name])
        self.step, self.skips, self.recent = state["step"], list(state["skips"]), dict(state["recent"])
        self.begun = state["begun"]
        self.arm_state = self.arm.state()


def train(
    cfg: Config,
    policy: Policy,
    env: Environment,
    pairs: Sequence[Pair],
    observer: Observer,
    given: Given = EMPTY,
) -> None:
    """Train `policy` in `env` under the arm that `cfg` names. Raises what `Training.run` raises."""
    Training(cfg, policy, env, pairs, given).run(observer)


def make_optimizer(cfg: Config, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    shared = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "foreach": True}
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=cfg.beta1, **shared)
    return torch.optim.AdamW(parameters, betas=(cfg.beta1, cfg.beta2), **shared)


def rate(cfg: Config, step: int) -> float:
    """The learning rate of a step: linear warm-up, cosine decay to zero."""
    return cfg.lr * (min(1.0, (step + 1) / cfg.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / cfg.steps))))


def untrained(block: list[nn.Parameter]) -> list[nn.Parameter]:
    """The block's parameters where no row trains it in this step, none where one does: all of its gradients are exactly
    zero, or none is."""
    return [] if any(p.grad is not None and bool(p.grad.any()) for p in block) else block


def scored(rollouts: Sequence[Rollout], graded: Sequence[Graded]) -> tuple[list[Rollout], list[Graded]]:
    """The rollouts whose reward is a number that float32 holds; no other is ever averaged."""
    pairs = zip(rollouts, graded, strict=True)
    kept = [(r, g) for r, g in pairs if g.reward is not None and abs(g.reward) <= LARGEST]
    return [r for r, _ in kept], [g for _, g in kept]


def _share(total: float, n: float) -> float:
    return total / n if n else math.nan


def _facts(batch: Batch, graded: Sequence[Graded], decision: Decision, live: Tensor) -> dict[str, Any]:
    """What the record says of a step's rollouts."""
    own = ~batch.teacher
    known = [g.compiled for g, mine in zip(graded, own.tolist(), strict=True) if mine and g.compiled is not None]
    return {
        "reward": float(batch.reward[own].mean()) if bool(own.any()) else math.nan,
        "compiled": fmean(known) if known else math.nan,
        "tokens": int(batch.completion[own].sum()),
        "keep": float(decision.keep.float().mean()),
        "absorb": float(decision.absorb.float().mean()),
        "route": float(decision.route.float().mean()),
        "flagged": float(decision.flagged.float().mean()),
        "dead_groups": len(batch.group[~live].unique()),
        "t_lo": decision.threshold[0] if decision.threshold else None,
        "t_hi": decision.threshold[1] if decision.threshold else None,
        **decision.note,
    }


OF_GRADIENTS = (
    *("loss", "kl", "entropy", "clipped", "micro_batch", "norm_deployed", "norm_quarantine", "qmass"),
    *(f"log_rho_{zone}" for zone in ZONES),
)
OF_ROLLOUTS = ("reward", "compiled", "tokens", "keep", "absorb", "route", "flagged", "dead_groups", "t_lo", "t_hi")
NOTHING = dict.fromkeys((*OF_GRADIENTS, *OF_ROLLOUTS), math.nan) | {"skipped": "no rollout has a reward"}
