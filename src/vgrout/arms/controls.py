"""Arms without a monitor: vanilla twins, the honest ceiling, absorption."""

from __future__ import annotations

from vgrout.arms.base import Arm
from vgrout.method.gate import uniform


class None2r(Arm):
    name = "none_2r"
    claim = "capacity-matched vanilla: both blocks train, nothing is ablated"
    ablates = False

    def route(self, step, batch, oracle):
        return uniform(batch.n, "absorb")


class RlBaseline(Arm):
    name = "rl_baseline"
    claim = "reward tests only, no loophole: the honest ceiling"
    access = "env"
    loophole = False


class Absorb(Arm):
    name = "absorb"
    claim = "both blocks train on everything, the quarantine is ablated"

    def route(self, step, batch, oracle):
        return uniform(batch.n, "absorb")
