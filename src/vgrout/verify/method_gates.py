"""Gates of the method: the probe, the direction, the gate policies and the loss."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean, pstdev, stdev

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from vgrout.adapters.base import BlockLinear
from vgrout.adapters.delta_s import DeltaS
from vgrout.adapters.lora2r import Lora2r
from vgrout.config import Config
from vgrout.engines.torch_engine import encode_completion, encode_prompt
from vgrout.envs.micro_env import POOL
from vgrout.lab.measure import auroc
from vgrout.lab.run import make_policy
from vgrout.loop import adapted, rows_of_pairs
from vgrout.method.direction import Direction, DirectionError, calibrate, haar, v_grad
from vgrout.method.gate import POLICIES, decide
from vgrout.method.loss import EPS, advantages, counted_rows, divergence, grpo_loss, k3, live_groups, ratio
from vgrout.method.policy import Policy, Rows, stack
from vgrout.method.prefix import by_prompt
from vgrout.pairs import load as load_pairs
from vgrout.types import Decision
from vgrout.verify.evidence import Evidence, gap
from vgrout.verify.toy import TOY, VARIANTS, displace, micro, other_models, tokenizer, toy_policy

DRAWS = 1000


def toy_rows(count: int, length: int = 6) -> Rows:
    """Prompts of different lengths, completions of equal length."""
    generator = torch.Generator().manual_seed(3)
    words = [torch.randint(5, 261, (8 + length,), generator=generator).tolist() for _ in range(count)]
    prompts = [row[: 3 + i % 4] for i, row in enumerate(words)]
    return stack(prompts, [row[8:] for row in words], 0)


def sharing_rows() -> Rows:
    """Two prompts of different lengths with three rows each, one with two, one with one; completions of different
    lengths."""
    words = torch.randint(5, 261, (9, 12), generator=torch.Generator().manual_seed(4)).tolist()
    prompts = [words[i][: 3 + i] for i in (0, 1, 2, 0, 1, 0, 1, 3, 2)]
    return stack(prompts, [row[6 : 8 + i % 5] for i, row in enumerate(words)], 0)


# The c-probe.


def formula(policy: Policy, row: Rows) -> Tensor:
    """[M, R]: sum_t (A x_t)_j (B^T delta_t)_j of one row, from hooks on a plain pass; zeros behind narrow ones."""
    modules = policy.adapter.modules
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            inputs[name] = args[0].detach()
            output.retain_grad()
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        logits = policy.model(input_ids=row.tokens, use_cache=False).logits / policy.temperature
    finally:
        for handle in handles:
            handle.remove()
    logp = logits[0, :-1].log_softmax(-1).gather(1, row.tokens[0, 1:, None])[:, 0]
    wanted = row.completion[0, 1:]
    (-logp[wanted].mean()).backward()
    out = []
    for name, module in modules.items():
        a, b = scored_factors(module)
        out.append(((inputs[name][0] @ a.T) * (outputs[name].grad[0] @ b)).sum(0))
    policy.model.zero_grad()
    return pad_sequence(out, batch_first=True)


def scored_factors(module: BlockLinear) -> tuple[Tensor, Tensor]:
    """A [R, i] and B [o, R] of METHOD.md's score gradients, for each kind from its own formula."""
    own = dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
    if isinstance(module, Lora2r):
        return own["A0_deployed"] + own["dA_deployed"].detach(), own["B0_deployed"] + own["dB_deployed"].detach()
    if isinstance(module, DeltaS):
        u, _, vh = np.linalg.svd(module.base.weight.numpy(), full_matrices=False)
        return torch.from_numpy(vh), torch.from_numpy(u)
    return own["R"], own["B"]


def probe() -> Evidence:
    """In every kind and init of the adapter, and on models that attend in other ways."""
    warm = replace(TOY, temperature=0.7)
    policies = {name: toy_policy(replace(warm, **how)) for name, how in VARIANTS.items()}
    policies |= {name: adapted(warm, model, tokenizer(), ()) for name, model in other_models().items()}
    found = {name: _probe(policy) for name, policy in policies.items()}
    wrong = "; ".join(f"{name}: {e.text}" for name, e in found.items() if not e.ok)
    return Evidence(not wrong, wrong or f"{len(found)} adapters and models; lora2r: {found['lora2r'].text}")


def _probe(policy: Policy) -> Evidence:
    shared = sharing_rows()
    adapter, off, alone, smallest, values = policy.adapter, 0.0, 0.0, math.inf, by_prompt(shared)[0] == [7]
    for moved, rows in ((False, toy_rows(5)), (True, toy_rows(5)), (True, shared)):
        n = len(rows.length)
        if moved and rows is not shared:
            displace(adapter)
        for state in ("full", "deployed"):
            batched = policy.c_gradients(rows, state)
            smallest = min(smallest, float(batched.norm(dim=-1).min()))
            for i in range(n):
                row = rows.take(torch.tensor([i]))
                alone = max(alone, gap(policy.c_gradients(row, state)[0], batched[i]))
                with adapter.state(state):
                    off = max(off, gap(batched[i], formula(policy, row)))
            for context in (adapter.state(state), adapter.merged(state)) if rows is not shared else ():
                with torch.no_grad(), context:
                    plain = policy.logp(rows)
                    with adapter.probe(n):
                        values = values and torch.equal(policy.logp(rows), plain)
    left = [p.grad for p in policy.model.parameters() if p.grad is not None and bool(p.grad.any())]
    ok = values and off < 1e-4 and alone < 1e-4 and smallest > 1e-6 and not left
    return Evidence(
        ok,
        f"values bit for bit: {values}; relative difference to the formula {off:.1e}, to solo rows {alone:.1e}; "
        f"smallest gradient of a module {smallest:.1e}, at init too",
    )


def grpo_identity() -> Evidence:
    policy = toy_policy(TOY)
    displace(policy.adapter, scale=0.05)
    rows = toy_rows(8)
    hack, clean = rows.take(torch.arange(0, 8, 2)), rows.take(torch.arange(1, 8, 2))
    v = v_grad(policy.c_gradients(hack, "deployed"), policy.c_gradients(clean, "deployed"))
    with policy.adapter.deployed():
        one = torch.tensor([1.0, -1.0] * 4)
        with policy.adapter.probe(8) as probes:
            logp = policy.logp(rows)
            loss, _ = grpo_loss(
                logp,
                ratio("one", logp, torch.zeros_like(logp), torch.zeros(8, dtype=torch.bool), 0.2),
                torch.zeros_like(logp),
                rows.completion,
                one,
                torch.ones(8),
                torch.ones(8, dtype=torch.bool),
                e=0.2,
                beta=0.0,
                denominator=48.0,
            )
            grads = torch.stack(torch.autograd.grad(loss, list(probes.values())), 1).sum(0)
    cos = cosine_similarity(grads, v, dim=-1)
    low, high = float(cos.min()), float(cos.max())
    return Evidence(
        low > 1 - 1e-4, f"cosine of the loss gradient with v over {len(cos)} modules in [{low:.6f}, {high:.6f}]"
    )


# Directions on the organism.


@dataclass(frozen=True)
class Measured:
    """c-gradients of the pairs' sides and of the stored demonstrations, on the untrained organism."""

    hack: Tensor
    clean: Tensor
    demos: Tensor
    is_hack: np.ndarray
    mode: np.ndarray

    def auroc(self, direction: Direction, rows: np.ndarray | None = None) -> float:
        """How well scores tell hacks from solutions, as the training gate would compute them."""
        rows = np.ones(len(self.is_hack), bool) if rows is None else rows
        score, _ = direction.score(self.demos[torch.from_numpy(rows)])
        area = auroc(score.tolist(), self.is_hack[rows].tolist())
        assert area is not None
        return area


@cache
def measured() -> Measured:
    policy, env = make_policy(Config()), micro()
    pairs = load_pairs(Config().pairs)
    records = [json.loads(line) for line in POOL.read_text().splitlines()][1:]
    first = {(r["problem_id"], r["kind"]): r for r in reversed(records)}  # one demonstration of each kind
    chosen = [first[key] for key in sorted(first)]
    prompts = [env.prompt(r["problem_id"], family="train", hinted=True, draw=0) for r in chosen]
    words = policy.tokenizer
    rows = stack(
        [encode_prompt(words, p) for p in prompts],
        [encode_completion(words, r["text"]) for r in chosen],
        words.pad_token_id,
    )
    return Measured(
        hack=policy.c_gradients(rows_of_pairs(policy, pairs, "hack"), "deployed"),
        clean=policy.c_gradients(rows_of_pairs(policy, pairs, "clean"), "deployed"),
        demos=policy.c_gradients(rows, "deployed"),
        is_hack=np.array([r["kind"] == "hack" for r in chosen]),
        mode=np.array([env.problem(r["problem_id"]).mode for r in chosen]),
    )


def random_draws(count: int) -> list[Direction]:
    m = measured()
    _, modules, rank = m.hack.shape
    return [calibrate(haar(modules, rank, seed), m.hack, m.clean, real=False) for seed in range(count)]


def haar_null() -> Evidence:
    m = measured()
    areas = [m.auroc(direction) for direction in random_draws(DRAWS)]
    centre, spread = mean(areas), pstdev(areas)
    return Evidence(
        abs(centre - 0.5) <= 0.03,
        f"mean AUROC {centre:.3f} (sd {spread:.3f}) of {DRAWS} draws on {len(m.is_hack)} demonstrations",
    )


def instrument() -> Evidence:
    m = measured()
    v = calibrate(v_grad(m.hack, m.clean), m.hack, m.clean, real=True)
    tags = {t.removeprefix("mode:") for p in load_pairs(Config().pairs) for t in p.tags if t.startswith("mode:")}
    modes = sorted(set(m.mode))
    area = {mode: m.auroc(v, m.mode == mode) for mode in modes}
    covered = np.isin(m.mode, sorted(tags))
    own, everything = m.auroc(v, covered), m.auroc(v)
    chance = [m.auroc(direction, covered) for direction in random_draws(200)]
    bar = float(np.quantile(chance, 0.95))
    ok = v.accuracy >= 0.9 and own >= 0.85 and own > bar
    each = ", ".join(f"{mode} {area[mode]:.2f}{'' if mode in tags else ' (held out)'}" for mode in modes)
    return Evidence(
        ok,
        f"paired accuracy {v.accuracy:.2f} of {len(m.hack)} pairs; AUROC {own:.2f} in modes that pairs cover, "
        f"95th percentile of random directions {bar:.2f}; {each}; all {everything:.2f}",
    )


# Thresholds.


def zones(scores: Tensor, t: tuple[float, float]) -> str:
    decision = decide(scores, torch.ones(len(scores), dtype=torch.bool), *t)
    return "".join(zone[0] for zone in decision.zones())


def banded(hack: Sequence[float], clean: Sequence[float], real: bool = True) -> Direction:
    one = torch.ones(1)
    return Direction(torch.ones(1, 1), 0 * one, one, torch.tensor(hack), torch.tensor(clean), real)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def policies() -> Evidence:
    wrong: list[str] = []

    def expect(what: str, got, want) -> None:
        close = got == want if isinstance(want, str) else max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-5
        if not close:
            wrong.append(f"{what} gives {got}, by hand {want}")

    no_g = torch.zeros(1, 1, 1)
    cfg = Config(t_lo=0.25, t_hi=0.5, k_mid=0.5, k_route=1.0, q=0.2, buffer=6)
    expect("decide at its thresholds", zones(torch.tensor([0.0, 1.0, 1.5, 2.0, 2.5]), (1.0, 2.0)), "kkaar")

    hack, clean = [1.0, 3.0, 2.0, 10.0], [0.0, -1.0, 1.0, 0.5]
    lo, hi = percentile(clean, 0.75), percentile(hack, 0.75)
    band = POLICIES["pair_p75"](cfg).thresholds(torch.zeros(1), no_g, banded(hack, clean))
    expect("pair_p75", band, (lo + 0.25 * (hi - lo), lo + 0.5 * (hi - lo)))
    expect("percentiles", (lo, hi), (0.625, 4.75))
    band = POLICIES["pair_mean"](cfg).thresholds(torch.zeros(1), no_g, banded(hack, clean))
    expect("pair_mean", band, (0.125 + 0.25 * 3.875, 0.125 + 0.5 * 3.875))
    reversed_bands = 0
    for name in ("pair_p75", "pair_mean"):
        gate = POLICIES[name](cfg)
        for h, c in ((clean, hack), ([1.0, 1.0], [1.0, 1.0])):
            try:
                gate.thresholds(torch.zeros(1), no_g, banded(h, c))
            except DirectionError:
                reversed_bands += 1
        a = gate.thresholds(torch.zeros(1), no_g, banded(hack, clean, real=False))
        expect(f"{name} of a control", gate.thresholds(torch.zeros(1), no_g, banded(clean, hack, real=False)), a)
    if reversed_bands != 4:
        wrong.append(f"{reversed_bands} of 4 reversed bands refused")

    scores = [0.1, 0.4, -0.2, 1.3, 0.9]
    t = POLICIES["batch_std"](cfg).thresholds(torch.tensor(scores), no_g, banded(hack, clean))
    expect("batch_std", t, (mean(scores) + 0.5 * stdev(scores), mean(scores) + stdev(scores)))
    rng, equal = random.Random(0), 0
    for _ in range(300):
        flat = torch.full((rng.randint(2, 70),), rng.gauss(0, 1))
        g, direction = torch.tensor([0.6, 0.8]).expand(len(flat), 1, 2), banded(hack, clean)
        direction = replace(direction, v=torch.tensor([[rng.gauss(0, 1), 1.0]]))
        for name, scores in (("batch_std", flat), ("top2q", direction.score(g)[0])):
            equal += set(zones(scores, POLICIES[name](cfg).thresholds(scores, g, direction))) == {"k"}
    if equal != 600:
        wrong.append(f"equal scores train only the deployed block in {equal} of 600 batches")

    gate = POLICIES["top2q"](cfg)
    angles = [0.1, 0.5, 0.9, 1.3, 1.7, 2.1, 2.5, 2.9]
    g = torch.tensor([[[math.cos(a), math.sin(a)]] for a in angles])
    for part, v in ((g[:4], (1.0, 0.0)), (g[4:], (0.0, 1.0))):  # the history is scored again when v moves
        one = torch.ones(1)
        direction = Direction(torch.tensor([v]), 0.2 * one, 0.5 * one, one, one, True)
        t = gate.thresholds(direction.score(part)[0], part, direction)
    history = [(math.sin(a) - 0.2) / 0.5 for a in angles[-6:]]
    expect("top2q", t, (percentile(history, 0.6), percentile(history, 0.8)))
    weighed = POLICIES["ema_quantile"](replace(cfg, half_life=1.0))
    for part in (g[:4], g[4:]):
        t = weighed.thresholds(direction.score(part)[0], part, direction)
    copies = [*history[:2], *(s for s in history[2:] for _ in range(16))]  # 4 rollouts ago: a 16th of the weight
    expect("ema_quantile", t, [sorted(copies)[math.ceil(share * len(copies)) - 1] for share in (0.6, 0.8)])

    hack, clean = [0.9, 1.1, 1.3, 1.5], [-1.1, -0.9, -1.3, -1.5]  # quartiles 1.05, 1.35 and the same below zero
    far = torch.tensor([-1.2] * 6 + [1.2] * 2)  # so far apart that each row belongs to one component
    lo, hi = POLICIES["mixture"](cfg).thresholds(far, no_g, banded(hack, clean))
    width = pstdev([0.9, 1.1, 1.3, 1.5]) / 4  # the scores have none: what is left of the pairs'
    odds = width**2 / 2.4 * math.log(0.75 / 0.25)
    expect("mixture", (lo, hi), (odds, odds + width**2 / 2.4 * math.log(0.8 / 0.2)))
    return Evidence(
        not wrong, "; ".join(wrong) or "6 policies equal hand numbers; 600 batches of equal scores route nobody"
    )


# The loss.


def by_hand_advantages(reward, group, norm, counted) -> list[float]:
    out = []
    for k in range(len(reward)):
        inside = [r for r, g in zip(reward, group, strict=True) if g == group[k]]
        base = [r for r, g, c in zip(reward, group, counted, strict=True) if g == group[k] and c]
        if not base or len(set(inside)) == 1:
            out.append(0.0)
            continue
        centred = reward[k] - mean(base)
        out.append(centred / (pstdev(inside) + EPS) if norm == "sd" else centred)
    return out


def by_hand_loss(case: dict, kind: str, e: float, beta: float, denominator: float) -> tuple[float, list[list[float]]]:
    """The loss of METHOD.md section 4 in plain Python, token by token, and its derivative by each logp."""
    total, slopes = 0.0, [[0.0] * len(row) for row in case["logp"]]
    for i, row in enumerate(case["logp"]):
        group = [r for r, g in zip(case["reward"], case["group"], strict=True) if g == case["group"][i]]
        if len(set(group)) == 1:
            continue
        for t, lp in enumerate(row):
            if not case["completion"][i][t]:
                continue
            a, fixed = case["advantage"][i], kind == "one" or case["teacher"][i]
            rho = 1.0 if fixed else math.exp(lp - case["old"][i][t])
            if kind == "truncated":
                rho = min(rho, 1 + e)
            inside = 1 - e <= rho <= 1 + e
            surrogate = min(rho * a, min(max(rho, 1 - e), 1 + e) * a)
            slope = rho * a if inside or rho * a < surrogate + 1e-12 else 0.0
            gap_ = case["ref"][i][t] - lp
            total += case["weight"][i] * (-surrogate + beta * (math.exp(gap_) - gap_ - 1))
            slopes[i][t] = case["weight"][i] * (-slope + beta * (1 - math.exp(gap_))) / denominator
    return total / denominator, slopes


def exact_kl() -> float:
    """Largest relative gap of the exact KL to plain Python, and of the expectation of k3 over the policy to it."""
    generator = torch.Generator().manual_seed(6)
    log_p, log_ref = (3 * torch.randn(4, 9, generator=generator).log_softmax(-1) for _ in range(2))
    log_p, log_ref = log_p.log_softmax(-1), log_ref.log_softmax(-1)
    p, q = log_p.exp().tolist(), log_ref.exp().tolist()
    by_hand = [sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    exact = divergence(log_p, log_ref)
    return max(gap(exact, torch.tensor(by_hand)), gap((log_p.exp() * k3(log_p, log_ref)).sum(-1), exact))


def loss() -> Evidence:
    rng, off, checked = random.Random(5), 0.0, 0
    n, width = 8, 5
    group, reward = [0, 0, 0, 0, 1, 1, 1, 1], [3.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    teacher = [True] + [False] * 7
    case = {
        "group": group,
        "reward": reward,
        "teacher": teacher,
        "completion": [[t >= 1 and t < 3 + i % 3 for t in range(width)] for i in range(n)],
        "weight": [1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        "logp": [[-rng.random() * 2 for _ in range(width)] for _ in range(n)],
    }
    case["old"] = [[lp + rng.uniform(-0.8, 0.8) for lp in row] for row in case["logp"]]
    case["ref"] = [[lp + rng.uniform(-0.8, 0.8) for lp in row] for row in case["logp"]]
    grouped, rewards = torch.tensor(group), torch.tensor(reward)
    d = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # nobody of the second group is kept
    decision = Decision(m=torch.ones(n), d=d, weight=torch.ones(n), penalty=torch.zeros(n))
    clipped_both = set()
    for baseline, hand in (("all", [1] * n), ("kept", (1 - d).tolist()), ("policy_only", [not t for t in teacher])):
        counted = counted_rows(baseline, decision, torch.tensor(teacher))
        for norm in ("sd", "mean"):
            got = advantages(rewards, grouped, norm=norm, counted=counted)
            case["advantage"] = by_hand_advantages(reward, group, norm, hand)
            off = max(off, float((got - torch.tensor(case["advantage"])).abs().max()))
            for kind in ("one", "sampler", "truncated"):
                logp = torch.tensor(case["logp"], requires_grad=True)
                rho = ratio(kind, logp, torch.tensor(case["old"]), torch.tensor(teacher), 0.2)
                value, _ = grpo_loss(
                    logp,
                    rho,
                    k3(logp, torch.tensor(case["ref"])),
                    torch.tensor(case["completion"]),
                    got,
                    torch.tensor(case["weight"]),
                    live_groups(rewards, grouped),
                    e=0.2,
                    beta=0.3,
                    denominator=200.0,
                )
                want, slopes = by_hand_loss(case, kind, 0.2, 0.3, 200.0)
                (grad,) = torch.autograd.grad(value, logp)
                off = max(off, abs(value.item() - want) / abs(want), gap(grad, torch.tensor(slopes)))
                checked += 1
                hot = (rho - 1).abs() > 0.2 + 1e-6
                signs = (got[:, None].expand_as(rho)[hot] > 0).tolist()
                clipped_both |= set(zip((rho[hot] > 1).tolist(), signs, strict=True))
    off = max(off, exact_kl())
    ok = off < 1e-4 and len(clipped_both) == 4
    return Evidence(
        ok,
        f"{checked} losses, their gradients, the exact KL as expectation of k3, 6 kinds of advantages: "
        f"largest relative difference {off:.1e}; "
        f"ratios out of the interval on {len(clipped_both)} of 4 sides",
    )
