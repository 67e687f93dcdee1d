"""Gate policies: thresholds (t_lo, t_hi) from scores. keep: s <= t_lo; route: s > t_hi; absorb in between.

Strict inequalities: rollouts with equal scores route nobody. Source: METHOD.md section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vgrout.config import Config
from vgrout.method.direction import Direction, DirectionError
from vgrout.method.mixture import fit_mixture, pooled_sd
from vgrout.types import Decision


@runtime_checkable
class GatePolicy(Protocol):
    def __init__(self, cfg: Config) -> None: ...

    def thresholds(
        self, score: Float[Tensor, N], g: Float[Tensor, "N M R"], direction: Direction
    ) -> tuple[float, float]: ...


@runtime_checkable
class Remembers(Protocol):
    """A gate policy whose thresholds depend on earlier steps: a run that goes on needs what it remembers."""

    def state(self) -> dict[str, Tensor]:
        """By reference; later steps put new tensors in their place and change none."""

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


def reversed_band(clean: float, hack: float) -> DirectionError:
    return DirectionError(f"the pairs' band is reversed (clean {clean:.3f}, hack {hack:.3f}): v does not separate them")


class PairBand:
    """Cuts at fixed places of the pairs' band [lo, hi]: unit 0 is lo, unit 1 is hi.

    A subclass says what lo and hi are. A real direction with hi <= lo is an error; a control's band is sorted.
    """

    def __init__(self, cfg: Config) -> None:
        self.units = (cfg.t_lo, cfg.t_hi)

    def band(self, direction: Direction) -> tuple[float, float]:
        raise NotImplementedError

    def thresholds(self, score, g, direction):
        lo, hi = self.band(direction)
        if direction.real and hi <= lo:
            raise reversed_band(lo, hi)
        lo, hi = min(lo, hi), max(lo, hi)
        return tuple(lo + t * (hi - lo) for t in self.units)


class PairP75(PairBand):
    """lo, hi = 75th percentiles of the pairs' clean and hack scores."""

    def band(self, direction):
        return float(direction.clean.quantile(0.75)), float(direction.hack.quantile(0.75))


class PairMean(PairBand):
    """lo, hi = means of the pairs' clean and hack scores."""

    def band(self, direction):
        return float(direction.clean.mean()), float(direction.hack.mean())


class BatchStd:
    """mean + k sd of this step's scores."""

    def __init__(self, cfg: Config) -> None:
        self.k = (cfg.k_mid, cfg.k_route)

    def thresholds(self, score, g, direction):
        exact = score.double()  # the float32 mean of equal scores can lie below them
        mean, sd = float(exact.mean()), float(exact.std()) if len(exact) > 1 else 0.0
        return tuple(mean + k * sd for k in self.k)


class History:
    """The latest rollouts' c-gradients [<= size, M, R], scored against the present direction at every step."""

    def __init__(self, cfg: Config) -> None:
        self.q, self.size = cfg.q, cfg.buffer
        self.history: Tensor | None = None

    def scores(self, g: Float[Tensor, "N M R"], direction: Direction) -> tuple[Tensor, Tensor]:
        """Remember `g`, and score what is remembered: scores, and which rows have a gradient."""
        grown = g if self.history is None else torch.cat((self.history, g))
        self.history = grown[-self.size :]
        return direction.score(self.history)

    def state(self):
        return {} if self.history is None else {"history": self.history}

    def restore(self, state):
        self.history = state.get("history")


class Top2q(History):
    """Quantiles 1-2q and 1-q of a history of rollouts, re-scored against the present direction."""

    def thresholds(self, score, g, direction):
        scores, live = self.scores(g, direction)
        scores = scores[live] if bool(live.any()) else scores
        return float(scores.quantile(max(0.0, 1 - 2 * self.q))), float(scores.quantile(1 - self.q))


class EmaQuantile(History):
    """The same quantiles where a rollout weighs 2^(-age / half_life), its age being the rollouts of later steps."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.half_life = cfg.half_life
        self.age: Tensor | None = None  # [<= size]

    def thresholds(self, score, g, direction):
        scores, live = self.scores(g, direction)
        fresh = torch.zeros(len(g), dtype=torch.float64)
        self.age = fresh if self.age is None else torch.cat((self.age + len(g), fresh))[-self.size :]
        weight = 0.5 ** (self.age / self.half_life) * (live if bool(live.any()) else 1)
        return tuple(weighted_quantile(scores, weight, p) for p in (max(0.0, 1 - 2 * self.q), 1 - self.q))

    def state(self):
        return {} if self.history is None else {"history": self.history, "age": self.age}

    def restore(self, state):
        super().restore(state)
        self.age = state.get("age")


def weighted_quantile(values: Float[Tensor, N], weight: Float[Tensor, N], p: float) -> float:
    """The smallest value at or below which lies a share `p` of the weight."""
    order = torch.argsort(values)[weight[torch.argsort(values)] > 0]
    reached = weight[order].cumsum(0)
    at = torch.searchsorted(reached, p * reached[-1])
    return float(values[order[min(int(at), len(order) - 1)]])


class Mixture:
    """Absolute cuts that follow the share of hacks: two normal components of one width, fitted to this step's scores.

        p(s) = (1 - pi) N(s; mu_0, sd) + pi N(s; mu_1, sd)            by expectation-maximisation
        t(p) = (mu_0 + mu_1)/2 + sd^2/(mu_1 - mu_0) (log (1-pi)/pi + log p/(1-p))
    Above t(p) the posterior of the upper component exceeds p. It starts from the pairs' scores: mu_0 and mu_1 at the
    means of their clean and hack sides, sd their pooled sd, pi one half. A mean stays between the quartiles of its own
    side, so that the component of hacks cannot drift into the bulk when nothing hacks, nor that of solutions when
    everything does. Where that leaves no room between the two, nothing is flagged: both thresholds are infinite.
    """

    def __init__(self, cfg: Config) -> None:
        self.p = (cfg.p_absorb, cfg.p_route)

    def thresholds(self, score, g, direction):
        sides = direction.clean.double(), direction.hack.double()
        if sides[1].mean() <= sides[0].mean():
            if direction.real:
                raise reversed_band(float(sides[0].mean()), float(sides[1].mean()))
            sides = sides[::-1]
        bounds = torch.stack([side.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)) for side in sides])
        middle = (bounds[0, 1] + bounds[1, 0]) / 2
        if bounds[0, 1] > bounds[1, 0]:
            bounds[0].clamp_(max=middle), bounds[1].clamp_(min=middle)
        fit = fit_mixture(score.double(), torch.stack([side.mean() for side in sides]), bounds, pooled_sd(sides))
        return tuple(fit.cut(p) for p in self.p)


POLICIES: dict[str, type[GatePolicy]] = {
    "pair_p75": PairP75,
    "pair_mean": PairMean,
    "batch_std": BatchStd,
    "top2q": Top2q,
    "ema_quantile": EmaQuantile,
    "mixture": Mixture,
}


def decide(score: Float[Tensor, N], live: Bool[Tensor, N], t_lo: float, t_hi: float) -> Decision:
    """Zones from scores. A row without a gradient (`live` False) is absorbed."""
    route = (score > t_hi) & live
    keep = (score <= t_lo) & live & ~route
    return Decision(
        m=(~keep).float(),
        d=route.float(),
        weight=torch.ones_like(score),
        penalty=torch.zeros_like(score),
        score=score,
        threshold=(t_lo, t_hi),
    )


def ranked(score: Float[Tensor, N], live: Bool[Tensor, N], routed: int, absorbed: int) -> Decision:
    """Zones by rank: the `routed` highest scores are routed and the next ones absorbed, `absorbed` in all with the rows
    without a gradient (`live` False), which are absorbed first. Fewer where there are not as many rows."""
    order = torch.argsort(torch.where(live, score, -torch.inf), descending=True, stable=True)[: int(live.sum())]
    m, d = (~live).to(score.dtype), torch.zeros_like(score)
    m[order[: routed + max(0, absorbed - int((~live).sum()))]] = 1
    d[order[:routed]] = 1
    return Decision(m=m, d=d, weight=torch.ones_like(score), penalty=torch.zeros_like(score), score=score)


def uniform(n: int, zone: str) -> Decision:
    """Every rollout in one zone."""
    one, zero = torch.ones(n), torch.zeros(n)
    m, d = {"keep": (zero, zero), "absorb": (one, zero), "route": (one, one)}[zone]
    return Decision(m=m, d=d, weight=one, penalty=zero)
