"""GRPO: advantages within groups, and the clipped loss with a KL term to the base model.

    A_i = (R_i - mean) / sd            mean over all rows of the group, or over those that `baseline` names
    L   = 1/(P G T_max) sum_i w_i sum_t [ -min(rho A_i, clip(rho, 1-e, 1+e) A_i) + beta (e^D - D - 1) ]
    D   = logp_ref - logp, rho = exp(logp - logp_old)
Source: METHOD.md section 4. Deltas from canon: constant normaliser P G T_max (Dr. GRPO) instead of the completion's
length; the reference is the model with its adapter skipped; a group without reward variance gives neither loss nor
KL but still counts in the normaliser.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.types import Decision

EPS = 1e-4  # added to a group's sd


def advantages(
    reward: Float[Tensor, N],
    group: Int[Tensor, N],
    *,
    norm: str,
    counted: Bool[Tensor, N] | None = None,
    present: Bool[Tensor, N] | None = None,
) -> Float[Tensor, N]:
    """Group advantages. `present` marks the rows that belong to their group at all, the others get 0 (None: all);
    `counted` those whose mean is the baseline (None: all).

    The sd is that of the group. A group in which no row counts has no baseline: its advantages are 0.
    """
    out = torch.zeros_like(reward)
    for k in group.unique():
        rows = (group == k if present is None else (group == k) & present).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        inside = rows if counted is None else rows[counted[rows]]
        spread = reward[rows].std(unbiased=False)
        if len(inside) == 0 or spread == 0:
            continue
        centred = reward[rows] - reward[inside].mean()
        out[rows] = centred / (spread + EPS) if norm == "sd" else centred
    return out


def live_groups(
    reward: Float[Tensor, N], group: Int[Tensor, N], present: Bool[Tensor, N] | None = None
) -> Bool[Tensor, N]:
    """Rows whose group has reward variance; among the rows that are `present` where that is given."""
    live = torch.zeros_like(reward, dtype=torch.bool)
    for k in group.unique():
        rows = group == k if present is None else (group == k) & present
        live[rows] = bool(rows.any()) and bool(reward[rows].max() > reward[rows].min())
    return live


def counted_rows(baseline: str, decision: Decision, teacher: Bool[Tensor, N]) -> Bool[Tensor, N] | None:
    """The rows whose mean reward is the baseline."""
    return {"all": None, "kept": decision.d == 0, "policy_only": ~teacher}[baseline]


def ratio(
    kind: str, logp: Float[Tensor, "N L"], logp_old: Float[Tensor, "N L"], teacher: Bool[Tensor, N], e: float
) -> Float[Tensor, "N L"]:
    """rho per token. A teacher row has no sampler: its logp_old is its own logp."""
    own = logp.detach()
    old = own if kind == "one" else torch.where(teacher[:, None], own, logp_old)
    rho = (logp - old).exp()
    return rho if kind != "truncated" else torch.where(rho > 1 + e, rho / rho.detach() * (1 + e), rho)


def k3(logp: Float[Tensor, "*T"], logp_ref: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
    """e^D - D - 1 of each token: an estimate of KL(policy || base) where the policy itself drew the token.

    Where it gives a token that another block state drew hardly any probability, e^D has no bound: there the term is
    no estimate of anything, but a barrier against pushing such tokens down for ever.
    """
    gap = logp_ref - logp
    return gap.exp() - gap - 1


def divergence(log_a: Float[Tensor, "T V"], log_b: Float[Tensor, "T V"]) -> Float[Tensor, T]:
    """KL(a || b) in nats, exact over the vocabulary, at each of T positions."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def grpo_loss(
    logp: Float[Tensor, "N L"],
    rho: Float[Tensor, "N L"],
    kl: Float[Tensor, "N L"],
    completion: Bool[Tensor, "N L"],
    advantage: Float[Tensor, N],
    weight: Float[Tensor, N],
    live: Bool[Tensor, N],
    *,
    e: float,
    beta: float,
    denominator: float,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss of some rows of a step, and sums over their tokens.

    `kl` is the KL term of each token; `denominator` is P G T_max of the whole step.
    """
    a = advantage[:, None]
    surrogate = torch.minimum(rho * a, rho.clamp(1 - e, 1 + e) * a)
    on = completion & live[:, None]
    per_row = torch.where(on, beta * kl - surrogate, torch.zeros_like(kl)).sum(1)
    loss = (weight * per_row).sum() / denominator
    with torch.no_grad():
        sums = {
            "tokens": float(completion.sum()),
            "clipped": float((((rho - 1).abs() > e) & completion).sum()),
        }
    return loss, sums
