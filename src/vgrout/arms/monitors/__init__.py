"""Every monitor by name: what can tell a rollout from its neighbours. Adding one: a file and an entry here."""

from __future__ import annotations

from vgrout.arms.monitors.activation import ActivationScore
from vgrout.arms.monitors.base import Monitor
from vgrout.arms.monitors.chance import Coin
from vgrout.arms.monitors.gradient import GradientScore, HaarScore, MatchedHaarScore, ShuffledScore, StyleScore
from vgrout.arms.monitors.labels import Labels
from vgrout.arms.monitors.opinion import Opinion
from vgrout.arms.monitors.probe import Probe

MONITORS: dict[str, type[Monitor]] = {
    "coin": Coin,  # chance
    "haar": HaarScore,  # the rollout's gradient along a random direction
    "haar_matched": MatchedHaarScore,  # the same, with another run's counts
    "shuffled": ShuffledScore,  # the same, along the direction of pairs half of which are exchanged
    "style": StyleScore,  # the same, along the direction of pairs without a hack
    "gradient": GradientScore,  # the rollout's gradient along the pairs' direction
    "activation": ActivationScore,  # the rollout's bottleneck activation along the pairs' direction
    "probe": Probe,  # a linear probe that was fitted on labels of other mechanisms
    "judge": Opinion,  # a generic language model
    "labels": Labels,  # the oracle's labels, as noisy and as rare as one likes (ceiling)
}

__all__ = [
    "MONITORS",
    "ActivationScore",
    "Coin",
    "GradientScore",
    "HaarScore",
    "Labels",
    "MatchedHaarScore",
    "Monitor",
    "Opinion",
    "Probe",
    "ShuffledScore",
    "StyleScore",
]
