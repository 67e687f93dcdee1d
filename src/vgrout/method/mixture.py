"""Two normal components of one width, fitted to scores by expectation-maximisation (Dempster, Laird, Rubin 1977).

    p(s) = (1 - pi) N(s; mu_0, sd) + pi N(s; mu_1, sd)
Deltas from canon: one width for both, so that the posterior rises with the score and has one cut; means and width stay
within bounds that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 50
WIDER = 4.0  # the width stays within this factor of where it starts: equal scores have no width of their own


@dataclass(frozen=True)
class Normals:
    """Two normal components of one width; `share` is that of the upper one."""

    low: float
    high: float
    sd: float
    share: float

    def cut(self, p: float) -> float:
        """The score above which the upper component has a posterior of more than `p`."""
        gap = self.high - self.low
        if gap <= 0 or self.share <= 0:
            return math.inf
        if self.share >= 1:
            return -math.inf
        odds = math.log((1 - self.share) / self.share) + math.log(p / (1 - p))
        return (self.low + self.high) / 2 + self.sd**2 / gap * odds


def pooled_sd(sides: Sequence[Float[Tensor, C]]) -> float:
    """The sd within the sides, whose means may differ."""
    return float(torch.cat([side - side.mean() for side in sides]).square().mean().sqrt())


def fit_mixture(x: Float[Tensor, N], means: Float[Tensor, "2"], bounds: Float[Tensor, "2 2"], sd: float) -> Normals:
    """The components after STEPS steps from `means`, `sd` and equal shares; each mean stays in its `bounds`."""
    mu, share, width = means.clamp(bounds[:, 0], bounds[:, 1]), 0.5, max(sd, 1e-6)
    least, most = width / WIDER, width * WIDER
    for _ in range(STEPS):
        log = -0.5 * ((x[:, None] - mu) / width) ** 2 + torch.tensor([1 - share, share], dtype=x.dtype).log()
        belongs = log.softmax(1)
        mass = belongs.sum(0)
        share = float(mass[1] / len(x))
        mu = torch.where(mass > 0, (belongs * x[:, None]).sum(0) / mass.clamp(min=1e-300), mu)
        mu = mu.clamp(bounds[:, 0], bounds[:, 1])
        width = min(max(float((belongs * (x[:, None] - mu) ** 2).sum() / len(x)) ** 0.5, least), most)
    return Normals(float(mu[0]), float(mu[1]), width, share)
