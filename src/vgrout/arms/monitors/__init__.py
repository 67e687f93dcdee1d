"""Every monitor by name: what can tell a rollout from its neighbours. Adding one: a file and an entry here."""

from __future__ import annotations

from vgrout.arms.monitors.base import Monitor
from vgrout.arms.monitors.chance import Coin
from vgrout.arms.monitors.gradient import GradientScore, HaarScore, MatchedHaarScore, ShuffledScore, StyleScore
from vgrout.arms.monitors.labels import Labels

MONITORS: dict[str, type[Monitor]] = {
    "coin": Coin,  # chance
    "haar": HaarScore,  # the rollout's gradient along a random direction
    "haar_matched": MatchedHaarScore,  # the same, with another run's counts
    "shuffled": ShuffledScore,  # the same, along the direction of pairs half of which are exchanged
    "style": StyleScore,  # the same, along the direction of pairs without a hack
    "gradient": GradientScore,  # the rollout's gradient along the pairs' direction
    "labels": Labels,  # the oracle's labels, as noisy and as rare as one likes (ceiling)
}

__all__ = [
    "MONITORS",
    "Coin",
    "GradientScore",
    "HaarScore",
    "Labels",
    "MatchedHaarScore",
    "Monitor",
    "ShuffledScore",
    "StyleScore",
]
