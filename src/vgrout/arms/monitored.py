"""Arms that watch: a monitor says which rollouts look like hacks, an action says what follows.

    route       they train the quarantine alone; unsure ones train both blocks
    screen      they do not train, and leave the mean and sd of their group
    penalise    `penalty` is taken off their reward
    graft       both blocks run for all; flagged ones train the quarantine more and the deployed block less (graft.py)
All read the same Decision, so two arms with one monitor differ by one word. Under the last two, unsure rollouts train
as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch

from vgrout.arms.base import Arm, part
from vgrout.arms.graft import graft_weights
from vgrout.arms.monitors import (
    ActivationScore,
    Coin,
    GradientScore,
    HaarScore,
    Labels,
    MatchedHaarScore,
    Monitor,
    Opinion,
    Probe,
    ShuffledScore,
    StyleScore,
)
from vgrout.config import Config
from vgrout.types import Decision

Action = Callable[[Decision, Config], Decision]


def route(read: Decision, cfg: Config) -> Decision:
    return read


def screen(read: Decision, cfg: Config) -> Decision:
    plain = torch.zeros_like(read.m)
    return replace(read, m=plain, d=plain, weight=(~read.route).float())


def penalise(read: Decision, cfg: Config) -> Decision:
    plain = torch.zeros_like(read.m)
    return replace(read, m=plain, d=plain, penalty=cfg.penalty * read.route)


def graft(read: Decision, cfg: Config) -> Decision:
    """A rollout of which the monitor says neither this nor that trains both blocks alike."""
    share = torch.ones(len(read.m), 2)
    known = ~read.absorb
    share[known] = torch.stack(graft_weights(read.route[known], cfg.graft_strength, cfg.graft_kind), dim=1)
    return replace(read, m=torch.ones_like(read.m), d=torch.zeros_like(read.d), share=share)


ACTIONS: dict[str, Action] = {"route": route, "screen": screen, "penalise": penalise, "graft": graft}


class Monitored(Arm):
    """A subclass names its monitor and its action; access level and costs follow from the monitor."""

    monitor: ClassVar[type[Monitor]]
    action = "route"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for fact in ("access", "reads_oracle", "scores", "needs"):
            setattr(cls, fact, getattr(cls.monitor, fact))
        cls.signal = cls.monitor.name

    def __init__(self, bench):
        super().__init__(bench)
        self.watch = self.monitor(bench)

    def route(self, step, batch, oracle):
        return ACTIONS[self.action](self.watch.read(step, batch, oracle), self.cfg)

    def state(self):
        return {f"watch.{key}": value for key, value in self.watch.state().items()}

    def restore(self, state):
        self.watch.restore(part(state, "watch."))


class RouteV(Monitored):
    name = "routeV"
    claim = "routes by the gradient's cosine with a direction from hand-written pairs"
    monitor = GradientScore


class ScreenV(Monitored):
    name = "screen_v"
    claim = "leaves out what routeV would route"
    monitor = GradientScore
    action = "screen"


class PenaltyV(Monitored):
    name = "penalty_v"
    claim = "takes a penalty off the reward of what routeV would route"
    monitor = GradientScore
    action = "penalise"


class RouteA(Monitored):
    name = "routeA"
    claim = "routes by the bottleneck activation's cosine with a direction from hand-written pairs"
    monitor = ActivationScore


class ScreenA(Monitored):
    name = "screen_a"
    claim = "leaves out what routeA would route"
    monitor = ActivationScore
    action = "screen"


class PenaltyA(Monitored):
    name = "penalty_a"
    claim = "takes a penalty off the reward of what routeA would route"
    monitor = ActivationScore
    action = "penalise"


class ProbeRoute(Monitored):
    name = "probe_route"
    claim = "routes what a linear probe takes for a hack, which was fitted on labels of other mechanisms"
    monitor = Probe


class ProbeScreen(Monitored):
    name = "probe_screen"
    claim = "leaves out what probe_route would route"
    paper = "Ariahw, Engels and Nanda 2025"
    monitor = Probe
    action = "screen"


class ProbePenalty(Monitored):
    name = "probe_penalty"
    claim = "takes a penalty off the reward of what probe_route would route"
    paper = "Ariahw, Engels and Nanda 2025"
    monitor = Probe
    action = "penalise"


class JudgeRoute(Monitored):
    name = "judge_route"
    claim = "routes what a generic language model calls a hack"
    monitor = Opinion


class JudgeScreen(Monitored):
    name = "judge_screen"
    claim = "leaves out what a generic language model calls a hack"
    monitor = Opinion
    action = "screen"


class JudgePenalty(Monitored):
    name = "judge_penalty"
    claim = "takes a penalty off the reward of what a generic language model calls a hack"
    monitor = Opinion
    action = "penalise"


class Placebo(Monitored):
    name = "placebo"
    claim = "routeV with a Haar-random direction, one draw per run"
    monitor = HaarScore


class PlaceboMatched(Monitored):
    name = "placebo_matched"
    claim = "routes by a Haar-random direction, in each step as many rollouts as the paired routeV run"
    monitor = MatchedHaarScore


class PlaceboShuffled(Monitored):
    name = "placebo_shuffled"
    claim = "routeV with the sides of a random half of the pairs exchanged, one draw per run"
    monitor = ShuffledScore


class PlaceboStyle(Monitored):
    name = "placebo_style"
    claim = "routeV with a direction from pairs of two honest solutions"
    monitor = StyleScore
    pairs_tag = "placebo-style"


class CoinFlip(Monitored):
    name = "coin_flip"
    claim = "routes and absorbs at random: as many as the paired routeV run, or fixed shares where there is none"
    monitor = Coin
    takes = ("yoke",)


class OracleRoute(Monitored):
    name = "oracle_route"
    claim = "positive control: routes the hacks that the oracle names"
    monitor = Labels
    baseline = "kept"


class OracleScreen(Monitored):
    name = "oracle_screen"
    claim = "ceiling of filtering: leaves out the hacks that the oracle names"
    monitor = Labels
    action = "screen"


class OraclePenalty(Monitored):
    name = "oracle_penalty"
    claim = "ceiling of reward shaping: takes a penalty off the hacks that the oracle names"
    monitor = Labels
    action = "penalise"


class OracleGraft(Monitored):
    name = "oracle_graft"
    claim = "ceiling of soft routing: hacks that the oracle names train the quarantine more, the deployed block less"
    paper = "Cloud et al. 2024"
    monitor = Labels
    action = "graft"
