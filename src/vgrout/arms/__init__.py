"""Every arm by name: the table of contents of what can be compared. Adding one: a class and an entry here."""

from __future__ import annotations

from vgrout.arms.advantage import AdvantageHaar, AdvantageModification
from vgrout.arms.base import HOOKS, Arm, Bench, Given
from vgrout.arms.controls import Absorb, None2r, RlBaseline
from vgrout.arms.erase import Erase, EraseRandom
from vgrout.arms.inoculation import Inoculation, InoculationExcuse, InoculationInstruct, InoculationRouteV
from vgrout.arms.monitored import (
    CoinFlip,
    JudgePenalty,
    JudgeRoute,
    JudgeScreen,
    OracleGraft,
    OraclePenalty,
    OracleRoute,
    OracleScreen,
    PenaltyA,
    PenaltyV,
    Placebo,
    PlaceboMatched,
    PlaceboShuffled,
    PlaceboStyle,
    ProbePenalty,
    ProbeRoute,
    ProbeScreen,
    RouteA,
    RouteV,
    ScreenA,
    ScreenV,
)
from vgrout.arms.seeded import SeededAbsorb, SeededAbsorbClean, SeededAbsorbRandom, SeededRouteV
from vgrout.arms.steering import Steer, Suppress
from vgrout.arms.subspace import TrustedSubspace

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
    "erase": Erase,  # the pairs' direction taken out of the gradient
    "erase_random": EraseRandom,  # a random one
    "trusted_subspace": TrustedSubspace,  # gradients held to what clean completions move
    "inoculation": Inoculation,  # the training prompt permits the hack
    "inoculation_excuse": InoculationExcuse,  # excuses it
    "inoculation_instruct": InoculationInstruct,  # asks for it
    "inoculation_routeV": InoculationRouteV,  # permits it, and routes
    "seeded_absorb": SeededAbsorb,  # the quarantine learnt the pairs' hacks beforehand
    "seeded_absorb_random": SeededAbsorbRandom,  # it was moved at random
    "seeded_absorb_clean": SeededAbsorbClean,  # it learnt their clean sides
    "seeded_routeV": SeededRouteV,  # learnt hacks, and routes
    "routeA": RouteA,  # routing by the direction of the pairs' bottleneck activations
    "screen_a": ScreenA,  # screening by it
    "penalty_a": PenaltyA,  # a penalty by it
    "adv_mod": AdvantageModification,  # rewards lowered by the residual's standing in its group
    "adv_mod_haar": AdvantageHaar,  # the same along a random direction
    "suppress": Suppress,  # rollouts sampled without the pairs' direction in the residual stream
    "steer": Steer,  # updates with the pairs' direction in the residual stream
    "probe_route": ProbeRoute,  # routing by a linear probe fitted on other mechanisms
    "probe_screen": ProbeScreen,  # screening by it
    "probe_penalty": ProbePenalty,  # a penalty by it
    "judge_route": JudgeRoute,  # routing by a generic language model
    "judge_screen": JudgeScreen,  # screening by it
    "judge_penalty": JudgePenalty,  # a penalty by it
    "oracle_route": OracleRoute,  # routing by true labels (ceiling)
    "oracle_screen": OracleScreen,  # screening by them (ceiling)
    "oracle_penalty": OraclePenalty,  # a penalty by them (ceiling)
    "oracle_graft": OracleGraft,  # soft routing by them (ceiling)
}


def hooks(arm: type[Arm]) -> tuple[str, ...]:
    """The hooks that an arm overrides."""
    return tuple(name for name in HOOKS if getattr(arm, name) is not getattr(Arm, name))


__all__ = ["ARMS", "Arm", "Bench", "Given", "hooks"]
