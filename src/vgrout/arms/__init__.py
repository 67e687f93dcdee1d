"""Every arm by name: the table of contents of what can be compared. Adding one: a class and an entry here."""

from __future__ import annotations

from vgrout.arms.base import Arm, Bench
from vgrout.arms.controls import Absorb, CoinFlip, None2r, OracleRoute, RlBaseline
from vgrout.arms.route_v import Placebo, RouteV

ARMS: dict[str, type[Arm]] = {
    "none": Arm,  # vanilla GRPO, one block
    "none_2r": None2r,  # vanilla GRPO, both blocks, shipped as it is
    "rl_baseline": RlBaseline,  # no loophole
    "absorb": Absorb,  # both blocks train, quarantine ablated
    "coin_flip": CoinFlip,  # routing by chance
    "placebo": Placebo,  # routing by a random direction
    "routeV": RouteV,  # routing by the pairs' direction
    "oracle_route": OracleRoute,  # routing by true labels (ceiling)
}

__all__ = ["ARMS", "Arm", "Bench"]
