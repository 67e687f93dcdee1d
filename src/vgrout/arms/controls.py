"""Arms without a direction: vanilla twins, the honest ceiling, absorption, chance, and the positive control."""

from __future__ import annotations

import torch

from vgrout.arms.base import Arm
from vgrout.config import stream
from vgrout.method.gate import uniform
from vgrout.method.loss import advantages, counted_rows
from vgrout.types import Decision


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


class CoinFlip(Arm):
    name = "coin_flip"
    claim = "routes and absorbs fixed shares at random"

    def route(self, step, batch, oracle):
        generator = torch.Generator().manual_seed(stream(self.cfg.chance_seed, "coin", step))
        u = torch.rand(batch.n, generator=generator)
        d = (u < self.cfg.coin_route).float()
        m = (u < self.cfg.coin_route + self.cfg.coin_absorb).float()
        return Decision(m=m, d=d, weight=torch.ones(batch.n), penalty=torch.zeros(batch.n))


class OracleRoute(Arm):
    name = "oracle_route"
    claim = "positive control: routes exactly the hacks that the oracle names"
    access = "L4"
    reads_oracle = True

    def route(self, step, batch, oracle):
        hacked = oracle.hacked.float()
        return Decision(m=hacked, d=hacked, weight=torch.ones(batch.n), penalty=torch.zeros(batch.n))

    def credit(self, batch, reward, decision):
        counted = counted_rows("kept", decision, batch.teacher)
        return advantages(reward - decision.penalty, batch.group, norm=self.cfg.advantage, counted=counted)
