"""Every arm by name: the table of contents of what can be compared. Adding one: a class and an entry here."""

from __future__ import annotations

from vgrout.arms.base import Arm, Bench
from vgrout.arms.controls import Absorb, None2r, RlBaseline
from vgrout.arms.monitored import (
    CoinFlip,
    OraclePenalty,
    OracleRoute,
    OracleScreen,
    PenaltyV,
    Placebo,
    PlaceboMatched,
    PlaceboShuffled,
    PlaceboStyle,
    RouteV,
    ScreenV,
)

ARMS: dict[str, type[Arm]] = {
    "none": Arm,  # vanilla GRPO, one block
    "none_2r": None2r,  # vanilla GRPO, both blocks, shipped as it is
    "rl_baseline": RlBaseline,  # no loophole
    "absorb": Absorb,  # both blocks train, quarantine ablated
    "coin_flip": CoinFlip,  # routing by chance
    "placebo": Placebo,  # routing by a random direction
    "placebo_matched": PlaceboMatched,  # the same, with the counts of a routeV run
    "placebo_shuffled": PlaceboShuffled,  # routing by the direction of half-exchanged pairs
    "placebo_style": PlaceboStyle,  # routing by the direction of pairs without a hack
    "routeV": RouteV,  # routing by the pairs' direction
    "screen_v": ScreenV,  # screening by it
    "penalty_v": PenaltyV,  # a penalty by it
    "oracle_route": OracleRoute,  # routing by true labels (ceiling)
    "oracle_screen": OracleScreen,  # screening by them (ceiling)
    "oracle_penalty": OraclePenalty,  # a penalty by them (ceiling)
}

__all__ = ["ARMS", "Arm", "Bench"]
