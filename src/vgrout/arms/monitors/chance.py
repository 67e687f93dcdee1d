"""Chance in place of a signal."""

from __future__ import annotations

from dataclasses import replace

import torch

from vgrout.arms.monitors.base import Monitor
from vgrout.config import stream
from vgrout.method.gate import decide, ranked


class Coin(Monitor):
    """Fixed shares at random; or, in a run that is yoked to another, as many rollouts as that one routed and absorbed
    in the same step."""

    name = "coin"

    def read(self, step, batch, oracle):
        generator = torch.Generator().manual_seed(stream(self.cfg.chance_seed, "coin", step))
        u, live = torch.rand(batch.n, generator=generator), torch.ones(batch.n, dtype=torch.bool)
        if self.bench.given.yoke is not None:
            drawn = ranked(-u, live, *self.bench.given.yoke[step])
        else:
            shares = (self.cfg.coin_route, self.cfg.coin_route + self.cfg.coin_absorb)
            drawn = decide(-u, live, -shares[1], -shares[0])
        return replace(drawn, score=None, threshold=None)
