"""Advantage modification: rollouts whose residual points towards the pairs' hacks lose reward within their group.

    s_i = <h_i, d>      h [H]: mean over the layers of `concept.py`, at the token that `adv_position` names; d: unit
    z_i = (s_i - mean_g) / max(sd_g, .1)                 mean and sd over the rows of the group, demonstrations included
    additive         r - a max(z, 0)
    multiplicative   r (1 - a sigmoid(z) [z > 0])        at a = 2 negative for z > 0: the reward changes its sign
    clipped          r max(0, 1 - a sigmoid(z) [z > 0])
The group's advantages are those of the rewards that come out. Source: Wu and Tang 2026, as ARMS.md states it.
Deltas from canon: d is the present model's and follows it, from the pairs that every other arm has; three positions.
`prompt_last`, the prompt's last token read literally, gives all rollouts of a prompt the same s, so that z is 0 and
nothing changes; its d is extracted at the completion's last token, since the sides of a pair share their prompt.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vgrout.arms.concept import Concept
from vgrout.method.direction import haar
from vgrout.method.policy import Rows
from vgrout.method.residual import prompts_of, residuals

FLOOR = 0.1  # of a group's sd, in units of s

Form = Literal["additive", "multiplicative", "clipped"]


def standing(score: Float[Tensor, N], group: Int[Tensor, N]) -> Float[Tensor, N]:
    """z in float64, where the mean of equal float32 scores is that score: equal scores have z = 0 exactly."""
    s = score.double()
    z = torch.zeros_like(s)
    for k in group.unique():
        rows = group == k
        z[rows] = (s[rows] - s[rows].mean()) / s[rows].std(unbiased=False).clamp(min=FLOOR)
    return z


def modified(reward: Float[Tensor, N], z: Float[Tensor, N], form: Form, a: float) -> Float[Tensor, N]:
    """The rewards that credit is given for. A row with z <= 0 keeps its own to the bit."""
    r = reward.double()
    factor = 1 - a * z.sigmoid() * (z > 0)
    out = {
        "additive": r - a * z.clamp(min=0),
        "multiplicative": r * factor,
        "clipped": r * factor.clamp(min=0),
    }[form]
    return out.to(reward.dtype)


class AdvantageModification(Concept):
    name = "adv_mod"
    claim = "lowers rewards by the residual's standing along the pairs' direction within its group"
    paper = "Wu and Tang 2026"
    action = "lower the reward"
    scores = True

    def __init__(self, bench):
        super().__init__(bench)
        self.lowered = 0.0  # share of the step's rollouts

    @property
    def pool(self):
        return "resp_mean" if self.cfg.adv_position == "resp_mean" else "resp_last"

    def difference(self, hack, clean):
        return normalize((hack - clean).mean((0, 1)), dim=-1)[None]

    def shape(self, batch):
        rows = Rows(batch.tokens, batch.completion, batch.length)
        at = self.cfg.adv_position
        h = residuals(self.bench.policy, rows, at, state="deployed", layers=self.layers).mean(1)
        self.passes += len(prompts_of(rows)[0].length) if at == "prompt_last" else batch.n
        z = standing(h @ self.d[0], batch.group)
        self.lowered = float((z > 0).float().mean())
        return modified(batch.reward, z, self.cfg.adv_form, self.cfg.adv_strength)

    def said(self):
        return {"lowered": self.lowered}


class AdvantageHaar(AdvantageModification):
    name = "adv_mod_haar"
    claim = "adv_mod along a Haar-random direction, one draw per run"
    access = "L0"
    signal = "random"

    def difference(self, hack, clean):
        return haar(1, hack.shape[-1], self.cfg.chance_seed)
