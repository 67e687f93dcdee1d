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
            raise DirectionError(
                f"the pairs' band is reversed (clean {lo:.3f}, hack {hi:.3f}): v does not separate them"
            )
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


class Top2q:
    """Quantiles 1-2q and 1-q of a history of rollouts, re-scored against the present direction."""

    def __init__(self, cfg: Config) -> None:
        self.q, self.size = cfg.q, cfg.buffer
        self.history: Tensor | None = None  # c-gradients [<= size, M, R]

    def thresholds(self, score, g, direction):
        grown = g if self.history is None else torch.cat((self.history, g))
        self.history = grown[-self.size :]
        scores, live = direction.score(self.history)
        scores = scores[live] if bool(live.any()) else scores
        return float(scores.quantile(max(0.0, 1 - 2 * self.q))), float(scores.quantile(1 - self.q))

    def state(self):
        return {} if self.history is None else {"history": self.history}

    def restore(self, state):
        self.history = state.get("history")


POLICIES: dict[str, type[GatePolicy]] = {
    "pair_p75": PairP75,
    "pair_mean": PairMean,
    "batch_std": BatchStd,
    "top2q": Top2q,
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
    """Zones by rank: the `routed` highest scores are routed and the next `absorbed` ones absorbed; rows without a
    gradient come last. Fewer where there are not as many rows."""
    order = torch.argsort(torch.where(live, score, -torch.inf), descending=True, stable=True)
    m, d = torch.zeros_like(score), torch.zeros_like(score)
    m[order[: routed + absorbed]] = 1
    d[order[:routed]] = 1
    return Decision(m=m, d=d, weight=torch.ones_like(score), penalty=torch.zeros_like(score), score=score)


def uniform(n: int, zone: str) -> Decision:
    """Every rollout in one zone."""
    one, zero = torch.ones(n), torch.zeros(n)
    m, d = {"keep": (zero, zero), "absorb": (one, zero), "route": (one, one)}[zone]
    return Decision(m=m, d=d, weight=one, penalty=zero)
